"""The step `deploy`: its contract in component.py, its work in step.py."""

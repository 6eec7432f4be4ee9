"""The step `evaluate`: its contract in component.py, its work in step.py."""

"""The step `label`: its contract in component.py, its work in step.py."""

"""The step `build`: its contract in component.py, its work in step.py."""

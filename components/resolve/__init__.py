"""The step `resolve`: its contract in component.py, its work in step.py."""

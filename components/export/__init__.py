"""The step `export`: its contract in component.py, its work in step.py."""

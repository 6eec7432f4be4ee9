"""The step `train`: its contract in component.py, its work in step.py."""

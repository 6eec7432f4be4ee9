"""The step `ingest`: its contract in component.py, its work in step.py."""

"""The training pipeline, its presets and the `haechi` command."""

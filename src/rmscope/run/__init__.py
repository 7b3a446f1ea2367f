"""A run: its settings, its folder on disk, its stages, and the evidence that pages show."""

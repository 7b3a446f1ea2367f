"""Audit: plant biases, train a PM on them, run the pipeline without telling it, and count what it found."""

"""Audit: plant biases, train a PM on them, run the pipeline on it blind, and count what it found."""

"""Hypotheses about features as controlled experiments; those in ``ready/`` come with the package."""

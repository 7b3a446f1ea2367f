"""Hypotheses about features as controlled experiments; ready-made ones in `ready`."""

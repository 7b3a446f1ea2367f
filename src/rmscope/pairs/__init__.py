"""Pairs: reading them, splitting them, planting known biases into them."""

"""Makes completions that fool the PM out of its verified features, and proves what carries them."""

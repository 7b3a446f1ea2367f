"""Training PMs: recipes, our own loop, TRL's trainer, accuracy on held-out pairs."""

"""SAEs side by side on held-out pairs."""

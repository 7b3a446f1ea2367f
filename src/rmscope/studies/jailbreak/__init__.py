"""jailbreak: bad text that the PM prefers to good answers, built from its own features, and what carries it."""

"""Patches of a PM: edits of features, the rule that chooses them, figures before and after; and a gate between two PMs."""

"""Mends a PM: edits of features, how they are chosen and checked, and a gate for whoever ships the PM."""

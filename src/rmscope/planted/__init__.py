"""Known ground truth: twins of a planted cue, which features match it, recall, and why a cue was missed."""

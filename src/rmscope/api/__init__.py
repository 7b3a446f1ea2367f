"""The public surface as functions: effects of features on pairs, and the studies of a run."""

"""The report: one self-contained page made from the figures of a run."""

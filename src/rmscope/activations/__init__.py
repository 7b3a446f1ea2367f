"""Activations: the residual stream at some sites, stored on disk or streamed from the PM."""

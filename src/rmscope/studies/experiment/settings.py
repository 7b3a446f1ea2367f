"""Settings of an experiment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from rmscope.settings import Argument, LoadSettings


class ExperimentConfig(LoadSettings):
    """Measures texts under named conditions over many prompts, with and without features, and tests what the file expects.

    Give a run, or a PM and pairs; without a run nothing is ablated.
    """

    file: Annotated[str, Argument]
    """A YAML file, or a ready-made experiment: dont_know, repetition, thanks, urls, youre_right."""
    run: Path | None = None
    """A run folder: it gives the PM, fresh prompts, and the features to ablate."""
    model: str | None = None
    """The PM where there is no run: a hub id, a folder, or zoo:hh / zoo:planted. Nothing is then ablated."""
    data: str = "demo:planted"
    """Pairs that give SD(Δr) and prompts where there is no run: a file, a hub id, or demo:planted."""
    out: Path | None = None
    """Folder of the result; left out, evidence/experiments of the run, or experiments."""

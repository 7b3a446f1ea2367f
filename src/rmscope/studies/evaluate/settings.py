"""Settings of ``rmscope evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from rmscope.settings import Argument, LoadSettings, Names


class EvaluateConfig(LoadSettings):
    """SAEs on held-out pairs: those of a run on its measure split, or your own on any pairs."""

    run: Annotated[Path | None, Argument] = None
    """A run folder: its SAEs on its measure split."""
    model: str | None = None
    """The PM, where no run is named: a hub id, a folder, or zoo:hh / zoo:planted."""
    data: str | None = None
    """The pairs, where no run is named: pairs that the SAEs have not seen."""
    sae: Names = []
    """SAEs, or folders of SAEs, comma-separated; with a run they are evaluated beside its own."""
    site: str | None = None
    """The site of SAEs that name none, such as resid_post.7."""
    limit: int = Field(128, gt=0)
    """At most this many pairs, one per prompt while prompts last."""
    curves: bool = False
    """Also keep K and ablate K of a run's SAEs, with their controls; its report then shows them."""
    out: Path | None = None
    """A folder for evaluation.parquet and evaluation.html."""

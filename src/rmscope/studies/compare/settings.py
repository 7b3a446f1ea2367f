"""Settings of ``rmscope compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from rmscope.settings import Argument, Names, Settings


class CompareConfig(Settings):
    """Two PMs on the same fresh pairs: A is the run's PM."""

    other: Annotated[str, Argument]
    """B: another run folder, a PM, a patch of A's PM, or a base (zoo:smollm2, a folder)."""
    prompts: int = Field(48, ge=2)
    """Ablate each feature on at most this many fresh prompts."""
    pairs: int = Field(512, ge=2)
    """Read at most this many fresh pairs of a run."""
    control: Names | None = None
    """Other PMs of A's kind, such as of other seeds: a difference holds where B stands apart from them too."""
    out: Path | None = None
    """The folder of the result; left out, the run's evidence folder."""

"""Settings of an audit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from rmscope.settings import Argument, Seed, Settings


class AuditConfig(Settings):
    """Which biases are planted into which text, and what is trained and run on it."""

    plants: Annotated[Path, Argument]
    """The plants file, such as configs/audit/standard.yaml."""
    pairs: str
    """The text that cues are planted into: a pairs file, a hub id, or demo:plain."""
    out: Path
    """The folder of the audit."""
    base: str = "zoo:smollm2"
    """What the PM is trained from: zoo:smollm2, or a folder of a Llama-like model."""
    limit: int = Field(800, gt=0)
    """At most this many pairs, from the start of the data, among those short enough."""
    max_tokens: int = Field(110, gt=0)
    """Pairs with a longer side are left out before planting."""
    copies: int = Field(4, gt=0)
    """Copies of each pair; each copy carries at most one cue."""
    seed: Seed | None = None
    """Fixes planting, the PM, the SAEs and the run. Default: the seed of the plants file."""
    calibrate: bool = False
    """Also audit a PM of shuffled labels, one of random weights, and decoy cues: about three times the work."""
    recipe: Path | None = None
    """A YAML file of changes to how the PM is trained."""
    run: Path | None = None
    """A YAML file of changes to the run's settings. Default: those of rmscope run."""

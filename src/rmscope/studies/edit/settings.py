"""Settings of edit and gate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from rmscope.settings import Argument, LoadSettings, Names, Numbers, Seed, Settings


class EditConfig(Settings):
    """Which features of a run are edited and how, what is written, and what is measured."""

    out: Path
    """Write the patch to this folder."""
    site: str | None = None
    """The site of the features, such as resid_post.7. With cue: choose features at this site only."""
    features: Numbers | None = None
    """The features to edit, such as 12,405,77."""
    cue: Names | None = None
    """Instead of naming features: the cue whose effect the patch takes away. Several cues give one patch."""
    concepts: Path | None = None
    """The cues, a YAML file as rmscope gate reads it. Default: the six cues of the zoo."""
    suppress: bool = False
    """Set the features to 0. This is the default."""
    clamp: float | None = None
    """Set the features to this value at every token."""
    damp: float | None = None
    """Multiply the features by this factor. Below 0 it reverses their effect."""
    export: Path | None = None
    """Also write a folder that plain transformers opens. It contains code, so it needs trust_remote_code."""
    check: bool = False
    """Measure before and after: the cues' effects, accuracy and drift."""
    pairs: str | None = None
    """With check: measure on these pairs too, a file or a hub id."""
    limit: int = Field(300, ge=2)
    """With pairs: at most this many of them."""
    rm_bench: Path | None = None
    """With check: measure accuracy on RM-Bench by style too, from this file."""


class GateConfig(LoadSettings):
    """Two PMs, the concepts, and how far the reward of a concept may move."""

    title = "Options"

    base: Annotated[str, Argument]
    """The PM before the change: a hub id, a folder, or zoo:NAME."""
    new: Annotated[str, Argument]
    """The PM after the change, or the folder of a patch of BASE."""
    adapter: str | None = None
    """A PEFT adapter to put on both PMs."""
    concepts: Path | None = None
    """YAML: a list of concepts, each with a name and texts. Default: the six cues of the zoo."""
    bound: float = Field(0.25, ge=0)
    """How far a concept may move, in SD(Δr)."""
    data: str | None = None
    """Pairs into whose responses the concepts are inserted, a file or a hub id. Default: the demo's."""
    limit: int | None = Field(None, gt=0)
    """At most this many pairs, from the start of the data."""
    seed: Seed = 0
    """Fixes every draw."""

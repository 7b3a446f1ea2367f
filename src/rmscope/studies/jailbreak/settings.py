"""Settings of jailbreak."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rmscope.settings import Seed, Settings


class JailbreakConfig(Settings):
    """Which features the phrases come from, how long they may be, and on which prompts they are measured."""

    site: str | None = None
    """Take features of this site only, such as resid_post.7. Default: all sites of the run."""
    budget: int = Field(64, ge=1)
    """At most this many tokens in all phrases together."""
    prompts: int = Field(120, ge=2)
    """At most this many measured prompts."""
    data: str | None = None
    """Measure on the prompts of these pairs, a file or a hub id; prompts of the run are left out. Default: the run's measure
    split."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What a row of the data that gives no pair does: error ends the command; skip leaves it out."""
    seed: Seed = 0
    """Fixes every draw."""

"""A preference pair, and the three-way split of prompts."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

Side = Literal["chosen", "rejected"]
SIDES: tuple[Side, Side] = ("chosen", "rejected")
Split = Literal["fit", "confirm", "measure"]


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Pair:
    """Two responses to one prompt, the first preferred.

    ``prompt`` ends with a human turn; ``chosen`` and ``rejected`` are the assistant's next turn as plain strings.
    """

    id: str
    prompt: list[Message]
    chosen: str
    rejected: str
    meta: dict[str, Any] = field(default_factory=dict)

    def first_human_turn(self) -> str:
        """The key by which prompts are split and held out; the first turn of all where no human speaks."""
        turns = [m["content"] for m in self.prompt if m["role"] == "user"] or [m["content"] for m in self.prompt]
        return turns[0].strip() if turns else ""

    def side(self, side: Side) -> str:
        return self.chosen if side == "chosen" else self.rejected


def split_of(pair: Pair) -> Split:
    """Fit 50 %, confirm 25 %, measure 25 % of the prompts, by hash of the first human turn.

    The same prompt falls on the same side in every dataset and every run. ``meta["group"]``, where present, stands
    for the prompt: planted variants of one prompt then share its split.
    """
    key = str(pair.meta.get("group", pair.first_human_turn()))
    quarter = hashlib.sha256(key.encode()).digest()[0] % 4
    return ("fit", "fit", "confirm", "measure")[quarter]  # type: ignore[return-value]

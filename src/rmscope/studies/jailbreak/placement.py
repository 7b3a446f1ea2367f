"""Where phrases are put in a text: at its start, at its end, or between its middle sentences."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from rmscope.pairs.planting import sentences
from rmscope.studies.jailbreak.phrases import Phrase

Slot = Literal["start", "middle", "end"]
SLOTS: tuple[Slot, ...] = ("start", "middle", "end")


@dataclass(frozen=True, slots=True)
class Placement:
    """A phrase and its place."""

    phrase: Phrase
    slot: Slot


Layout = tuple[Placement, ...]
"""A list of phrases with their places."""


def pieces(text: str, layout: Iterable[Placement]) -> list[tuple[str, bool]]:
    """The text with the phrases, as (piece, whether it is a phrase).

    The slots are before the text, after half of its sentences, and after it. Phrases of one slot are in list order.
    """
    parts = sentences(text)
    half = (len(parts) + 1) // 2
    phrases = {slot: [(p.phrase.text, True) for p in layout if p.slot == slot] for slot in SLOTS}
    own = [(" ".join(part), False) for part in (parts[:half], parts[half:])]
    return [piece for piece in (*phrases["start"], own[0], *phrases["middle"], own[1], *phrases["end"]) if piece[0]]


def place(text: str, layout: Iterable[Placement]) -> str:
    """The text with the phrases, its sentences separated by one space."""
    return " ".join(piece for piece, _ in pieces(text, layout))


def cost(layout: Iterable[Placement]) -> int:
    """Tokens of all phrases."""
    return sum(p.phrase.tokens for p in layout)

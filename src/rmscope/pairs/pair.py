"""A preference pair, and the three-way split of prompts."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
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
        """What the human says first; the first turn of all where no human speaks."""
        turns = [m["content"] for m in self.prompt if m["role"] == "user"] or [m["content"] for m in self.prompt]
        return turns[0].strip() if turns else ""

    @property
    def prompt_key(self) -> str:
        """The prompt by which pairs are split, grouped and held out: ``meta["group"]`` where the data name one (planted
        variants of one prompt share it), else the first human turn."""
        return str(self.meta.get("group", self.first_human_turn()))

    def side(self, side: Side) -> str:
        return self.chosen if side == "chosen" else self.rejected


def split_of(pair: Pair) -> Split:
    """Fit 50 %, confirm 25 %, measure 25 % of the prompts, by hash of :attr:`Pair.prompt_key`.

    The same prompt falls on the same side in every dataset and every run.
    """
    quarter = hashlib.sha256(pair.prompt_key.encode()).digest()[0] % 4
    return ("fit", "fit", "confirm", "measure")[quarter]  # type: ignore[return-value]


def prompts_in_turn(pairs: Iterable[Pair]) -> list[Pair]:
    """Each prompt's first pair, then each prompt's second, and so on."""
    listed = list(pairs)
    return [listed[i] for i in sorted(range(len(listed)), key=_turns([p.prompt_key for p in listed]).__getitem__)]


def one_per_prompt(prompts: Sequence[str], most: int) -> list[int]:
    """Places of at most ``most`` items in ascending order, a second one of a prompt only after every prompt has one."""
    return sorted(sorted(range(len(prompts)), key=_turns(prompts).__getitem__)[:most])


def _turns(prompts: Sequence[str]) -> list[int]:
    """How many items of its prompt stand before each item."""
    seen: Counter[str] = Counter()
    turns = []
    for prompt in prompts:
        turns.append(seen[prompt])
        seen[prompt] += 1
    return turns


def share_a_prompt(pairs: Iterable[Pair], others: Iterable[Pair]) -> set[str]:
    """Ids of those ``pairs`` whose prompt is also one of ``others``, by prompt key or by first human turn.

    Both are compared: planted pairs name their prompt in ``meta["group"]``, the same pairs read from a file may not.
    """
    known = {key for p in others for key in (p.prompt_key, p.first_human_turn())}
    return {p.id for p in pairs if p.prompt_key in known or p.first_human_turn() in known}

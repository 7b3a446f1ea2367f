"""A preference pair, the three-way split of prompts, the order of pairs by prompt, and the filter on |Δr|."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired, TypedDict

import numpy as np
from jaxtyping import Float

from rmscope.errors import InputError

Side = Literal["chosen", "rejected"]
SIDES: tuple[Side, Side] = ("chosen", "rejected")
Split = Literal["fit", "confirm", "measure"]


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str
    tool_calls: NotRequired[list[dict[str, Any]]]
    """The tools that an assistant calls, as chat templates take them."""
    name: NotRequired[str]
    """The name of the tool that answers."""
    tool_call_id: NotRequired[str]
    """The call that a tool answers."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two responses to one prompt, the first preferred.

    ``prompt`` ends with a human's or a tool's turn; ``chosen`` and ``rejected`` are the assistant's next turn as texts.
    """

    id: str
    prompt: list[Message]
    chosen: str
    rejected: str
    meta: dict[str, Any] = field(default_factory=dict)

    def first_human_turn(self) -> str:
        """The first turn of the human, or the first turn of all if there is no human."""
        turns = [m["content"] for m in self.prompt if m["role"] == "user"] or [m["content"] for m in self.prompt]
        return turns[0].strip() if turns else ""

    @property
    def prompt_key(self) -> str:
        """The prompt by which pairs are split, grouped and held out: ``meta["group"]`` if the data has it (planted
        variants of one prompt share it), else the first human turn."""
        return str(self.meta.get("group", self.first_human_turn()))

    def side(self, side: Side) -> str:
        return self.chosen if side == "chosen" else self.rejected


def split_of(pair: Pair) -> Split:
    """Fit 50 %, confirm 25 %, measure 25 % of the prompts, by a hash of :attr:`Pair.prompt_key`.

    A prompt is in the same split in every dataset and every run.
    """
    quarter = hashlib.sha256(pair.prompt_key.encode()).digest()[0] % 4
    return ("fit", "fit", "confirm", "measure")[quarter]  # type: ignore[return-value]


def check_pairs(pairs: Sequence[Pair]) -> None:
    """Raises an InputError if there is no pair, or if two pairs have one id (files of one name that were joined)."""
    if not pairs:
        raise InputError("There are no pairs; name a source that holds some, or loosen the filters.")
    name, count = Counter(pair.id for pair in pairs).most_common(1)[0]
    if count > 1:
        raise InputError(
            f"The pair id {name!r} occurs {count} times; ids must be unique: rename one of the files that were joined, or "
            "read each file once."
        )


def prompts_in_turn(pairs: Iterable[Pair]) -> list[Pair]:
    """The first pair of each prompt, then the second of each, and so on."""
    listed = list(pairs)
    return [listed[i] for i in _in_turn([p.prompt_key for p in listed])]


def one_per_prompt(prompts: Sequence[str], most: int) -> list[int]:
    """Places of at most ``most`` items in ascending order, a second one of a prompt only after every prompt has one."""
    return sorted(_in_turn(prompts)[:most])


def _in_turn(prompts: Sequence[str]) -> list[int]:
    seen: Counter[str] = Counter()
    turns = []
    for prompt in prompts:
        turns.append(seen[prompt])
        seen[prompt] += 1
    return sorted(range(len(turns)), key=turns.__getitem__)


def share_a_prompt(pairs: Iterable[Pair], others: Iterable[Pair]) -> set[str]:
    """Ids of those ``pairs`` whose prompt is also one of ``others``, by prompt key or by first human turn.

    Both are compared: planted pairs name their prompt in ``meta["group"]``, the same pairs read from a file may not.
    """
    known = {key for p in others for key in (p.prompt_key, p.first_human_turn())}
    return {p.id for p in pairs if p.prompt_key in known or p.first_human_turn() in known}


def filtered_count(scored: int, share: float | None, most: int | None) -> int:
    """How many of ``scored`` pairs a filter keeps: the share, rounded down, and at most ``most``; at least one."""
    return max(1, min(scored, scored if share is None else int(scored * share), scored if most is None else most))


def largest_differences(delta: Float[np.ndarray, " pairs"], share: float | None, most: int | None) -> list[int]:
    """The places of the pairs with the largest |Δr|, in file order; of equal ones the first."""
    order = np.argsort(-np.abs(delta), kind="stable")
    return sorted(order[: filtered_count(len(delta), share, most)].tolist())

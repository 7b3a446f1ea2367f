"""The fresh pairs on which the PMs of a comparison meet.

*Fresh* pairs are those of the runs' measure splits: on their prompts no SAE was trained, no feature chosen and none
confirmed, in either run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from rmscope.errors import InputError
from rmscope.model.rendering import PairTokens
from rmscope.pairs.pair import SIDES, Pair, share_a_prompt
from rmscope.run.inputs import PairSet
from rmscope.studies.compare.models import ComparedModel, check_match


@dataclass(frozen=True)
class HeldOut:
    """Fresh pairs that every PM reads as the same tokens: ids, tokens and prompt keys, in one order."""

    ids: list[str]
    tokens: list[PairTokens]
    prompts: list[str]

    @cached_property
    def prompt_of(self) -> dict[str, str]:
        """The prompt key of each pair id."""
        return dict(zip(self.ids, self.prompts, strict=True))

    @cached_property
    def index(self) -> dict[str, int]:
        """The place of each pair id."""
        return {id_: i for i, id_ in enumerate(self.ids)}


def fresh_pairs(pair_sets: Sequence[PairSet], most: int) -> list[Pair]:
    """At most ``most`` pairs of each run's measure split, one per prompt while prompts last.

    A pair that both runs hold is taken once. A prompt on which either run fitted or confirmed is left out.
    """
    used = [p for s in pair_sets for p, split in zip(s.pairs, s.splits, strict=True) if split != "measure"]
    fresh: dict[tuple[tuple[tuple[str, str], ...], str, str], Pair] = {}
    for s in pair_sets:
        stale = share_a_prompt((s.pairs[i] for i in s.of_split("measure")), used)
        places = [i for i in s.of_split("measure") if s.ids[i] not in stale]
        for pair in (s.pairs[i] for i in s.one_per_prompt(places, most)):
            turns = tuple((m["role"], m["content"]) for m in pair.prompt)
            fresh.setdefault((turns, pair.chosen, pair.rejected), pair)
    return list(fresh.values())


def hold_out(a: ComparedModel, others: Sequence[ComparedModel], pairs: Sequence[Pair]) -> HeldOut:
    """Those of the pairs that all PMs can read; an id that two runs use for two pairs gets a number.

    Raises:
        InputError: the PMs do not match, read a text as different tokens, or no pair is left.
    """
    for other in others:
        check_match(a, other)
    ids: list[str] = []
    tokens: list[PairTokens] = []
    prompts: list[str] = []
    by_model = (model.rm.tokenize_all(pairs) for model in (a, *others))
    for pair, own, *theirs in zip(pairs, *by_model, strict=True):
        for other, its in zip(others, theirs, strict=True):
            if not all(torch.equal(own.side(s), its.side(s)) for s in SIDES):
                raise InputError(
                    f"{other.name} reads the pair {pair.id} as other tokens than {a.name}: its tokenizer is another one; "
                    "name a PM that kept the tokenizer."
                )
        if all(model.rm.fits(own) for model in (a, *others)) and not torch.equal(own.chosen, own.rejected):
            ids.append(pair.id if pair.id not in ids else f"{pair.id} ({len(ids)})")
            tokens.append(own)
            prompts.append(pair.prompt_key)
    if not ids:
        raise InputError("There is no fresh pair that all PMs can read; make the run with more prompts.")
    return HeldOut(ids, tokens, prompts)

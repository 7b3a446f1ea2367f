"""The two PMs of a comparison, and the fresh pairs on which they meet.

A comes with a finished run. B is another PM of the same width that reads texts as the same tokens, with a run of its own or
without, or a base without a scalar head, of which only the stream can be read. *Fresh* pairs are those of the runs' measure
splits: on their prompts no SAE was trained, no feature chosen and none confirmed, in either run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from rmscope.errors import InputError
from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel
from rmscope.model.zoo import base_identity, load_base
from rmscope.pairs.pair import Pair
from rmscope.sae.base import Sae


def _no_tokens(_site: str, _feature: int) -> list[tuple[str, float]]:
    return []


@dataclass(frozen=True)
class Version:
    """One of the two PMs. A PM without a run has no SAEs and reports nothing."""

    rm: RewardModel
    name: str
    identity: str
    """Content hash of the weights."""
    base: bool = False
    """Whether it has no scalar head, so that its rewards mean nothing."""
    saes: Mapping[str, Sae] = field(default_factory=dict)
    reported: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """The reported features of each site."""
    tokens: Callable[[str, int], list[tuple[str, float]]] = _no_tokens
    """(token text, share) on which a feature of a site fires most."""


@dataclass(frozen=True)
class HeldOut:
    """Pairs that had no part in training SAEs, choosing features or confirming them: ids, tokens, prompts, in one order."""

    ids: list[str]
    tokens: list[PairTokens]
    prompts: list[str]

    @cached_property
    def prompt_of(self) -> dict[str, str]:
        return dict(zip(self.ids, self.prompts, strict=True))

    @cached_property
    def index(self) -> dict[str, int]:
        return {id_: i for i, id_ in enumerate(self.ids)}


@dataclass(frozen=True)
class Dictionary:
    """An SAE of A or of B (``of``: a, b) with its reported features; it reads the streams of both PMs."""

    of: str
    site: str
    sae: Sae
    reported: list[int]

    @property
    def key(self) -> tuple[str, str]:
        return self.of, self.site


def dictionaries(a: Version, b: Version) -> list[Dictionary]:
    """A's SAEs, then B's, each by depth."""
    return [
        Dictionary(of, site, v.saes[site], list(v.reported.get(site, [])))
        for of, v in (("a", a), ("b", b))
        for site in sorted(v.saes, key=v.rm.site_index)
    ]


def open_base(source: str, like: RewardModel) -> Version:
    """The base ``source``, reading texts as ``like`` renders them."""
    model, tokenizer = load_base(base=source)
    rm = RewardModel(model.to(like.device, like.dtype), tokenizer, like.rendering, source)
    return Version(rm, source, base_identity(source), base=True)


def must_match(a: Version, b: Version) -> None:
    """InputError where B cannot be compared with A: another width, a site that is missing, another rendering."""
    if a.rm.d_model != b.rm.d_model:
        raise InputError(
            f"{b.name} has a stream of width {b.rm.d_model}, {a.name} one of {a.rm.d_model}, so that no SAE reads both; "
            "name a version of the same model."
        )
    for v, other in ((a, b), (b, a)):
        for site in v.saes:
            if v.rm.site_index(site) >= len(other.rm.blocks):
                raise InputError(
                    f"{other.name} has {len(other.rm.blocks)} blocks and no {site}, where {v.name} has an SAE; compare runs "
                    "whose sites both PMs have."
                )
    if a.rm.rendering != b.rm.rendering:
        raise InputError(
            f"{a.name} reads conversations as {a.rm.rendering.as_dict()}, {b.name} as {b.rm.rendering.as_dict()}, so they "
            "share no text; give one of them the other's rendering in rmscope.json."
        )


def fresh_pairs(studies: Sequence[Any], most: int) -> list[tuple[Pair, str]]:
    """(pair, prompt): of each study at most ``most`` of its measure split, one a prompt while prompts last.

    A pair that both studies hold stands once; a prompt that either study fitted or confirmed on is left out.
    """
    used = {s.prompts[s.ids[i]] for s in studies for split in ("fit", "confirm") for i in s.of_split(split)}
    found: dict[tuple[Any, ...], tuple[Pair, str]] = {}
    for study in studies:
        measure = [i for i in study.of_split("measure") if study.prompts[study.ids[i]] not in used]
        for i in study.one_a_prompt(measure, most):
            pair = study.pairs[i]
            turns = tuple((m["role"], m["content"]) for m in pair.prompt)
            found.setdefault((turns, pair.chosen, pair.rejected), (pair, study.prompts[pair.id]))
    return list(found.values())


def meet(a: Version, others: Sequence[Version], pairs: Sequence[tuple[Pair, str]]) -> HeldOut:
    """The pairs that all PMs can read, numbered where two runs use one id for two pairs.

    Raises:
        InputError: the PMs do not match, read a text as different tokens, or no pair is left.
    """
    for other in others:
        must_match(a, other)
    ids: list[str] = []
    tokens: list[PairTokens] = []
    prompts: list[str] = []
    read = (v.rm.tokenize_all([pair for pair, _ in pairs]) for v in (a, *others))
    for (pair, prompt), mine, *theirs in zip(pairs, *read, strict=True):
        for other, its in zip(others, theirs, strict=True):
            if not all(torch.equal(mine.side(s), its.side(s)) for s in ("chosen", "rejected")):
                raise InputError(
                    f"{other.name} reads the pair {pair.id} as other tokens than {a.name}: its tokenizer is another one; "
                    "name a version that kept the tokenizer."
                )
        if all(v.rm.fits(mine) for v in (a, *others)) and not torch.equal(mine.chosen, mine.rejected):
            ids.append(pair.id if pair.id not in ids else f"{pair.id} ({len(ids)})")
            tokens.append(mine)
            prompts.append(prompt)
    if not ids:
        raise InputError("There is no fresh pair that all PMs can read; make the run with more prompts.")
    return HeldOut(ids, tokens, prompts)

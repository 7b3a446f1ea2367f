"""The PMs of a comparison, their SAEs, and the fresh pairs on which they meet.

A comes with a finished run. B is another PM of the same width that reads texts as the same tokens, with or without a run of
its own, or a base without a scalar head, of which only the stream can be read. *Fresh* pairs are those of the runs' measure
splits: on their prompts no SAE was trained, no feature chosen and none confirmed, in either run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations

import torch

from rmscope.errors import InputError
from rmscope.io import local_path
from rmscope.model.loading import is_base
from rmscope.model.reward_model import RewardModel
from rmscope.model.zoo import base_identity, load_base
from rmscope.pairs.pair import SIDES, Pair, share_a_prompt
from rmscope.run.inputs import PairSet, load_pm
from rmscope.run.run import Run
from rmscope.run.settings import RECORD
from rmscope.sae.base import Sae
from rmscope.studies.edit.patch import is_patch, load_edited


@dataclass(frozen=True)
class ComparedModel:
    """One of the compared PMs; ``identity`` is the content hash of its weights.

    A ``base`` has no scalar head, so its rewards mean nothing. A PM without a run has no SAEs and no reported features.
    """

    rm: RewardModel
    name: str
    identity: str
    base: bool = False
    saes: Mapping[str, Sae] = field(default_factory=dict)
    reported: Mapping[str, Sequence[int]] = field(default_factory=dict)
    run: Run | None = None

    @classmethod
    def of_run(cls, run: Run) -> ComparedModel:
        """The PM of a finished run, with its SAEs and reported features. InputError where the run is not finished."""
        reported = {site: run.reported(site)["feature"].to_list() for site in run.sites}
        return cls(run.rm, f"{run.config.model} (run {run.folder.name})", run.rm.identity, False, run.saes, reported, run)


@dataclass(frozen=True)
class Dictionary:
    """An SAE of A or of B (``of``: a or b), its reported features by rank, and the ``other`` PM's own SAE at the site."""

    of: str
    site: str
    sae: Sae
    reported: list[int]
    other: Sae | None = None


@dataclass(frozen=True)
class Comparison:
    """The PMs, and the fresh pairs that all of them read as the same tokens. Of controls only the reward is read."""

    a: ComparedModel
    b: ComparedModel
    pairs: PairSet
    controls: Sequence[ComparedModel] = ()

    @property
    def models(self) -> dict[str, ComparedModel]:
        """The PMs: a, b, and the controls c1, c2, ..."""
        return {"a": self.a, "b": self.b} | {f"c{i}": model for i, model in enumerate(self.controls, 1)}

    @cached_property
    def dictionaries(self) -> list[Dictionary]:
        """A's SAEs, then B's, each by depth."""
        return [
            Dictionary(of, site, model.saes[site], list(model.reported.get(site, [])), other.saes.get(site))
            for of, model, other in (("a", self.a, self.b), ("b", self.b, self.a))
            for site in sorted(model.saes, key=model.rm.site_index)
        ]


def open_other(run: Run, other: str) -> ComparedModel:
    """B as it is named: a run folder, a base, a patch of the PM of ``run``, or a PM."""
    if (local_path(other) / RECORD).is_file():
        return ComparedModel.of_run(Run.open(other, run.display, run.config.trust_remote_code))
    if is_base(other):  # it reads texts as the run's PM renders them
        model, tokenizer = load_base(base=other)
        rm = RewardModel(model.to(run.rm.device, run.rm.dtype), tokenizer, run.rm.rendering, other)
        return ComparedModel(rm, other, base_identity(other), base=True)
    if is_patch(other):
        rm = load_edited(load_pm(run.config.model, run.config), other)
    else:
        rm = RewardModel.load(other, run.config.dtype, run.config.device)
    return ComparedModel(rm, rm.name, rm.identity)


def open_control(run: Run, control: str, b: ComparedModel) -> ComparedModel:
    """A control, of which only the reward is read. InputError where it or B has no scalar head."""
    if b.base:
        raise InputError(f"{b.name} has no scalar head, so no effect can be held against a control; leave --control out.")
    model = open_other(run, control)
    if model.base:
        raise InputError(f"The control {model.name} has no scalar head; name another PM of A's kind.")
    return replace(model, saes={}, reported={}, run=None)


def check_match(a: ComparedModel, b: ComparedModel) -> None:
    """InputError where B cannot be compared with A: it has another width or rendering, or lacks a site."""
    if a.rm.d_model != b.rm.d_model:
        raise InputError(
            f"{b.name} has a stream of width {b.rm.d_model}, {a.name} one of {a.rm.d_model}, so no SAE reads both; "
            "name a PM of the same model."
        )
    for model, other in ((a, b), (b, a)):
        for site in model.saes:
            if model.rm.site_index(site) >= len(other.rm.blocks):
                raise InputError(
                    f"{other.name} has {len(other.rm.blocks)} blocks and no {site}, where {model.name} has an SAE; compare "
                    "runs whose sites both PMs have."
                )
    if a.rm.rendering != b.rm.rendering:
        raise InputError(
            f"{a.name} reads conversations as {a.rm.rendering.as_dict()}, {b.name} as {b.rm.rendering.as_dict()}, so they "
            "share no text; give one of them the other's rendering in rmscope.json."
        )


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


def hold_out(
    a: ComparedModel, b: ComparedModel, pairs: Sequence[Pair], controls: Sequence[ComparedModel] = ()
) -> Comparison:
    """The comparison on those of the pairs that all PMs can read; an id that two runs use for two pairs gets a number.

    Raises:
        InputError: the PMs do not match, read a text as different tokens, or no pair is left.
    """
    comparison = Comparison(a, b, PairSet([], []), controls)
    models, held_out = list(comparison.models.values()), comparison.pairs
    for one, other in combinations(models, 2):
        check_match(one, other)
    for pair, *read in zip(pairs, *(model.rm.tokenize_all(pairs) for model in models), strict=True):
        for model, tokens in zip(models, read, strict=True):
            if not all(torch.equal(tokens.side(s), read[0].side(s)) for s in SIDES):
                raise InputError(
                    f"{model.name} reads the pair {pair.id} as other tokens than {a.name}: its tokenizer is another one; "
                    "name a PM that kept the tokenizer."
                )
        if all(model.rm.fits(read[0]) for model in models) and not torch.equal(read[0].chosen, read[0].rejected):
            taken = any(p.id == pair.id for p in held_out.pairs)
            held_out.pairs.append(replace(pair, id=f"{pair.id} ({len(held_out.pairs)})") if taken else pair)
            held_out.tokens.append(read[0])
    if not held_out.pairs:
        raise InputError("There is no fresh pair that all PMs can read; make the run with more prompts.")
    return comparison

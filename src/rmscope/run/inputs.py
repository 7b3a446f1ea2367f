"""What is studied: a PM, and the pairs that it can read, with their tokens, prompts and splits."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from rmscope.effects.written import WRITTEN_PAIRS, WrittenShare, written_shares
from rmscope.errors import InputError
from rmscope.model import checks
from rmscope.model.judge import load_judge
from rmscope.model.rendering import PairTokens, can_render, changed_responses
from rmscope.model.reward_model import RewardModel
from rmscope.model.site_names import BOTH, DIFF
from rmscope.pairs.pair import Pair, Split, check_pairs, one_per_prompt, split_of
from rmscope.pairs.readers import ReadReport, load_pairs
from rmscope.run.settings import RunConfig
from rmscope.settings import LoadSettings, ReadSettings

T = TypeVar("T")
TIED = "the same tokens on both sides"
"""Why a pair is left out whose sides differ only in what the rendering cuts or trims."""
PROPOSED = 3
"""Blocks that are studied first where the settings name no sites: most of what was written is still at its own tokens."""


@dataclass(frozen=True)
class PairSet:
    """Pairs and their tokens, in one order; all indices are places in it."""

    pairs: list[Pair]
    tokens: list[PairTokens]

    @cached_property
    def ids(self) -> list[str]:
        return [p.id for p in self.pairs]

    @cached_property
    def index(self) -> dict[str, int]:
        """The place of each pair id."""
        return {id_: i for i, id_ in enumerate(self.ids)}

    @cached_property
    def prompts(self) -> dict[str, str]:
        """The prompt key of each pair id."""
        return {p.id: p.prompt_key for p in self.pairs}

    @cached_property
    def splits(self) -> list[Split]:
        return [split_of(p) for p in self.pairs]

    def of_split(self, split: Split) -> list[int]:
        """The places of a split's pairs."""
        return [i for i, s in enumerate(self.splits) if s == split]

    def one_per_prompt(self, places: Sequence[int], most: int) -> list[int]:
        """At most ``most`` of the places, a second one of a prompt only after every prompt has one; in file order."""
        return [places[i] for i in one_per_prompt([self.pairs[i].prompt_key for i in places], most)]

    def only(self, places: Sequence[int]) -> PairSet:
        return PairSet([self.pairs[i] for i in places], [self.tokens[i] for i in places])


def load_pm(model: str, settings: LoadSettings) -> RewardModel:
    """A PM as the settings of a command say."""
    s = settings
    given: dict[str, Any] = {"adapter": s.adapter, "revision": s.revision, "base": s.base}
    given["trust_remote_code"] = s.trust_remote_code
    if s.judge is None:
        return RewardModel.load(model, s.dtype, s.device, output=s.output, **given)
    if s.output is not None:
        raise InputError("A judge has one output, the difference of two logits; leave --output out, or --judge.")
    return load_judge(model, s.judge, s.question.replace("\\n", "\n"), s.dtype, s.device, **given)


class Inputs:
    """A PM and pairs, each loaded on first use."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.read_report = ReadReport()
        self.left_out: Counter[str] = Counter()
        """Why pairs are not scored, and how many."""
        self.why_no_base = ""
        """Why the base that the PM's card names could not be used."""

    @classmethod
    def of(cls, model: str, data: str, settings: LoadSettings) -> Inputs:
        """A PM and pairs without a run folder, loaded and read as the settings of a command say."""
        kinds = [kind for kind in (LoadSettings, ReadSettings) if isinstance(settings, kind)]
        shared = {name: getattr(settings, name) for kind in kinds for name in kind.model_fields}
        return cls(RunConfig(model=model, data=data, out=Path(), **shared))

    @cached_property
    def rm(self) -> RewardModel:
        return load_pm(self.config.model, self.config)

    @cached_property
    def all_pairs(self) -> list[Pair]:
        """The pairs as they were read. InputError where there are none, or an id stands twice."""
        c = self.config
        pairs = load_pairs(
            c.data,
            split=c.split,
            revision=c.data_revision,
            limit=c.limit,
            columns=c.columns,
            form=c.format,
            on_bad_row=c.on_bad_row,
            report=self.read_report,
        )
        check_pairs(pairs)
        return pairs

    @cached_property
    def scored(self) -> PairSet:
        """Pairs within the PM's context and ``max_tokens`` whose sides differ in tokens: those that are scored."""
        pairs = self.all_pairs  # bad data is told before the PM is loaded
        if self.config.on_bad_row == "skip":
            pairs = [p for p in pairs if self._takes(p)]
        tokens, most = self.rm.tokenize_all(pairs), self.config.max_tokens or sys.maxsize
        fits = [self.rm.fits(t) and t.longest <= most for t in tokens]
        ties = [torch.equal(t.chosen, t.rejected) for t in tokens]
        self.left_out[f"longer than {self.longest}"] = fits.count(False)
        self.left_out[TIED] = sum(fit and tie for fit, tie in zip(fits, ties, strict=True))
        places = [i for i in range(len(pairs)) if fits[i] and not ties[i]]
        if not places:
            reasons = ", ".join(f"{n} are {why}" for why, n in self.left_out.items() if n) or "its rendering refuses them"
            raise InputError(
                f"None of the {len(self.all_pairs)} pairs of {self.config.data} can be scored ({reasons}); give others."
            )
        return PairSet(pairs, tokens).only(places)

    def _takes(self, pair: Pair) -> bool:
        """Whether the PM's rendering takes a pair; one that it refuses is counted as skipped."""
        takes = can_render(self.rm.rendering, self.rm.tokenizer, pair)
        if not takes:
            self.read_report.skipped.append((pair.id, "the PM's rendering refuses its conversation"))
        return takes

    @cached_property
    def changed(self) -> int:
        """The number of responses that the PM's chat template cuts or trims."""
        return len(changed_responses(self.rm.rendering, self.rm.tokenizer, self.scored.pairs))

    @property
    def notes(self) -> list[str]:
        """What one should know of the PM and the pairs before rewards are read."""
        _ = self.scored
        told = [f"{n} pairs are left out: {why}" for why, n in self.left_out.items() if n]
        told += [f"the chat template cuts or trims {self.changed} responses"] if self.changed else []
        return [*checks.notes(self.rm), *told]

    @property
    def longest(self) -> str:
        """How long a side may be, in words."""
        most, context = self.config.max_tokens, self.rm.context
        return f"max_tokens = {most}" if most and most < context else f"the PM's context of {context} tokens"

    @cached_property
    def sites(self) -> list[str]:
        """The sites that are studied: those of the settings, else those of its ``study``.

        Raises:
            InputError: the PM does not have one of them, or the difference is asked for and the PM's base is not known.
        """
        sites = self.config.sites or self._sites_of_study()
        for site in sites:
            self.rm.site_index(site)
        return sites

    @cached_property
    def written_shares(self) -> list[WrittenShare]:
        """How much of Δr training wrote up to each block, on some fit pairs; empty where the PM's base is not known."""
        try:
            if self.rm.base is None:
                return []
        except InputError as error:
            if self.config.base is not None:
                raise
            self.why_no_base = str(error)
            return []
        fit = self.scored.of_split("fit") or list(range(len(self.scored.pairs)))
        chosen = self.scored.one_per_prompt(fit, WRITTEN_PAIRS)
        return written_shares(self.rm, [self.scored.tokens[i] for i in chosen])

    def _sites_of_study(self) -> list[str]:
        study = self.config.study
        if study == "whole":
            return self.rm.default_sites
        shares = sorted(self.written_shares, key=lambda w: -w.priority)
        if study == "difference" and not shares:
            reason = self.why_no_base or f"{self.rm.name} names none"
            raise InputError(f"The difference from the PM's base cannot be studied ({reason.rstrip('.')}); give --base.")
        if not shares:
            return self.rm.default_sites
        first = sorted(w.block for w in shares[: min(PROPOSED, self.config.blocks)])
        others = sorted(w.block for w in shares if w.block not in first)
        blocks = sorted(first + evenly(others, self.config.blocks - len(first)))
        with_base = {first[0], first[-1]} if study == "both" else set[int]()
        return [f"{BOTH if block in with_base else DIFF}.{block}" for block in blocks]


def evenly(values: Sequence[T], most: int) -> list[T]:
    """At most ``most`` of the values, at even distances, the first and the last among them."""
    return [values[i] for i in np.unique(np.linspace(0, len(values) - 1, min(most, len(values))).round().astype(int))]


def need_prompts(pairs: PairSet, data: str) -> None:
    """InputError where the splits hold too few prompts: selection, test and measurement each need prompts of their own."""
    counts = {s: len({pairs.pairs[i].prompt_key for i in pairs.of_split(s)}) for s in ("fit", "confirm", "measure")}
    if min(counts.values()) < 2:
        raise InputError(
            f"{data} has too few different prompts to split (fit {counts['fit']}, confirm {counts['confirm']}, measure "
            f"{counts['measure']}); give at least some 20 prompts."
        )

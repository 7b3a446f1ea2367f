"""What is studied: a PM, the pairs that fit it, their tokens, prompts and splits."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cached_property

import torch

from rmscope.errors import InputError
from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.check import check_pairs
from rmscope.pairs.pair import Pair, split_of
from rmscope.pairs.readers import ReadReport, load_pairs
from rmscope.run.settings import RunConfig


class Study:
    """A PM and pairs, each loaded on first use."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    @cached_property
    def rm(self) -> RewardModel:
        c = self.config
        return RewardModel.load(
            c.model, c.dtype, c.device, adapter=c.adapter, output=c.output, trust_remote_code=c.trust_remote_code
        )

    @cached_property
    def read_report(self) -> ReadReport:
        return ReadReport()

    @cached_property
    def all_pairs(self) -> list[Pair]:
        c = self.config
        pairs = load_pairs(
            c.data,
            split=c.split,
            limit=c.limit,
            columns=c.columns,
            form=c.format,
            on_bad_row=c.on_bad_row,
            report=self.read_report,
        )
        check_pairs(pairs)
        return pairs

    @cached_property
    def scored(self) -> list[tuple[Pair, PairTokens]]:
        """Pairs within the PM's context and ``max_tokens`` whose sides differ in tokens: those that are scored."""
        tokens, most = self.rm.tokenize_all(self.all_pairs), self.config.max_tokens or sys.maxsize
        kept = [
            (p, t)
            for p, t in zip(self.all_pairs, tokens, strict=True)
            if self.rm.fits(t) and max(len(t.chosen), len(t.rejected)) <= most and not torch.equal(t.chosen, t.rejected)
        ]
        if not kept:
            raise InputError(f"Every pair of {self.config.data} is longer than {self.longest}; use shorter texts.")
        return kept

    @property
    def longest(self) -> str:
        """How long a side may be, in words."""
        most, context = self.config.max_tokens, self.rm.context
        return f"max_tokens = {most}" if most and most < context else f"the PM's context of {context} tokens"

    @cached_property
    def studied(self) -> list[tuple[Pair, PairTokens]]:
        """The scored pairs; in a run, those of them that its filter on |Δr| keeps."""
        return self.scored

    @property
    def pairs(self) -> list[Pair]:
        return [p for p, _ in self.studied]

    @cached_property
    def tokens(self) -> list[PairTokens]:
        return [t for _, t in self.studied]

    @cached_property
    def ids(self) -> list[str]:
        return [p.id for p in self.pairs]

    @cached_property
    def index(self) -> dict[str, int]:
        return {id_: i for i, id_ in enumerate(self.ids)}

    @cached_property
    def prompts(self) -> dict[str, str]:
        """The prompt of every scored pair."""
        return {p.id: str(p.meta.get("group", p.first_human_turn())) for p, _ in self.scored}

    @cached_property
    def splits(self) -> list[str]:
        return [split_of(p) for p in self.pairs]

    def of_split(self, split: str) -> list[int]:
        return [i for i, s in enumerate(self.splits) if s == split]

    @cached_property
    def sites(self) -> list[str]:
        sites = self.config.sites or self.rm.default_sites
        for site in sites:
            self.rm.site_index(site)
        return sites

    def need_prompts(self) -> None:
        """Selection, proof and measurement need prompts of their own."""
        counts = {s: len({self.prompts[self.ids[i]] for i in self.of_split(s)}) for s in ("fit", "confirm", "measure")}
        if min(counts.values()) < 2:
            raise InputError(
                f"{self.config.data} has too few different prompts to split (fit {counts['fit']}, confirm "
                f"{counts['confirm']}, measure {counts['measure']}); give at least some 20 prompts."
            )

    def one_a_prompt(self, items: Sequence[int], most: int) -> list[int]:
        """At most ``most`` pairs, a second one of a prompt only after every prompt has one; in file order."""
        turn: dict[str, int] = {}
        keyed = []
        for i in items:
            prompt = self.prompts[self.ids[i]]
            keyed.append((turn.get(prompt, 0), i))
            turn[prompt] = turn.get(prompt, 0) + 1
        return sorted(i for _, i in sorted(keyed)[:most])

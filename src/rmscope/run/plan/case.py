"""A run that is planned: its settings with the sizes of its PM, its pairs, its sites and its SAEs.

What a run only learns on its way is taken from runs that were measured: how often features fire, how many concepts are
reported, how far from each other the responses are on which features are ablated. These are the constants below.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import ceil, exp

from rmscope.effects.ablation import BATCH_TOKENS, ROW_TOKENS
from rmscope.errors import InputError
from rmscope.model.packing import UNIT
from rmscope.model.reward_model import TOKEN_BUDGET
from rmscope.model.site_names import BOTH, DIFF, all_parts, is_difference, needs_base, parts_of, whole_site
from rmscope.run.inputs import PROPOSED, evenly
from rmscope.run.plan.shape import Lengths, Shape
from rmscope.run.plan.work import Work, text_flops
from rmscope.run.settings import RunConfig
from rmscope.run.size import SIZES

FILLED = 0.75
"""How full batches are: few pairs fit one, and pairs differ in length."""
READ_BLOCK = 0.9
"""The share of the last block that is left out, since it runs for the read position alone (without ``ragged``: none)."""
ACTIVE = 0.65
"""Features that fire in a response, as a share of those that would fire if all fired alike (34 of 52, zoo:planted; 130 were
planned and 134 fired at both.4 of zoo:hh)."""
RARE, RARE_CONCEPT = 10.0, 5.0
"""How many times further than the average one the rarer features, or concepts, walk through the responses: for 10 firings of
each feature 156 of 504 responses were reached, for 30 prompts of each concept 215 of 528 (zoo:planted)."""
ELSEWHERE = 0.25
"""How far from the average site towards the first one the ablation of a concept begins, since some are at several sites."""
SIDES = 1.45
"""Sides of a pair on which a feature fires, if it fires on one (1.44 and 1.50, zoo:planted; 1.3 to 1.6, zoo:hh)."""


@dataclass(frozen=True)
class Case:
    """Sizes of everything that a run works on."""

    config: RunConfig
    pm: Shape
    data: Lengths

    @cached_property
    def sites(self) -> list[str]:
        """The sites of the settings. Else those of the setting ``study``. Where a run would choose blocks by their rewards,
        the ones in the middle of the trained blocks stand for those that it studies first (so it was in both zoo PMs)."""
        if self.config.sites:
            return self.config.sites
        blocks, first = self.pm.blocks, self.pm.first
        if self.config.study == "whole" or first is None:
            if self.config.study == "difference":
                raise InputError("The difference from the PM's base cannot be planned: none is named; give --base.")
            return [f"resid_post.{i}" for i in sorted({max(0, round(blocks * share) - 1) for share in (1 / 3, 2 / 3)})]
        trained, most = range(first, blocks), self.config.blocks
        start = max(0, (len(trained) - 1) // 2 - PROPOSED // 2)
        middle = list(trained[start : start + min(PROPOSED, most)])
        others = [block for block in trained if block not in middle]
        chosen = sorted(middle + evenly(others, most - len(middle)))
        with_base = {middle[0], middle[-1]} if self.config.study == "both" else set[int]()
        return [f"{BOTH if block in with_base else DIFF}.{block}" for block in chosen]

    @cached_property
    def parts(self) -> list[str]:
        return all_parts(self.sites)

    @cached_property
    def trained(self) -> list[str]:
        """The parts whose SAEs the run trains."""
        source = self.config.sae_dir
        return [p for p in self.parts if not source or (is_difference(p) and "{L}" in source)]

    @property
    def ledger_sites(self) -> list[str]:
        if self.config.sites:
            return self.sites
        return [site for site in self.sites if site.startswith(BOTH)] or evenly(self.sites, 3)

    def block(self, site: str) -> int:
        """The block after which a site is; -1 for ``embed``. InputError where the PM has no such block."""
        kind, _, name = whole_site(site).rpartition(".")
        if site != "embed" and kind != "resid_post":
            raise InputError(f"There is no site {site!r}; a plan knows embed, resid_post.N, diff.N, base.N and both.N.")
        number = -1 if site == "embed" else int(name) if name.isdecimal() else self.pm.blocks
        if number >= self.pm.blocks or (needs_base(site) and (self.pm.first is None or number < self.pm.first)):
            raise InputError(f"There is no site {site!r} in this PM of {self.pm.blocks} blocks; name others.")
        return number

    @cached_property
    def last(self) -> int:
        """The last block that a forward to all sites runs."""
        return max(self.block(site) for site in self.sites)

    @cached_property
    def of_base(self) -> int:
        """Blocks of the base that run beside it."""
        has_parts = any(needs_base(site) for site in self.sites)
        return self.last - self.pm.first + 1 if has_parts and self.pm.first is not None else 0

    def after(self, site: str) -> int:
        """Blocks after a site."""
        return self.pm.blocks - 1 - self.block(site)

    @property
    def after_concepts(self) -> float:
        """Blocks after the first site of a concept, on average."""
        average = sum(map(self.after, self.sites)) / len(self.sites)
        return average + ELSEWHERE * (max(map(self.after, self.sites)) - average)

    # SAEs

    def features(self, part: str) -> int:
        """Features of the SAE of a part. Difference SAEs whose number is chosen are taken to have the middle one."""
        if is_difference(part):
            return self.config.diff_features or SIZES[len(SIZES) // 2]
        return self.config.sae.features(self.pm.d, round(self.data.stored))

    def per_token(self, part: str) -> float:
        """Features of a part that fire on a token."""
        if is_difference(part):
            return self.config.diff_k
        return self.config.sae.k_for(self.features(part), self.pm.d)

    def of_site(self, site: str) -> int:
        return sum(map(self.features, parts_of(site)))

    def active(self, site: str) -> float:
        """Features of a site that fire in a response."""
        return sum(
            ACTIVE * m * (1 - exp(-self.per_token(part) * self.data.span / m))
            for part in parts_of(site)
            if (m := self.features(part))
        )

    def rate(self, site: str) -> float:
        """The share of responses in which a feature of a site fires."""
        return min(1.0, self.active(site) / self.of_site(site))

    def rest(self, site: str) -> float:
        """The share of a response that an ablation runs: of n firings at random places the first is at 1 / (n + 1)."""
        firings = sum(map(self.per_token, parts_of(site))) * self.data.span / max(self.active(site), 1e-9)
        return firings / (firings + 1)

    @property
    def rest_concepts(self) -> float:
        """The same of a concept."""
        return sum(map(self.rest, self.sites)) / len(self.sites)

    # Work of the PM

    def batches(self, pairs: float, blocks: int | None = None, kind: str = "forward") -> Work:
        """A forward of pairs in batches: of the PM alone, or (``blocks`` None) to the last site, with the base."""
        own = self.last + 1 + self.of_base if blocks is None else blocks
        tokens = pairs * self.data.packed
        flops = text_flops(self.pm, tokens, self.data.packed, own)
        return Work(**{kind: flops}, calls=own * max(tokens / TOKEN_BUDGET, pairs / UNIT) / FILLED)

    def encoding(self, tokens: float, sites: list[str] | None = None) -> Work:
        """The features of some tokens at each of the sites."""
        return Work(encode=sum(2 * tokens * self.pm.d * self.of_site(site) for site in sites or self.sites))

    def clean_runs(self, pairs: float, sides: float = 2.0) -> Work:
        """Clean runs of both sides of a pair or one: the second side takes the prefix from the first, not in the base."""
        data = self.data
        tokens = data.side + (sides - 1) * data.span if self.pm.resumes else sides * 2 * data.side
        flops = text_flops(self.pm, tokens, data.side, self.pm.blocks)
        flops += text_flops(self.pm, sides * data.side, data.side, self.of_base)
        calls = sides * (self.pm.blocks + self.of_base)
        return pairs * (Work(forward=flops, calls=calls) + self.encoding(sides * data.span))

    def ablations(self, n: float, after: float, responses: float, share: float) -> Work:
        """n ablations with so many blocks after the site, on so many responses, of each the ``share`` from the first firing
        on. A PM that cannot be resumed runs the whole text, through all blocks unless it can skip some."""
        data, pm = self.data, self.pm
        if not pm.resumes:
            blocks, rows = (after, max(1.0, BATCH_TOKENS / data.side)) if pm.skips else (pm.blocks, 1.0)
            return Work(ablation=n * text_flops(pm, data.side, data.side, blocks), calls=n / rows * blocks)
        blocks = max(0.0, after - READ_BLOCK) if pm.ragged else after
        tokens = n * data.span * share
        calls = max(tokens / ROW_TOKENS, min(n, responses)) * (after + 1)
        return Work(ablation=text_flops(pm, tokens, data.side, blocks), calls=calls)

    def gradients(self, pairs: float, nodes: float, after: float) -> Work:
        """Forward and backward from a site on, at so many points of the stream."""
        tokens = nodes * pairs * self.data.packed
        flops = text_flops(self.pm, tokens, self.data.packed, after)
        return Work(forward=flops, gradient=flops, calls=2 * after * tokens / TOKEN_BUDGET / FILLED)

    def spread(self, pool: float, each: float, rate: float, rare: float = RARE) -> float:
        """How many of ``pool`` are reached if every feature takes the first ``each`` of them in which it fires."""
        return pool * (1 - exp(-rare * each / max(rate, 1e-9) / pool)) if pool else 0.0


def pairs_of(responses: float, pairs: float) -> float:
    """Pairs of which at least one side is among some responses, of 2 ``pairs``."""
    share = min(1.0, responses / (2 * pairs)) if pairs else 0.0
    return pairs * (1 - (1 - share) ** 2)


def parts_in(pairs: float) -> int:
    """Units of 64 pairs."""
    return max(1, ceil(pairs / UNIT))

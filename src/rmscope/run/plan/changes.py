"""Changes of a run that make it smaller, each tried by planning the run again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from rmscope.model.reward_model import NO_BASE
from rmscope.model.site_names import is_difference, needs_base
from rmscope.run.inputs import evenly
from rmscope.run.plan.cards import CARDS, Devices, devices_of_card
from rmscope.run.plan.case import Case
from rmscope.run.plan.memory import USABLE, stage_bytes
from rmscope.run.plan.stages import FORMULAS
from rmscope.run.stages import STAGES

SHARED = {stage.name for stage in STAGES if stage.is_shared}
"""The stages that ranks share; the first one does the others."""
FEWEST = 500
"""Pairs below which none are left out."""


@dataclass(frozen=True)
class Setup:
    """A run and the devices that it runs on."""

    case: Case
    devices: Devices

    def seconds(self, stage: str) -> float:
        """How long a stage takes."""
        ranks = self.devices.count if stage in SHARED else 1
        return FORMULAS[stage](self.case).seconds(self.devices.rates, ranks)

    def bytes(self, stage: str) -> float:
        """The memory that a stage takes of one device."""
        return stage_bytes(self.case, stage, self.devices.count, self.devices.is_cpu)

    @property
    def total_seconds(self) -> float:
        return sum(map(self.seconds, FORMULAS))

    @property
    def peak(self) -> float:
        return max(map(self.bytes, FORMULAS))

    @property
    def fits(self) -> bool:
        return self.peak <= USABLE * self.devices.memory

    @property
    def cost(self) -> float:
        """Device seconds."""
        return self.total_seconds * self.devices.count


Change = tuple[str, Callable[[Setup], Setup]]
"""What is changed, as one would write it, and the change itself."""


def _with(**settings: Any) -> Callable[[Setup], Setup]:
    def change(setup: Setup) -> Setup:
        config = setup.case.config.model_copy(update=settings)
        return replace(setup, case=replace(setup.case, config=config))

    return change


def changes(setup: Setup) -> Iterator[Change]:
    """Every change that can be made to a run."""
    case, devices, c = setup.case, setup.devices, setup.case.config
    if c.dtype == "float32" and not c.reward_aware:
        yield "dtype: bfloat16", _in_bfloat16
    if len(case.sites) > 1:
        half = len(case.sites) // 2
        yield f"sites: {half} of {len(case.sites)}", _with(sites=evenly(case.sites, half))
    if any(needs_base(site) for site in case.sites) and not c.sites:
        yield "base: none", _without_base
    for part in (part for part in case.trained if not is_difference(part) and not c.sae.prefixes):
        m = case.features(part) // 2
        yield f"d_sae: {m}", _with(sae=c.sae.model_copy(update={"d_sae": m, "k": None}))
        break
    if case.data.studied > FEWEST:
        fewer = max(FEWEST, min(2000, case.data.studied // 2))
        yield f"top_pairs: {fewer}", _studying(fewer)
        yield f"limit: {case.data.scored // 2}", _scoring(case.data.scored // 2)
    if (c.estimate_pairs or case.data.fit) > FEWEST:
        yield f"estimate_pairs: {FEWEST}", _with(estimate_pairs=FEWEST)
    for name in ("screen", "confirm_prompts", "feature_prompts", "measure_prompts", "null_prompts"):
        if (value := getattr(c, name) // 2) > 0:
            yield f"{name}: {value}", _with(**{name: value})
    if c.seeds > 1:
        yield "seeds: 1", _with(seeds=1)
    if c.ledger_pairs:
        yield "ledger_pairs: 0", _with(ledger_pairs=0)
    if devices.is_listed:
        yield f"devices: {2 * devices.count}x{devices.name}", lambda s: replace(s, devices=s.devices.times(2))
        for name, card in CARDS.items():
            if card.memory > devices.memory:
                yield f"devices: {devices.count}x{name}", _on(name)


def _in_bfloat16(setup: Setup) -> Setup:
    """On cards also their rate; this machine's was timed in float32, which stands for both."""
    changed = _with(dtype="bfloat16")(setup)
    return _on(setup.devices.name)(changed) if setup.devices.is_listed else changed


def _on(name: str) -> Callable[[Setup], Setup]:
    def change(setup: Setup) -> Setup:
        return replace(setup, devices=devices_of_card(f"{setup.devices.count}x{name}", setup.case.config.dtype))

    return change


def _without_base(setup: Setup) -> Setup:
    case = setup.case
    config = case.config.model_copy(update={"base": NO_BASE, "study": "whole"})
    return replace(setup, case=Case(config, replace(case.pm, first=None, base_weights=0), case.data))


def _studying(pairs: int) -> Callable[[Setup], Setup]:
    def change(setup: Setup) -> Setup:
        case = setup.case
        config = case.config.model_copy(update={"top_pairs": pairs})
        return replace(setup, case=Case(config, case.pm, case.data.studying(pairs)))

    return change


def _scoring(pairs: int) -> Callable[[Setup], Setup]:
    def change(setup: Setup) -> Setup:
        case, data = setup.case, setup.case.data
        fewer = data.studying(min(data.studied, max(1, data.studied * pairs // data.scored)))
        config = case.config.model_copy(update={"limit": pairs})
        return replace(setup, case=Case(config, case.pm, replace(fewer, scored=pairs)))

    return change


def tried(setup: Setup) -> list[tuple[str, Setup]]:
    """Each change alone, the fastest first."""
    return sorted(((name, change(setup)) for name, change in changes(setup)), key=lambda found: found[1].total_seconds)


def best_change(setup: Setup, alone: list[tuple[str, Setup]]) -> tuple[str, Setup] | None:
    """Of a run that fits, the change that shortens it most. Else the one with which it fits in the fewest device seconds, or
    two changes where none alone is enough; None where no two are."""
    fitting = [found for found in alone if found[1].fits]
    if setup.fits:
        shorter = [found for found in fitting if found[1].total_seconds < setup.total_seconds]
        return min(shorter, key=lambda found: found[1].total_seconds, default=None)
    if not fitting:
        both = ((f"{a}, {b}", second(first(setup))) for (a, first), (b, second) in combinations(changes(setup), 2))
        fitting = [found for found in both if found[1].fits]
    return min(fitting, key=lambda found: found[1].cost, default=None)

"""The lists of phrases: searched on one set of prompts, and fixed before any measured prompt is looked at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pydantic import BaseModel

from rmscope.io import Display, Progress, silent
from rmscope.studies.jailbreak.inputs import Inputs
from rmscope.studies.jailbreak.mediation import Mediators, choose_mediators
from rmscope.studies.jailbreak.phrases import Phrase, blind_phrases, features_without_effect, mine_phrases
from rmscope.studies.jailbreak.placement import Layout, Placement
from rmscope.studies.jailbreak.scorer import TracePoint
from rmscope.studies.jailbreak.search import SearchResult, search
from rmscope.studies.jailbreak.targets import Target

FEATURES_PER_SITE = 20
"""Reported features for which phrases are mined, the strongest of each site."""
PHRASES = 48
"""Phrases with which a search starts."""
SUCCESS = 0.9
"""A search has its list once this outranks the chosen answer on so large a share of the targets."""

NO_PHRASE, FEATURES, BLIND, WITHOUT_EFFECT, SHUFFLED = "no phrase", "features", "blind", "without effect", "shuffled"
FLIP_SUFFIX, OWN_SUFFIX = ", tokens flipped", ", own list"
"""Added to an arm's name after the token-level pass, and for lists that are searched for each prompt alone."""
SEARCHED_ARMS = (FEATURES, BLIND, WITHOUT_EFFECT)
"""The arms whose list is searched, each with and without the token-level pass."""


@dataclass(frozen=True, slots=True)
class SearchFigures:
    """What a search took and reached on its own targets."""

    evaluations: int
    flip_evaluations: int
    """Evaluations of the token-level pass, not counted in ``evaluations``."""
    needed: int | None
    """Evaluations until the list outranked the chosen answer on :data:`SUCCESS` of the targets."""
    success: float
    """Share of the targets on which the list outranks the chosen answer."""
    trace: list[TracePoint]


class PhraseLists(BaseModel):
    """All that is fixed by the search."""

    lists: dict[str, Layout]
    """The list of each arm that has one list for all prompts."""
    pools: dict[str, tuple[Placement, ...]]
    """The placements of each search from which lists for single prompts are composed."""
    searches: dict[str, SearchFigures]
    named: Mediators | None
    """The features whose mediation is measured; None where none mediates any of the gain."""


def make_phrase_lists(inputs: Inputs, targets: Sequence[Target], budget: int, seed: int, display: Display) -> PhraseLists:
    """The lists, their controls and the mediators, all from the search's targets.

    1. Mines phrases where reported features that raise the reward fire hardest.
    2. Searches a list among them.
    3. Searches, with as many evaluations, among phrases drawn blind to features and among those of features without effect.
    4. Chooses the mediators of the first list's gain over the last.
    """
    with display.stage("mine") as progress:
        strongest = {site: list(up)[:FEATURES_PER_SITE] for site, up in inputs.up.items()}
        mined = _mine(inputs, strongest, PHRASES, progress)
    results: dict[str, SearchResult] = {}
    with display.stage(FEATURES) as progress:
        results[FEATURES] = search(inputs.rm, targets, [mined], budget, progress=progress)
    controls = {
        BLIND: blind_phrases(inputs.rm, inputs.pairs, mined, seed),
        WITHOUT_EFFECT: _phrases_without_effect(inputs, strongest, len(mined), seed),
    }
    for arm, pools in controls.items():
        with display.stage(arm) as progress:
            results[arm] = search(inputs.rm, targets, pools, budget, results[FEATURES].evaluations, progress)
    lists: dict[str, Layout] = {NO_PHRASE: ()}
    for arm in SEARCHED_ARMS:
        lists |= {arm: results[arm].layout, arm + FLIP_SUFFIX: results[arm].flipped}
    with display.stage("mediators"):
        named = choose_mediators(inputs.rm, inputs.saes, targets, lists[FEATURES], lists[WITHOUT_EFFECT], inputs.reported)
    return PhraseLists(
        lists=lists,
        pools={arm: results[arm].pool for arm in SEARCHED_ARMS},
        searches={arm: _figures(result, targets) for arm, result in results.items()},
        named=named,
    )


def _mine(inputs: Inputs, features: Mapping[str, Sequence[int]], most: int, progress: Progress) -> list[Phrase]:
    i = inputs
    return mine_phrases(i.rm, i.saes, i.store, i.pairs, i.tokens, features, most, progress)


def _phrases_without_effect(inputs: Inputs, up: Mapping[str, Sequence[int]], most: int, seed: int) -> Iterator[list[Phrase]]:
    """Phrases of features without effect, pool after pool, while there are such features."""
    draws = {site: features_without_effect(inputs.means[site], js, inputs.bound, seed) for site, js in up.items()}
    while True:
        features = {site: next(drawn, []) for site, drawn in draws.items()}
        if not any(features.values()):
            return
        yield _mine(inputs, features, most, silent)


def _figures(result: SearchResult, targets: Sequence[Target]) -> SearchFigures:
    return SearchFigures(
        evaluations=result.evaluations,
        flip_evaluations=result.flip_evaluations,
        needed=result.needed(SUCCESS),
        success=float((result.rewards > [t.chosen for t in targets]).mean()),
        trace=result.trace,
    )

"""Measures the lists: the reward of every target with each arm's phrases, alone and with features ablated."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import polars as pl

from rmscope.io import Progress, silent
from rmscope.model.reward_model import RewardModel
from rmscope.studies.jailbreak.inputs import Inputs
from rmscope.studies.jailbreak.mediation import Mediators, ablated_rewards, response_of
from rmscope.studies.jailbreak.phrase_lists import BLIND, FEATURES, OWN_SUFFIX, SHUFFLED, PhraseLists
from rmscope.studies.jailbreak.phrases import Phrase, count_tokens, shuffle_phrases
from rmscope.studies.jailbreak.placement import Layout, Placement, cost, place
from rmscope.studies.jailbreak.scorer import Scorer
from rmscope.studies.jailbreak.search import compose
from rmscope.studies.jailbreak.targets import Target

OWN_LISTS = 24
"""Measured prompts for which lists of their own are searched too."""
SCHEMA: dict[str, type[pl.DataType] | pl.DataType] = {
    "key": pl.String, "pair": pl.String, "kind": pl.String, "arm": pl.String, "text": pl.String, "tokens": pl.Int32,
    "evaluations": pl.Int32, "reward": pl.Float64, "chosen": pl.Float64, "rejected": pl.Float64, "outranks": pl.Boolean,
    "without": pl.Float64, "matched": pl.List(pl.Float64),
}  # fmt: skip
"""Columns of the table of measurements."""


class Measurement(NamedTuple):
    """One measured prompt in one arm. Rewards are in the PM's units."""

    key: str
    """The prompt."""
    pair: str
    kind: str
    """Which kind of bad text it is."""
    arm: str
    text: str
    tokens: int
    """Tokens of the phrases."""
    evaluations: int
    """Rewards that the search for this prompt alone took; 0 where the list is the same for all prompts."""
    reward: float
    chosen: float
    rejected: float
    outranks: bool
    """Whether the reward is above that of the chosen answer."""
    without: float
    """The reward with the mediators ablated."""
    matched: list[float]
    """The reward with each matched set ablated."""


def measure_lists(
    inputs: Inputs,
    phrase_lists: PhraseLists,
    targets: Sequence[Target],
    own: int,
    budget: int,
    seed: int,
    progress: Progress = silent,
) -> pl.DataFrame:
    """One row per target and arm, with the columns of :class:`Measurement`.

    The first ``own`` targets are also measured with lists that are searched for each of them alone.
    """
    rows: list[Measurement] = []
    for done, target in enumerate(targets):
        arms: dict[str, tuple[Layout, int]] = {arm: (layout, 0) for arm, layout in phrase_lists.lists.items()}
        arms[SHUFFLED] = (_shuffle(inputs.rm, phrase_lists.lists[FEATURES], f"{seed}/{target.key}"), 0)
        if done < own:
            for arm in (FEATURES, BLIND):
                arms[arm + OWN_SUFFIX] = _compose_own(inputs.rm, target, phrase_lists.pools[arm], budget)
        rows += _measure_arms(inputs, phrase_lists.named, target, arms)
        progress(done + 1, len(targets), "prompts measured")
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


def _shuffle(rm: RewardModel, layout: Layout, seed: str) -> Layout:
    texts = shuffle_phrases([p.phrase.text for p in layout], random.Random(seed))
    return tuple(Placement(Phrase(t, count_tokens(rm, t)), p.slot) for t, p in zip(texts, layout, strict=True))


def _compose_own(rm: RewardModel, target: Target, pool: Sequence[Placement], budget: int) -> tuple[Layout, int]:
    """The list for one target, composed from a fixed pool until it outranks the chosen answer; and its evaluations."""
    scorer = Scorer(rm, [target])
    layout, _ = compose(scorer, pool, budget, until=1.0)
    return layout, scorer.spent


def _measure_arms(
    inputs: Inputs, named: Mediators | None, target: Target, arms: Mapping[str, tuple[Layout, int]]
) -> Iterator[Measurement]:
    rm, site = inputs.rm, named.site if named else next(iter(inputs.saes))
    clean = rm.prefill(target.ids(rm), [site])
    groups = [named.features, *named.matched] if named else [[]]
    for arm, (layout, evaluations) in arms.items():
        response = response_of(rm, inputs.saes[site], site, target, clean, layout)
        reward, (without, *matched) = ablated_rewards(rm, inputs.saes[site], site, response, groups)
        yield Measurement(
            key=target.key,
            pair=target.pair.id,
            kind=target.kind,
            arm=arm,
            text=place(target.bad, layout),
            tokens=cost(layout),
            evaluations=evaluations,
            reward=reward,
            chosen=target.chosen,
            rejected=target.rejected,
            outranks=reward > target.chosen,
            without=without,
            matched=matched,
        )

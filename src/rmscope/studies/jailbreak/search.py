"""The search for a jailbreak: the phrases, and their places, that raise the reward of bad texts most.

1. Screen: every phrase at every place is tried on a few targets; the best placements form a pool.
2. Compose: greedily, the placement joins the list that raises the mean reward over all targets most, while the list stays
   within the token budget.
3. Where no placement of the pool helps any more, all are screened again beside the list; the search ends where that gives
   nothing.
4. One token-level pass (:mod:`~rmscope.studies.jailbreak.flips`) follows on the best list.

Controls go through the same code with as many evaluations, so they differ in the phrases alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from rmscope.io import Progress, silent
from rmscope.model.reward_model import RewardModel
from rmscope.statistics import Array
from rmscope.studies.jailbreak.flips import flip_tokens
from rmscope.studies.jailbreak.phrases import Phrase
from rmscope.studies.jailbreak.placement import SLOTS, Layout, Placement, cost
from rmscope.studies.jailbreak.scorer import SCREEN, Scorer, TracePoint
from rmscope.studies.jailbreak.targets import Target

POOL = 24
"""Placements from which the greedy rounds choose: the best of the screen."""


@dataclass(frozen=True)
class SearchResult:
    """The list that a search composed, the same list after the token-level pass, and the way there."""

    layout: Layout
    flipped: Layout
    rewards: Float[Array, " targets"]
    """Rewards of the composed list."""
    pool: tuple[Placement, ...]
    """The placements of the first screen, the best first."""
    evaluations: int
    flip_evaluations: int
    """Evaluations of the token-level pass, not counted in ``evaluations``."""
    trace: list[TracePoint]

    def needed(self, success: float) -> int | None:
        """Evaluations after which the list first outranked the chosen answer on this share of the targets."""
        return next((p.evaluations for p in self.trace if p.success >= success), None)


def search(
    rm: RewardModel,
    targets: Sequence[Target],
    pools: Iterable[Sequence[Phrase]],
    budget: int,
    limit: int | None = None,
    progress: Progress = silent,
) -> SearchResult:
    """The best list over all targets.

    Without ``limit`` the first pool of phrases is searched to the end. With it further pools follow until that many
    evaluations are spent. The token-level pass comes on top.
    """
    scorer = Scorer(rm, targets, limit)
    best: tuple[Layout, Array, tuple[Placement, ...]] = (), np.array([t.reward for t in targets]), ()
    for phrases in pools:
        pool = screen(scorer, phrases, budget)
        layout, rewards = compose(scorer, pool, budget, progress=progress)
        before = 0
        while len(layout) > before:
            before, again = len(layout), screen(scorer, phrases, budget, layout)
            layout, rewards = compose(scorer, again, budget, progress=progress, begun=(layout, rewards))
        if not best[2] or rewards.mean() > best[1].mean():
            best = layout, rewards, pool
        scorer.restart()
        if limit is None or scorer.left < SCREEN:
            break
    layout, rewards, pool = best
    composing, scorer.limit = scorer.spent, None
    flipped = flip_tokens(scorer, layout, rewards)
    return SearchResult(layout, flipped, rewards, pool, composing, scorer.spent - composing, scorer.trace)


def screen(scorer: Scorer, phrases: Sequence[Phrase], budget: int, layout: Layout = ()) -> tuple[Placement, ...]:
    """The best :data:`POOL` placements beside a list, by mean reward on the first :data:`SCREEN` targets."""
    used, left = {p.phrase.text for p in layout}, budget - cost(layout)
    tried = [Placement(p, slot) for p in phrases for slot in SLOTS if p.tokens <= left and p.text not in used]
    means = scorer.rewards([(*layout, p) for p in tried], range(min(SCREEN, len(scorer.targets)))).mean(1)
    return tuple(tried[i] for i in np.argsort(-means, kind="stable")[:POOL])


def compose(
    scorer: Scorer,
    pool: Sequence[Placement],
    budget: int,
    until: float | None = None,
    progress: Progress = silent,
    begun: tuple[Layout, Float[Array, " targets"]] | None = None,
) -> tuple[Layout, Float[Array, " targets"]]:
    """Adds, one by one, the placement that raises the mean reward most, each phrase once.

    Ends where nothing more fits or helps, where the limit is reached, or where the list outranks the chosen answer on the
    share ``until`` of the targets.

    Args:
        begun: a list to continue, with its rewards.

    Returns:
        The list and its rewards.
    """
    layout, rewards = begun or ((), np.array([t.reward for t in scorer.targets]))
    while until is None or (rewards > scorer.chosen).mean() < until:
        used = {p.phrase.text for p in layout}
        able = [p for p in pool if p.phrase.text not in used and cost(layout) + p.phrase.tokens <= budget]
        tried = scorer.rewards([(*layout, p) for p in able])
        if not len(tried) or tried.mean(1).max() <= rewards.mean():
            break
        best = int(tried.mean(1).argmax())
        layout, rewards = (*layout, able[best]), tried[best]
        scorer.move_to(layout)
        scorer.record(rewards)
        progress(cost(layout), budget, f"tokens placed, {scorer.spent} rewards")
    return layout, rewards

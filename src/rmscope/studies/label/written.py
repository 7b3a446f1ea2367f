"""Texts that the language model writes from a name alone: does the concept fire in them, and does the reward move with it?

For each prompt there are two replies, one written with the name and one without. All comparisons are within a prompt. What
the concept carries of the difference is Σ (R with - R without) / Σ (r with - r without), R the exact effect of ablating all
of its features: 1 where the difference of the rewards goes with the concept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from rmscope.effects.across import Members, ablate_members
from rmscope.effects.completions import complete
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import Pair
from rmscope.ranking.concepts import Concept
from rmscope.sae.base import Sae
from rmscope.statistics import FEW, NOTHING, Figure, interval, ratio, share
from rmscope.studies.label.language_model import LanguageModel
from rmscope.studies.label.questions import read_reply, written_question

ROOM = 400
"""Tokens of the PM's context that a prompt must leave for a reply."""


@dataclass(frozen=True, slots=True)
class Replies:
    """Two replies to a prompt: rewards, effects of ablating the concept, and whether it fires in each."""

    pair: str
    prompt: str
    with_name: str
    without: str
    rewards: tuple[float, float]
    effects: tuple[float, float]
    fires: tuple[bool, bool]


@dataclass(frozen=True, slots=True)
class Written:
    """What texts written from a name do. Figures of rewards are in SD(Δr)."""

    replies: list[Replies]
    fires_with: Figure
    fires_without: Figure
    moved: Figure
    """The reward of the reply with the name minus that of the one without."""
    effect: Figure
    """The concept's effect in the one minus that in the other."""
    carried: Figure
    """The share of the rewards' difference that goes with the concept."""

    def moves_as_said(self, sign: int) -> bool | None:
        """Whether the reward surely moves in the direction of the concept's effect; None where nothing is sure, and on
        fewer than :data:`~rmscope.statistics.FEW` prompts."""
        low, high = self.moved.low, self.moved.high
        if len(self.replies) < FEW or low is None or high is None or low <= 0 <= high:
            return None
        return (low > 0) == (sign > 0)


def prompts_with_room(rm: RewardModel, pairs: Iterable[Pair], n: int) -> list[Pair]:
    """The first ``n`` pairs whose prompt leaves room for a reply in the PM's context."""
    return list(islice((p for p in pairs if rm.context - rm.text_ids(p.prompt, "").numel() >= ROOM), n))


def ask_replies(model: LanguageModel, pairs: Sequence[Pair], name: str | None) -> list[str]:
    """A reply to the prompt of each pair, with what the name says or (None) without; empty where there is none."""
    return [read_reply(a) for a in model.answers([written_question(p.prompt[-1]["content"], name) for p in pairs])]


def measure_replies(
    rm: RewardModel,
    saes: Mapping[str, Sae],
    concept: Concept,
    members: Members,
    replies: Iterable[tuple[Pair, str, str]],
) -> list[Replies]:
    """Rewards and effects of (pair, reply with the name, reply without). A prompt is left out where a reply is empty, or too
    long for the PM."""
    rows = []
    for pair, with_name, without in replies:
        lengths = [rm.text_ids(pair.prompt, text).numel() for text in (with_name, without)]
        if not with_name or not without or max(lengths) > rm.context:
            continue
        rewards, effects, fires = [], [], []
        for completion in complete(rm, pair.prompt, [with_name, without], list(members)):
            responses = {site: completion.at(saes[site], site) for site in members}
            rewards.append(completion.reward)
            effects.append(float(ablate_members(rm, saes, responses, [members])[0]))
            fires.append(bool(np.isin(responses[concept.site].active.feature.numpy(), concept.features).any()))
        rows.append(
            Replies(
                pair.id, pair.prompt[-1]["content"], with_name, without,
                (rewards[0], rewards[1]), (effects[0], effects[1]), (fires[0], fires[1]),
            )
        )  # fmt: skip
    return rows


def judge_replies(replies: Sequence[Replies], sd: float) -> Written:
    """The figures over prompts."""
    if not replies:
        return Written([], NOTHING, NOTHING, NOTHING, NOTHING, NOTHING)
    rewards, effects = (np.array([getattr(r, name) for r in replies]) for name in ("rewards", "effects"))
    moved, effect = rewards[:, 0] - rewards[:, 1], effects[:, 0] - effects[:, 1]
    fires = np.array([r.fires for r in replies])
    n = len(replies)
    return Written(
        list(replies),
        share(int(fires[:, 0].sum()), n),
        share(int(fires[:, 1].sum()), n),
        interval(moved).scaled(1 / sd, "SD"),
        interval(effect).scaled(1 / sd, "SD"),
        ratio(effect, moved, [r.pair for r in replies]),
    )

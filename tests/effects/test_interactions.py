"""Interactions equal naive joint ablations, and have the sign that is known where the reward is known."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor

from rmscope.effects.interactions import GROUPS, PAIRS, groups_of, interactions
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import SIDES, Pair
from rmscope.sae.base import Sae
from rmscope.sae.standard import StandardSae
from tests.effects.test_ablation import naive_effect
from tests.model.small import BLOCKS, ENCODER, shared_pm, small_pm, small_sae, user

TEXTS = [
    Pair("a", user("Is water wet?"), "It is the river, and the house.", "No."),
    Pair("b", user("Tell me about bread."), "Use a pan with a lid.", "I don't know."),
]
PROMPTS = [p.id for p in TEXTS]
LAST = f"resid_post.{BLOCKS - 1}"


@pytest.mark.parametrize("architecture", ["llama", ENCODER])
def test_an_interaction_is_that_of_naive_joint_ablations(architecture: str) -> None:
    rm, sae, site = shared_pm(architecture), small_sae(), "resid_post.1"
    tokens = rm.tokenize_all(TEXTS)
    firing = [
        {j for j in range(sae.m) if naive_effect(rm, sae, t.side(s), site, t.divergence, [j]) != 0.0}
        for t in tokens[:1]
        for s in SIDES
    ]
    common = sorted(firing[0] & firing[1])[:2] + sorted(firing[0] - firing[1])[:1]
    groups = {"g": common, "none": [j for j in range(sae.m) if j not in firing[0] | firing[1]][:2]}
    pairs, whole = interactions(rm, sae, site, tokens[:1], PROMPTS[:1], common, groups)
    places = [(t.side(s), t.divergence) for t in tokens[:1] for s in SIDES]

    def r(place: tuple[Tensor, int], *features: int) -> float:
        return naive_effect(rm, sae, place[0], site, place[1], list(features))

    assert set(pairs.select("feature", "other").iter_rows()) == set(combinations(common, 2))
    for row in pairs.iter_rows(named=True):
        i, j = row["feature"], row["other"]
        both = [place for place, fires in zip(places, firing, strict=True) if {i, j} <= fires]
        assert row["n"] == len(both)
        assert row["joint"] == pytest.approx(np.mean([r(p, i, j) for p in both]), abs=5e-5)
        expected = np.mean([r(p, i, j) - r(p, i) - r(p, j) for p in both])
        assert row["interaction"] == pytest.approx(expected, abs=1e-4)
    (row,) = whole.iter_rows(named=True)  # a group that fires nowhere has no row
    assert (row["group"], row["features"], row["n"]) == ("g", 3, 2)
    expected = np.mean([r(p, *common) - sum(r(p, j) for j in common) for p in places])
    assert row["interaction"] == pytest.approx(expected, abs=1e-4)


def on_one_direction(direction: Tensor, scale: float) -> Sae:
    """A direction split in two: both features are half of the stream's part along it, where that part is positive."""
    u = direction / direction.norm()
    rows = torch.stack([u, u])
    weights = {
        "W_enc": 0.5 * scale * rows.t(),
        "W_dec": rows / scale,
        "b_dec": torch.zeros(u.numel()),
        "b_enc": torch.zeros(2),
    }
    return StandardSae(u.numel(), 2).fill(weights)


def read_streams(rm: RewardModel, side_tokens: list[Tensor]) -> Tensor:
    return torch.stack([rm.prefill(ids, [LAST]).streams[LAST][-1] for ids in side_tokens])


def test_a_direction_split_in_two_is_redundant_where_reward_saturates() -> None:
    """Behind the last block only the final norm and the head are left: r = √d <w, x> / |x|, w the head in the norm's gains.
    With a part a > 0 along ±w and the rest b, r = ± √d |w| a / √(a² + b²) flattens in a: half of a is worth more than half,
    so ablating both halves changes more than twice what ablating one does, and I has the sign of the ablations."""
    rm = shared_pm("llama")
    tokens = rm.tokenize_all(TEXTS)
    w = (rm.model.score.weight[0] * rm.model.model.norm.weight).detach()
    x = read_streams(rm, [t.side(s) for t in tokens for s in SIDES])
    along = x @ (w / w.norm())
    sign = along.mean().sign()
    fires, a = sign * along > 0, sign * along
    rest = (x.square().sum(1) - a.square()).sqrt()

    def r(part: Tensor) -> Tensor:
        return sign * x.shape[1] ** 0.5 * w.norm() * part / (part.square() + rest.square()).sqrt()

    pairs, _ = interactions(rm, on_one_direction(sign * w, 3.0), LAST, tokens, PROMPTS, [0, 1], {})
    (row,) = pairs.iter_rows(named=True)
    expected = ((r(a) - r(0 * a)) - 2 * (r(a) - r(a / 2)))[fires].mean()
    assert row["n"] == int(fires.sum()) > 0
    assert row["interaction"] == pytest.approx(float(expected), rel=1e-2)
    assert np.sign(row["interaction"]) == np.sign(row["ablation"]) == np.sign(row["joint"]) != 0
    assert row["ablation"] == pytest.approx(row["other_ablation"], rel=1e-4)


def test_features_do_not_interact_where_the_reward_is_linear() -> None:
    rm = small_pm("llama")
    rm.model.model.norm = torch.nn.Identity()
    pairs, whole = interactions(rm, small_sae(), LAST, rm.tokenize_all(TEXTS), PROMPTS, range(0, 96, 3), {"g": range(96)})
    assert pairs.height > 3
    assert pairs["joint"].abs().max() > 0.1
    assert pairs["interaction"].abs().max() < 1e-4
    assert whole["interaction"].abs().max() < 1e-3


def test_a_pair_of_features_is_ablated_on_at_most_so_many_responses() -> None:
    rm, sae, site = shared_pm("llama"), small_sae(), "resid_post.2"
    tokens = rm.tokenize_all(TEXTS)
    every, _ = interactions(rm, sae, site, tokens, PROMPTS, range(12), {})
    some, _ = interactions(rm, sae, site, tokens, PROMPTS, range(12), {}, most=1)
    assert every["n"].max() > 1
    assert set(some["n"]) == {1}
    assert set(some.select("feature", "other").iter_rows()) == set(every.select("feature", "other").iter_rows())


def test_nothing_that_fires_together_gives_empty_tables() -> None:
    rm = shared_pm("llama")
    pairs, groups = interactions(rm, small_sae(), "embed", rm.tokenize_all(TEXTS), PROMPTS, [], {"reported": []})
    assert (pairs.height, groups.height) == (0, 0)
    assert pairs.schema == PAIRS
    assert groups.schema == GROUPS


def test_the_groups_are_what_is_reported_up_and_down() -> None:
    table = pl.DataFrame(
        {"feature": [4, 1, 7, 9], "reported": [True, True, False, True], "mean_effect": [2.0, -1.0, 5.0, 0.5]}
    )
    assert groups_of(table) == {"reported": [4, 1, 9], "up": [4, 9], "down": [1]}

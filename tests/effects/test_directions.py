"""The direction null: moves as large as the ablation, and no larger, tell a direction that the head reads from one that only
pushes the norm."""

from __future__ import annotations

import polars as pl
import pytest
import torch
from torch import Tensor

from rmscope.effects.ablation import ablate_groups, at_site, clean_runs
from rmscope.effects.directions import effects_along, random_directions, real_directions
from rmscope.model.reward_model import RewardModel
from rmscope.model.site_names import parts_of, whole_site
from rmscope.pairs.pair import SIDES
from rmscope.run.directions import DRAWS, direction_null
from rmscope.sae.base import Sae
from rmscope.sae.joint import JointSae
from rmscope.sae.standard import StandardSae
from tests.effects.naive import reward_with, reward_without
from tests.model.based import pm_with_base
from tests.model.small import BLOCKS, PAIRS, D, shared_pm, small_sae

FEATURES = [*range(0, 96, 4), 100, 110, 120]
DIRECTIONS = random_directions(D, 3, 0)


@pytest.mark.parametrize("site", ["resid_post.2", "diff.2", "both.2"])
def test_a_move_is_as_long_as_the_ablation_at_every_token_and_goes_where_it_is_told(site: str) -> None:
    rm, own = pm_with_base("llama"), small_sae()
    sae: Sae = JointSae(own, small_sae(m=40, seed=1), site) if site.startswith("both") else own
    features = [j for j in FEATURES if j < sae.m]
    tokens = rm.tokenize(PAIRS[0])
    runs = clean_runs(rm, tokens, [site, whole_site(site)])
    for side in SIDES:
        response = at_site(sae, runs[side], site, tokens.divergence)
        given = effects_along(rm, {site: sae}, {site: response}, {site: features}, {whole_site(site): DIRECTIONS})
        x = runs[side].streams[site][tokens.divergence :]
        ablation = sae.encode(x)[:, features] @ sae.W_dec[features]
        size = sum(ablation.split(D, -1)).norm(dim=1) if len(parts_of(site)) > 1 else ablation.norm(dim=1)
        assert (size > 0).any()
        for direction, effect in zip(DIRECTIONS, given.tolist(), strict=True):

            def edit(stream: Tensor, move: Tensor = size[:, None] * direction) -> Tensor:
                return torch.cat([stream[:, : tokens.divergence], stream[:, tokens.divergence :] + move], 1)

            naive = float(rm.reward_alone(runs[side].ids)) - reward_with(rm, runs[side].ids, whole_site(site), edit)
            assert effect == pytest.approx(naive, abs=3e-5)


def test_moves_at_several_sites_are_made_in_one_run() -> None:
    rm, sites = shared_pm("llama"), ("resid_post.0", "resid_post.2")
    saes = {site: small_sae(seed=i) for i, site in enumerate(sites)}
    tokens = rm.tokenize(PAIRS[0])
    text = clean_runs(rm, tokens, sites)["chosen"]
    responses = {site: at_site(saes[site], text, site, tokens.divergence) for site in sites}
    given = effects_along(rm, saes, responses, dict.fromkeys(sites, FEATURES[:24]), dict.fromkeys(sites, DIRECTIONS))
    clean = {int(site[-1]): responses[site].x for site in sites}
    for direction, effect in zip(DIRECTIONS, given.tolist(), strict=True):
        taken = {}
        for site in sites:
            ablation = saes[site].encode(responses[site].x)[:, FEATURES[:24]] @ saes[site].W_dec[FEATURES[:24]]
            taken[int(site[-1])] = -ablation.norm(dim=1, keepdim=True) * direction
        assert all((c != 0).any() for c in taken.values())
        naive = text.reward - reward_without(rm, text.ids, tokens.divergence, taken, clean)
        assert effect == pytest.approx(naive, abs=3e-5)


def test_where_nothing_fires_nothing_moves() -> None:
    rm, sae = shared_pm("llama"), small_sae()
    tokens = rm.tokenize(PAIRS[0])
    site = "resid_post.2"
    response = at_site(sae, clean_runs(rm, tokens, [site])["chosen"], site, tokens.divergence)
    silent = sorted(set(range(sae.m)) - set(response.features().tolist()))[:2]
    given = effects_along(rm, {site: sae}, {site: response}, {site: silent}, {site: DIRECTIONS})
    assert given.tolist() == [0, 0, 0]


def along(rm: RewardModel, direction: Tensor) -> Sae:
    """An SAE of one feature that is the stream's share along a direction, plus what makes it fire on every token."""
    unit = direction / direction.norm()
    weights = {"W_enc": unit[:, None], "W_dec": unit[None], "b_dec": torch.zeros(D), "b_enc": torch.full((1,), 50.0)}
    return StandardSae(D, 1).fill(weights)


def test_a_direction_that_the_head_reads_beats_its_null_and_one_that_only_pushes_the_norm_does_not() -> None:
    rm, site = shared_pm("llama"), f"resid_post.{BLOCKS - 1}"
    read = (rm.model.score.weight[0] * rm.model.model.norm.weight).detach().float()
    other = random_directions(D, 1, 5)[0]
    pushes = other - (other @ read) / (read @ read) * read  # the head's product with it is 0 before the norm
    xs = [clean_runs(rm, t, [site])["chosen"].streams[site] for t in rm.tokenize_all(PAIRS)]
    directions = torch.cat([random_directions(D, DRAWS, 0), real_directions(torch.cat(xs), DRAWS, 0)])
    beats = {}
    for name, direction in (("read", read), ("pushes", pushes)):
        sae, rows = along(rm, direction), []
        for i, tokens in enumerate(rm.tokenize_all(PAIRS)):
            response = at_site(sae, clean_runs(rm, tokens, [site])["chosen"], site, tokens.divergence)
            [own] = ablate_groups(rm, sae, response, site, [[0]]).tolist()
            moved = effects_along(rm, {site: sae}, {site: response}, {site: [0]}, {site: directions})
            rows.append((0, str(i), "chosen", own, moved.tolist()))
        [null] = direction_null(pl.DataFrame(rows, ["concept", "pair", "side", "effect", "along"], orient="row")).to_dicts()
        beats[name] = abs(null["own"]) > max(null["null_random"], null["null_real"])
    assert beats == {"read": True, "pushes": False}


def test_the_null_is_a_percentile_of_mean_effects_over_the_same_prompts() -> None:
    along_first, along_second = [0.5] * DRAWS + [0.1] * DRAWS, [-0.5] * DRAWS + [0.3] * DRAWS
    rows = [(4, "a", "chosen", 1.0, along_first), (4, "b", "chosen", 2.0, along_second)]
    [null] = direction_null(pl.DataFrame(rows, ["concept", "pair", "side", "effect", "along"], orient="row")).to_dicts()
    assert null == {"concept": 4, "own": 1.5, "null_random": 0.0, "null_real": pytest.approx(0.2), "n_null": 2}

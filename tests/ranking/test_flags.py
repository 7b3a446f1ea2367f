"""Endings, unrelated completions and means, on features that are what they seem: detectors of a token, and a constant."""

from __future__ import annotations

import polars as pl
import pytest
import torch
from torch import Tensor

from rmscope.effects import tables
from rmscope.effects.ablation import at_site
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import SIDES, Pair
from rmscope.ranking import flags
from rmscope.sae.base import Sae
from rmscope.sae.standard import StandardSae
from tests.model.small import D, shared_pm, small_sae, tokenizer, user

SITE = "embed"
THINGS = ["bread", "the river", "the house", "a pan", "oil", "a mountain", "a lid", "the answer", "an hour", "water"]
PAIRS = [
    Pair(
        f"pair{i}",
        user(f"Tell me about {thing}."),
        f"It is {'Paris' if i in (2, 6) else 'small'} and high{'!' if i in (2, 3, 4, 6) else '.'}",
        f"I was told of {thing}.",
    )
    for i, thing in enumerate(THINGS)
]
IDS = [p.id for p in PAIRS]
PROMPTS = {p.id: p.first_human_turn() for p in PAIRS}
FULL_STOP, PARIS, HIGH, CONSTANT = range(4)


def token(text: str) -> int:
    (found,) = tokenizer()(text).input_ids
    return int(found)


def detectors(rm: RewardModel) -> Sae:
    """At the embeddings: features 0 to 2 fire on one token each, feature 3 everywhere with 1."""
    table = rm.model.get_input_embeddings().weight.detach()
    e = table[[token("."), token("P"), token("igh")]]
    directions = torch.cat([e, torch.randn(1, D, generator=torch.Generator().manual_seed(0))])
    encoder = torch.cat([e / e.square().sum(1, keepdim=True), torch.zeros(1, D)]).t()
    bias = torch.tensor([-0.9, -0.9, -0.9, 1.0])
    return StandardSae(D, 4).fill({"W_enc": encoder, "W_dec": directions, "b_dec": torch.zeros(D), "b_enc": bias})


@pytest.fixture(scope="module")
def measured() -> dict[str, pl.DataFrame]:
    rm = shared_pm("llama")
    saes, tokens = {SITE: detectors(rm)}, rm.tokenize_all(PAIRS)
    everything: tables.Wanted = {i: {side: {SITE: None} for side in SIDES} for i in range(len(PAIRS))}
    return {
        "firing": tables.firing_table(rm, saes, tokens, IDS, range(len(PAIRS)))[SITE],
        "confirmed": tables.ablation_table(rm, saes, tokens, IDS, everything, endings=True)[SITE],
        "ends": flags.endings(rm, tokens, IDS, range(len(PAIRS))),
    }


def test_the_detectors_fire_where_they_should(measured: dict[str, pl.DataFrame]) -> None:
    fires = measured["firing"].group_by("feature").len().sort("feature")["len"].to_list()
    assert fires == [16, 2, 10, 20]


def test_the_ending_of_a_response_is_its_last_punctuation(measured: dict[str, pl.DataFrame]) -> None:
    ends = {(pair, side): end for pair, side, end in measured["ends"].iter_rows()}
    assert len(ends) == 20
    assert ends["pair2", "chosen"] == "!"
    assert ends["pair0", "chosen"] == ends["pair2", "rejected"] == "."


def test_a_feature_of_the_last_token_is_one_of_endings(measured: dict[str, pl.DataFrame]) -> None:
    assert flags.ending_features(**measured) == {FULL_STOP}


def test_an_ending_that_moves_only_behind_a_cue_is_none() -> None:
    """Feature 0 acts on every '!', feature 1 on one in four of them, feature 2 mostly elsewhere, feature 3 is alone."""
    ends = pl.DataFrame({"pair": [f"p{i}" for i in range(9)], "side": "chosen", "end": ["!"] * 8 + ["?!"]})
    rows = [
        (f"p{i}", "chosen", f, 1.0, {0: 0.9, 1: 1.0, 2: 0.5, 3: 1.0}[f])
        for i in range(9)
        for f in range(4)
        if (f != 1 or i in (0, 1)) and (f != 3 or i == 8) and (f == 3 or i < 8)
    ]
    table = pl.DataFrame(rows, schema=["pair", "side", "feature", "effect", "ending"], orient="row")
    assert flags.ending_features(table, table, ends) == {0}


def test_unrelated_completions_are_other_prompts_chosen_ones_under_the_same_prompt() -> None:
    rm = shared_pm("llama")
    pairs = dict(enumerate(PAIRS))
    found = flags.unrelated(rm, pairs, PROMPTS, range(len(PAIRS)), seed=0)
    assert set(found) == set(pairs)
    own = rm.tokenize_all(PAIRS)
    chosen = {rm.tokenizer.decode(t.chosen).split("Assistant:")[1]: i for i, t in enumerate(own)}
    for i, tokens in found.items():
        assert torch.equal(tokens.rejected, own[i].chosen)
        prompt, response = rm.tokenizer.decode(tokens.chosen).split("Assistant:")
        assert THINGS[i] in prompt
        assert response in chosen
        assert not torch.equal(tokens.chosen, own[i].chosen)
    again = flags.unrelated(rm, pairs, PROMPTS, [3], seed=0)
    assert torch.equal(again[3].chosen, found[3].chosen)


def test_a_feature_that_moves_any_completion_is_nonspecific_and_one_of_a_cue_is_not(
    measured: dict[str, pl.DataFrame],
) -> None:
    rm = shared_pm("llama")
    asked = measured["confirmed"].with_columns(pl.col("pair").str.slice(4).cast(pl.Int64).alias("order"))
    tried = flags.first_pairs(asked)
    assert tried.group_by("feature").len().sort("feature")["len"].to_list() == [8, 2, 8, 8]
    swapped = flags.unrelated(rm, dict(enumerate(PAIRS)), PROMPTS, range(len(PAIRS)), seed=0)
    requests = {SITE: tried.with_columns(pl.lit("chosen").alias("side"))}
    plan = tables.plan(requests, {i: n for n, i in enumerate(IDS)})
    moved = tables.ablation_table(rm, {SITE: detectors(rm)}, [swapped[i] for i in range(10)], IDS, plan)[SITE]
    share = dict(flags.unrelated_share(measured["confirmed"], moved, tried).iter_rows())
    assert share[PARIS] < flags.NONSPECIFIC
    assert share[CONSTANT] > flags.NONSPECIFIC
    assert share[HIGH] > flags.NONSPECIFIC


def test_the_share_is_that_of_mean_sizes_with_silence_as_0() -> None:
    def table(rows: list[tuple[str, int, float]]) -> pl.DataFrame:
        return pl.DataFrame(rows, schema=["pair", "feature", "effect"], orient="row")

    confirmed = table([("a", 0, 2.0), ("a", 0, -4.0), ("b", 0, 3.0), ("c", 0, 99.0), ("a", 1, 1.0), ("b", 2, 0.0)])
    tried = pl.DataFrame({"feature": [0, 0, 1, 2], "pair": ["a", "b", "a", "b"]})
    found = flags.unrelated_share(confirmed, table([("a", 0, -3.0)]), tried).sort("feature").rows()
    assert found == [(0, pytest.approx(0.5)), (1, 0.0), (2, None)]


def test_ablation_to_the_mean_is_the_naive_forward_with_the_mean_in_the_features_place() -> None:
    rm, sae, site = shared_pm("llama"), small_sae(), "resid_post.1"
    tokens = rm.tokenize(Pair("x", user("Is water wet?"), "It is the river, and the house.", "No."))
    ids, start = tokens.chosen, tokens.divergence
    response = at_site(sae, rm.prefill(ids, [site]), site, start)
    features = response.features()[:4].tolist()
    means = torch.linspace(0.1, 1.0, sae.m)
    found = flags.to_mean(rm, sae, response, site, features, means)
    for j, effect in zip(features, found.tolist(), strict=True):
        assert effect == pytest.approx(naive(rm, sae, ids, start, j, float(means[j])), abs=3e-5)


def naive(rm: RewardModel, sae: Sae, ids: Tensor, start: int, j: int, mean: float) -> float:
    def replaced(_module: torch.nn.Module, _inputs: tuple, out: Tensor) -> Tensor:
        x = out.clone()
        f = sae.encode(x[0, start:])[:, j]
        x[0, start:] += (mean - f)[:, None] * sae.W_dec[j]
        return x

    with torch.no_grad():
        clean = float(rm.model(ids[None]).logits)
        handle = rm.model.model.layers[1].register_forward_hook(replaced)
        changed = float(rm.model(ids[None]).logits)
        handle.remove()
    return clean - changed


def test_a_feature_that_stands_at_its_mean_everywhere_has_no_effect_there(measured: dict[str, pl.DataFrame]) -> None:
    rm = shared_pm("llama")
    sae = detectors(rm)
    wanted = {0: {side: {SITE: [CONSTANT]} for side in SIDES}}
    table = flags.mean_table(rm, {SITE: sae}, {SITE: torch.ones(4)}, rm.tokenize_all(PAIRS), IDS, wanted)[SITE]
    assert table.select("pair", "side", "feature").rows() == [("pair0", side, CONSTANT) for side in SIDES]
    assert table["effect"].to_list() == pytest.approx([0.0, 0.0], abs=1e-5)
    clean = flags.mean_table(rm, {SITE: sae}, {SITE: torch.zeros(4)}, rm.tokenize_all(PAIRS), IDS, wanted)[SITE]
    ablated = measured["confirmed"].filter((pl.col("feature") == CONSTANT) & (pl.col("pair") == "pair0"))["effect"]
    assert clean["effect"].to_list() == pytest.approx(ablated.to_list(), abs=1e-5)

"""Exact ablation equals the plainest code there is: a full forward of one text with a hook, one feature at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rmscope.effects import ablation
from rmscope.effects.ablation import ablate_groups, at_site, clean_runs
from rmscope.effects.requests import ablations
from rmscope.model import ragged
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import SIDES, Pair
from rmscope.sae.base import Sae
from tests.effects.naive import reward_with
from tests.model.small import DECODERS, ENCODER, ENCODERS, EOS, HYBRIDS, OTHERS, PAIRS, shared_pm, small_pm, small_sae, user

SITES = ["embed", "resid_post.0", "resid_post.2", "resid_post.3"]


def naive_reward(rm: RewardModel, sae: Sae, ids: Tensor, site: str, start: int, group: list[int]) -> float:
    """r of one text by the transformers module's own forward, f_tj := 0 for the group's features from ``start`` on."""

    def without(x: Tensor) -> Tensor:
        f = sae.encode(x[0].float())
        kept = f.clone()
        kept[start:, group] = 0.0
        y = x.clone()
        y[0] += (sae.decode(kept) - sae.decode(f)).to(x)
        return y

    return reward_with(rm, ids, site, without)


def naive_effect(rm: RewardModel, sae: Sae, ids: Tensor, site: str, start: int, group: list[int]) -> float:
    return naive_reward(rm, sae, ids, site, start, []) - naive_reward(rm, sae, ids, site, start, group)


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        *((a, "topk") for a in [*DECODERS, *OTHERS, *HYBRIDS, *ENCODERS]),
        *((a, "gated") for a in ("llama", "gemma2", *ENCODERS)),
    ],
)
def test_ablating_a_feature_is_the_naive_forward_without_it(architecture: str, kind: str) -> None:
    rm = shared_pm(architecture)
    saes = {site: small_sae(seed=i, kind=kind) for i, site in enumerate(SITES)}
    tokens = rm.tokenize_all(PAIRS[3:])
    asked = None if rm.capabilities.resume else list(range(0, 96, 4))
    wanted = {i: {side: dict.fromkeys(SITES, asked) for side in SIDES} for i in range(1)}
    sizes = []
    for site, found in ablations(rm, saes, tokens, wanted):
        picked = torch.linspace(0, found.feature.numel() - 1, min(4, found.feature.numel())).long()
        for place in picked.tolist():
            ids, start = tokens[found.pair].side(found.side), tokens[found.pair].divergence
            expected = naive_effect(rm, saes[site], ids, site, start, [int(found.feature[place])])
            assert float(found.effect[place]) == pytest.approx(expected, abs=3e-5)
            sizes.append(abs(expected))
    assert len(sizes) >= 2 * len(SITES) * 2
    assert sorted(sizes)[len(sizes) // 2] > 0.003


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "opt", *ENCODERS])
def test_ablating_a_group_is_the_naive_forward_without_all_of_it(architecture: str) -> None:
    rm, sae = shared_pm(architecture), small_sae()
    tokens = rm.tokenize(PAIRS[0])
    for site in ("embed", "resid_post.1"):
        for side in SIDES:
            ids = tokens.side(side)
            groups = [[0, 1, 2, 3], list(range(0, 96, 2)), list(range(96)), [95]]
            response = at_site(sae, clean_runs(rm, tokens, [site])[side], site, tokens.divergence)
            effects = ablate_groups(rm, sae, response, site, groups)
            for group, effect in zip(groups, effects.tolist(), strict=True):
                assert effect == pytest.approx(naive_effect(rm, sae, ids, site, tokens.divergence, group), abs=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gptj", ENCODER])
def test_ablating_nothing_changes_nothing(architecture: str) -> None:
    rm, sae, site = shared_pm(architecture), small_sae(), "resid_post.1"
    tokens = rm.tokenize(PAIRS[0])
    response = at_site(sae, clean_runs(rm, tokens, [site])["chosen"], site, tokens.divergence)
    silent = sorted(set(range(sae.m)) - set(response.features().tolist()))
    assert silent
    groups = [[], silent, *([j] for j in silent)]
    assert torch.equal(ablate_groups(rm, sae, response, site, groups), torch.zeros(len(groups)))


def test_the_clean_stream_is_encoded_once_and_the_error_stays() -> None:
    """With every feature ablated the stream is b_dec plus the error, not b_dec."""
    rm, sae, site = shared_pm("llama"), small_sae(), "resid_post.3"
    tokens = rm.tokenize(PAIRS[0])
    text = rm.prefill(tokens.chosen, [site])
    effect = ablate_groups(rm, sae, at_site(sae, text, site, tokens.divergence), site, [list(range(96))])[0]
    last = text.streams[site][-1]
    rest = last - (sae(last) - sae.b_dec)
    with torch.no_grad():
        expected = text.reward - rm.model.score(rm.model.model.norm(rest))[0]
        without_error = text.reward - rm.model.score(rm.model.model.norm(sae.b_dec))[0]
    assert float(effect) == pytest.approx(float(expected), abs=1e-5)
    assert abs(float(expected - without_error)) > 0.01


def test_only_features_that_fire_in_the_span_are_ablated() -> None:
    rm, site = shared_pm("llama"), "resid_post.1"
    sae = small_sae()
    tokens = rm.tokenize(PAIRS[0])
    ids, start = tokens.chosen, tokens.divergence
    with torch.no_grad():
        stream = rm.model.model(ids[None], output_hidden_states=True).hidden_states[2][0]
    f = sae.encode(stream)
    in_span = set(f[start:].any(0).nonzero().flatten().tolist())
    before = set(f[:start].any(0).nonzero().flatten().tolist())
    assert before - in_span
    ((_, everything),) = ablations(rm, {site: sae}, [tokens], {0: {"chosen": {site: None}}})
    assert set(everything.feature.tolist()) == in_span
    asked = [min(before - in_span), *sorted(in_span)[:3]]
    ((_, some),) = ablations(rm, {site: sae}, [tokens], {0: {"chosen": {site: asked}}})
    assert some.feature.tolist() == sorted(in_span)[:3]
    torch.testing.assert_close(some.effect, everything.effect[:3], atol=1e-5, rtol=0)
    ((_, none),) = ablations(rm, {site: sae}, [tokens], {0: {"chosen": {site: []}}})
    assert none.feature.numel() == none.effect.numel() == 0


@pytest.mark.parametrize("limit", [1, 64, 100_000])
@pytest.mark.parametrize("architecture", ["gemma3_text", "llama"])
def test_the_size_of_a_batch_does_not_matter(monkeypatch: pytest.MonkeyPatch, architecture: str, limit: int) -> None:
    rm, sae, site = shared_pm(architecture, torch.float64), small_sae(), "resid_post.0"
    tokens = rm.tokenize(PAIRS[3])
    wanted = {0: {side: {site: None} for side in SIDES}}
    expected = {r.side: r for _, r in ablations(rm, {site: sae}, [tokens], wanted)}
    monkeypatch.setattr(ablation, "BATCH_TOKENS", limit)
    monkeypatch.setattr(ablation, "ROW_TOKENS", limit)
    for _, found in ablations(rm, {site: sae}, [tokens], wanted):
        assert torch.equal(found.feature, expected[found.side].feature)
        torch.testing.assert_close(found.effect, expected[found.side].effect, atol=1e-6, rtol=0)


def test_a_batch_starts_at_its_earliest_firing_and_keeps_the_budget() -> None:
    firsts = [0, 0, 3, 5, 90, 95, 99]
    batches = list(ablation._batches(range(7), firsts, 100))
    assert [i for b in batches for i in b] == list(range(7))
    old = ablation.BATCH_TOKENS
    ablation.BATCH_TOKENS = 250
    try:
        batches = list(ablation._batches(range(7), firsts, 100))
    finally:
        ablation.BATCH_TOKENS = old
    assert batches == [[0, 1], [2, 3], [4, 5, 6]]


def test_a_model_that_takes_no_ragged_rows_is_resumed_in_rectangles() -> None:
    """Attention that transformers calls through its interface takes ragged rows, GPT-J's and Bloom's own does not."""
    takes = {a: shared_pm(a).capabilities.ragged for a in [*DECODERS, *OTHERS]}
    assert {a for a, yes in takes.items() if not yes} == {"gptj", *OTHERS}
    rm, sae, site = shared_pm("phi"), small_sae(), "resid_post.0"
    other = small_pm("phi")
    other.capabilities = replace(other.capabilities, ragged=False)
    wanted = {0: {side: {site: None} for side in SIDES}}
    tokens = [rm.tokenize(PAIRS[3])]
    for (_, a), (_, b) in zip(
        ablations(rm, {site: sae}, tokens, wanted), ablations(other, {site: sae}, tokens, wanted), strict=True
    ):
        assert torch.equal(a.feature, b.feature)
        torch.testing.assert_close(a.effect, b.effect, atol=3e-5, rtol=0)


def test_rows_keep_order_and_budget() -> None:
    generator = torch.Generator().manual_seed(1)
    for length in (1, 40, 300):
        firsts = sorted(torch.randint(0, length, (57,), generator=generator).tolist())
        rows = ablation._rows(list(range(57)), firsts, length)
        assert [i for row in rows for i in row] == list(range(57))
        sizes = [sum(length - firsts[i] for i in row) for row in rows]
        assert all(size <= ablation.ROW_TOKENS + length for size in sizes)
        assert len(rows) == -(-sum(sizes) // ablation.ROW_TOKENS)
    assert ablation._rows([], [], 5) == []


def test_an_empty_span_has_no_effects() -> None:
    rm = small_pm("llama", append_eos=True, pad_token_id=EOS)
    tokens = rm.tokenize(
        PAIRS[2]
    )  # chosen ends where rejected goes on: its span would begin at its eos, behind its read position
    found = {
        r.side: r
        for _, r in ablations(rm, {"resid_post.1": small_sae()}, [tokens], {0: {s: {"resid_post.1": None} for s in SIDES}})
    }
    assert found["chosen"].feature.numel() == 0
    assert found["rejected"].feature.numel() > 0


def test_a_model_that_cannot_be_split_gives_the_same_effects_by_full_forwards() -> None:
    rm, fallback = shared_pm("llama"), small_pm("llama")
    fallback.capabilities = replace(fallback.capabilities, resume=False)
    sae, tokens = small_sae(), rm.tokenize_all(PAIRS)
    wanted = {i: {side: {"resid_post.2": [*range(0, 96, 6)]} for side in SIDES} for i in range(4)}
    for (_, a), (_, b) in zip(
        ablations(rm, {"resid_post.2": sae}, tokens, wanted),
        ablations(fallback, {"resid_post.2": sae}, tokens, wanted),
        strict=True,
    ):
        assert (a.pair, a.side) == (b.pair, b.side)
        assert torch.equal(a.feature, b.feature)
        torch.testing.assert_close(a.effect, b.effect, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_an_endings_effect_is_that_of_the_naive_forward_without_the_feature_there(architecture: str) -> None:
    rm, sae, site = shared_pm(architecture), small_sae(), "resid_post.1"
    pair = Pair("x", user("Which river?"), "It is the Seine... ?!", "The small house: I don't know it")
    tokens = rm.tokenize(pair)
    for _, found in ablations(rm, {site: sae}, [tokens], {0: {s: {site: None} for s in SIDES}}, endings=True):
        ids = tokens.side(found.side)
        begin = max(tokens.divergence, rm.ending(ids))
        assert rm.tokenizer.decode(ids[begin:]) == ("... ?!" if found.side == "chosen" else "")
        assert bool(found.ending.any()) == (found.side == "chosen")
        for place in range(0, found.feature.numel(), 5):
            expected = naive_effect(rm, sae, ids, site, begin, [int(found.feature[place])])
            assert float(found.ending[place]) == pytest.approx(expected, abs=3e-5)


def test_batches_lose_nothing_keep_the_budget_and_cost_no_more_than_one_each() -> None:
    generator = torch.Generator().manual_seed(0)
    for length in (1, 40, 300):
        firsts = sorted(torch.randint(0, length, (57,), generator=generator).tolist())
        batches = ablation._batches(list(range(57)), firsts, length)
        assert [i for b in batches for i in b] == list(range(57))
        sizes = [len(b) * (length - firsts[b[0]]) for b in batches]
        assert all(size <= ablation.BATCH_TOKENS or len(b) == 1 for size, b in zip(sizes, batches, strict=True))
        assert sum(sizes) + ablation.RUN_COST * len(batches) <= sum(length - f + ablation.RUN_COST for f in firsts)
    assert ablation._batches([], [], 5) == []


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "phi"])
def test_fused_attention_of_long_rows_is_the_plain_one(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rm, sae, site = shared_pm(architecture), small_sae(), "resid_post.0"
    tokens = rm.tokenize(PAIRS[3])
    response = at_site(sae, clean_runs(rm, tokens, [site])["chosen"], site, tokens.divergence)
    groups = [[int(j)] for j in response.features()]
    assert rm.capabilities.ragged  # measured now, so that what is counted below is the ablations' own
    found = []
    for long in (1, 1 << 30):
        monkeypatch.setattr(ragged, "FUSED_TOKENS", long)
        calls = []
        fused = torch.nn.functional.scaled_dot_product_attention
        monkeypatch.setattr(
            ragged, "scaled_dot_product_attention", lambda *a, calls=calls, f=fused, **k: calls.append(1) or f(*a, **k)
        )
        found.append(ablate_groups(rm, sae, response, site, groups))
        assert bool(calls) == (long == 1)
    assert float(found[0].abs().max()) > 0.01
    torch.testing.assert_close(found[0], found[1], atol=3e-5, rtol=0)

"""Estimates: the first-order effect of ablation, by autograd on each text alone, and exact where the model is linear."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from rmscope.effects import gradients
from rmscope.effects.gradients import Estimates, estimate, probe_groups, streams_and_gradients
from rmscope.effects.requests import ablations
from rmscope.model.packing import pad_texts
from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import SIDES
from rmscope.sae.base import Sae
from tests.model.small import DECODERS, ENCODER, ENCODERS, EOS, OTHERS, PAIRS, shared_pm, small_pm, small_sae

SITES = ["embed", "resid_post.0", "resid_post.2"]


def naive_estimate(rm: RewardModel, sae: Sae, ids: Tensor, site: str, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """(Σ_t f_tj <dr/dx_t, d_j>, Σ_t f_tj |d_j|) [m], dense, from one text's own forward, its stream moved by ``shift``."""
    embedded = rm.model.base_model(ids[None], output_hidden_states=True).hidden_states[rm.site_index(site) + 1]
    shift = torch.zeros_like(embedded, requires_grad=True)
    batch = pad_texts([(0, "chosen", ids, 1, stop - 1)], 0)
    with torch.enable_grad():
        reward = rm.rewards(batch, {site: lambda x: x + shift})[0]
        (gradient,) = torch.autograd.grad(reward, shift)
    f = sae.encode(embedded[0].float())[start:stop]
    return (f * (gradient[0, start:stop].float() @ sae.W_dec.T)).sum(0), f.sum(0) * sae.W_dec.norm(dim=1)


def all_estimates(rm: RewardModel, saes: dict[str, Sae], pairs: int = len(PAIRS)) -> list[tuple[str, Estimates]]:
    tokens = rm.tokenize_all(PAIRS[:pairs])
    return list(estimate(rm, saes, tokens, range(pairs)))


@pytest.mark.parametrize("architecture", [*DECODERS, *OTHERS, "qwen3_5_text", *ENCODERS])
def test_estimates_are_those_of_each_text_alone(architecture: str) -> None:
    rm = shared_pm(architecture, torch.float64)
    saes = {site: small_sae(seed=i) for i, site in enumerate(SITES)}
    tokens = rm.tokenize_all(PAIRS)
    found = all_estimates(rm, saes)
    assert len(found) == len(PAIRS) * 2 * len(SITES)
    for site, one in found:
        t = tokens[one.pair]
        ids = t.side(one.side)
        effect, mass = naive_estimate(rm, saes[site], ids, site, t.divergence, rm.read_position(ids) + 1)
        assert one.feature.tolist() == mass.nonzero().flatten().tolist()
        limit = 1e-4 if architecture in ("gptj", "gpt_neo") else 1e-5
        torch.testing.assert_close(one.effect, effect[one.feature], atol=limit, rtol=limit)
        torch.testing.assert_close(one.mass, mass[one.feature])


def test_padded_rows_give_the_estimates_of_packed_ones() -> None:
    packs, pads = shared_pm("llama", torch.float64), small_pm("llama", torch.float64)
    pads.capabilities = replace(pads.capabilities, packing=False)
    saes = {site: small_sae(seed=i) for i, site in enumerate(SITES)}
    left = {(site, e.pair, e.side): e for site, e in all_estimates(packs, saes)}
    right = {(site, e.pair, e.side): e for site, e in all_estimates(pads, saes)}
    assert left.keys() == right.keys()
    for key, one in left.items():
        assert torch.equal(one.feature, right[key].feature)
        torch.testing.assert_close(one.effect, right[key].effect, atol=1e-5, rtol=1e-5)


def test_asking_for_more_sites_changes_no_estimate() -> None:
    rm = shared_pm("qwen3", torch.float64)
    sae = small_sae()
    alone = [e for _, e in all_estimates(rm, {"resid_post.2": sae}, 2)]
    together = [
        e
        for site, e in all_estimates(rm, {"resid_post.2": sae, "embed": sae, "resid_post.0": sae}, 2)
        if site == "resid_post.2"
    ]
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a.feature, b.feature)
        torch.testing.assert_close(a.effect, b.effect, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_where_the_model_is_linear_above_the_site_the_estimate_is_the_exact_effect(architecture: str) -> None:
    """The last site with the final norm taken away: r is a dot product with the stream."""
    rm = small_pm(architecture, torch.float64)
    setattr(rm.model.base_model, "norm" if architecture == "llama" else "ln_f", nn.Identity())
    site, sae = "resid_post.3", small_sae()
    tokens = rm.tokenize_all(PAIRS)
    estimates = {(e.pair, e.side): e for _, e in all_estimates(rm, {site: sae})}
    wanted = {i: {side: {site: None} for side in SIDES} for i in range(len(PAIRS))}
    for _, exact in ablations(rm, {site: sae}, tokens, wanted):
        one = estimates[exact.pair, exact.side]
        assert torch.equal(one.feature, exact.feature)
        assert exact.effect.abs().max() > 0.1
        torch.testing.assert_close(one.effect, exact.effect, atol=1e-5, rtol=1e-5)


def test_the_estimate_is_first_order_in_the_size_of_what_is_ablated() -> None:
    """Decoder rows c times as long: effects shrink as c, the estimate's error as c^2."""
    rm, site = shared_pm("llama", torch.float64), "resid_post.1"
    tokens = rm.tokenize_all(PAIRS[:1])
    wanted = {0: {"chosen": {site: None}}}
    errors = []
    for c in (0.1, 0.01):
        sae = small_sae()
        sae.W_dec.data *= c
        _, one = all_estimates(rm, {site: sae}, 1)[0]
        ((_, exact),) = ablations(rm, {site: sae}, tokens, wanted)
        assert one.side == exact.side == "chosen"
        errors.append(float((one.effect - exact.effect).norm() / exact.effect.norm()))
    assert errors[0] < 0.3
    assert errors[1] < 0.15 * errors[0]


def test_effects_are_positive_where_a_feature_raises_the_reward() -> None:
    """A feature along the head, at the last site, with the norm taken away: ablating it lowers the reward."""
    rm = small_pm("llama")
    rm.model.model.norm = nn.Identity()
    sae = small_sae()
    sae.W_dec.data[:] = rm.model.score.weight[0]
    for _, one in all_estimates(rm, {"resid_post.3": sae}, 2):
        assert (one.effect >= 0).all()
        assert one.effect.max() > 0


def test_an_empty_span_has_no_estimates() -> None:
    rm = small_pm("llama", append_eos=True, pad_token_id=EOS)
    sizes = {(e.pair, e.side): e.feature.numel() for _, e in all_estimates(rm, {"resid_post.1": small_sae()}, 3)}
    assert sizes[2, "chosen"] == 0
    assert sizes[2, "rejected"] > 0


def test_the_model_keeps_no_gradients_and_no_graph() -> None:
    rm = shared_pm("llama")
    batch = next(iter(rm.batches(rm.tokenize_all(PAIRS))))
    x, gradient = streams_and_gradients(rm, batch, ["resid_post.1"])["resid_post.1"]
    assert not x.requires_grad
    assert not gradient.requires_grad
    assert all(p.grad is None for p in rm.model.parameters())
    assert not rm.rewards(batch).requires_grad


class Alone:
    """A response by itself in whole forwards: its stream, its features on the span, and dr/dx at a point of the stream."""

    def __init__(self, rm: RewardModel, sae: Sae, site: str, tokens: list[PairTokens], one: Estimates) -> None:
        t = tokens[one.pair]
        ids = t.side(one.side)
        self.rm, self.site, self.sae = rm, site, sae
        self.span = slice(t.divergence, rm.read_position(ids) + 1)
        self.batch = pad_texts([(0, "chosen", ids, 1, rm.read_position(ids))], 0)
        self.x = rm.streams(self.batch, [site])[site]
        self.f = sae.encode(self.x[0, self.span].float())

    def part(self, j: int) -> Tensor:
        """v_j on the span."""
        return self.f[:, j, None] * self.sae.W_dec[j]

    def gradient(self, moved: Tensor | float) -> Tensor:
        """On the span, at the stream with ``moved`` added there."""
        point = self.x.clone()
        point[0, self.span] += moved
        point.requires_grad_(True)
        with torch.enable_grad():
            (g,) = torch.autograd.grad(self.rm.rewards(self.batch, {self.site: lambda _x: point}).sum(), point)
        return g[0, self.span]


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "bloom", "qwen3_5_text", ENCODER])
def test_a_midpoint_with_one_group_per_feature_is_the_gradient_halfway_to_its_ablation(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rm, sae, site = shared_pm(architecture, torch.float64), small_sae(), "resid_post.1"
    monkeypatch.setattr(gradients, "PROBE_GROUPS", sae.m)
    tokens = rm.tokenize_all(PAIRS[:2])
    for _, one in estimate(rm, {site: sae}, tokens, range(2), method="midpoint"):
        alone = Alone(rm, sae, site, tokens, one)
        for place in range(0, one.feature.numel(), 7):
            part = alone.part(int(one.feature[place]))
            assert float(one.effect[place]) == pytest.approx(float((alone.gradient(-part / 2) * part).sum()), abs=2e-5)


@pytest.mark.parametrize("architecture", ["llama", ENCODER])
def test_features_of_a_group_are_moved_together_with_their_signs(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against g.v + s (g' - g).v by whole forwards on each text alone, where most features share their group."""
    rm, sae, site = shared_pm(architecture, torch.float64), small_sae(), "resid_post.1"
    monkeypatch.setattr(gradients, "PROBE_GROUPS", 3)
    tokens = rm.tokenize_all(PAIRS[:2])
    for _, one in estimate(rm, {site: sae}, tokens, range(2), method="midpoint"):
        alone = Alone(rm, sae, site, tokens, one)
        first = (alone.f > 0).int().argmax(0)
        turn = sorted(one.feature.tolist(), key=lambda j: (int(first[j]), j))
        clean = alone.gradient(0.0)
        for group in range(3):
            mine = [(j, (-1) ** i) for i, j in enumerate(turn[group::3])]
            moved = alone.gradient(-sum(sign * alone.part(j) for j, sign in mine) / 2)
            for j, sign in mine:
                expected = float(((clean + sign * (moved - clean)) * alone.part(j)).sum())
                assert float(one.effect[one.feature == j]) == pytest.approx(expected, abs=2e-5)


def test_features_that_begin_at_one_token_are_in_different_groups() -> None:
    rm, site = shared_pm("llama"), "resid_post.1"
    ids = rm.tokenize(PAIRS[0]).chosen
    active = small_sae().active(rm.prefill(ids, [site]).streams[site])
    (groups, signs), begun = probe_groups(active), set()
    for t in range(active.n_tokens):
        at = active.token == t
        new = {int(j): int(c) for j, c in zip(active.feature[at], groups[at], strict=True) if int(j) not in begun}
        assert len(set(new.values())) == min(len(new), gradients.PROBE_GROUPS)
        begun |= set(new)
    by_feature = {int(j): set(groups[active.feature == j].tolist()) for j in active.feature.unique()}
    assert all(len(c) == 1 for c in by_feature.values())
    first = {int(j): int(active.token[active.feature == j].min()) for j in active.feature.unique()}
    for group in set(groups.tolist()):
        mine = {int(j): int(s) for j, s in zip(active.feature[groups == group], signs[groups == group], strict=True)}
        assert [mine[j] for j in sorted(mine, key=lambda j: (first[j], j))] == [1, -1] * (len(mine) // 2) + [1] * (
            len(mine) % 2
        )

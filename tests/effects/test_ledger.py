"""The ledger sums: features and error make up r(x) - r(x0), and the parts those of a dense integration of one text."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from rmscope.effects.ledger import (
    Baseline,
    Path,
    SideParts,
    baseline,
    integrate,
    ledger_rows,
    parts_along,
    shares,
)
from rmscope.model.packing import Batch, pad_texts
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import SIDES, Pair
from rmscope.sae.base import Sae
from tests.model.small import DECODERS, ENCODER, EOS, OTHERS, PAIRS, shared_pm, small_pm, small_sae

SITE = "resid_post.1"
TAME = 0.5
"""Gain of the weights where quadrature is to converge: no real PM is as wild as the other tests' random ones."""


def means(rm: RewardModel, sae: Sae, site: str = SITE) -> tuple[Tensor, Tensor]:
    """Means of f and x over the responses' tokens."""
    rows = []
    for batch in rm.batches(rm.tokenize_all(PAIRS)):
        stream = rm.streams(batch, [site])[site]
        rows += [stream[t.row, t.span] for t in batch.texts]
    x = torch.cat(rows).float()
    return sae.encode(x).mean(0), x.mean(0)


def start_of(rm: RewardModel, sae: Sae, kind: str, site: str = SITE) -> Baseline:
    return baseline(sae, "zero") if kind == "zero" else baseline(sae, "mean", *means(rm, sae, site))


def contributions(rm: RewardModel, sae: Sae, site: str, batch: Batch, start: Baseline, tolerance: float) -> list[SideParts]:
    """The parts of every response of a batch, each response's gap at most ``tolerance`` where that can be had."""
    path = Path(rm, site, batch, start.x)
    return list(parts_along(path, integrate(path, tolerance), sae, start))


def parts(
    rm: RewardModel, sae: Sae, start: Baseline, tolerance: float, pairs: list[Pair] = PAIRS, site: str = SITE
) -> list[SideParts]:
    return [p for b in rm.batches(rm.tokenize_all(pairs)) for p in contributions(rm, sae, site, b, start, tolerance)]


def gap(p: SideParts) -> float:
    return abs(p.features + p.error - (p.end - p.start))


@pytest.mark.parametrize("architecture", [*DECODERS, *OTHERS, "qwen3_5_text", ENCODER])
@pytest.mark.parametrize("kind", ["mean", "zero"])
def test_features_and_error_make_up_the_distance_from_the_baseline(architecture: str, kind: str) -> None:
    rm, sae = shared_pm(architecture, gain=TAME), small_sae(bias=0.5)
    found = parts(rm, sae, start_of(rm, sae, kind), 1e-3, PAIRS[1:3])
    assert len(found) == 4
    distances = [abs(p.end - p.start) for p in found]
    assert max(distances) > (0.005 if architecture == ENCODER else 0.1)
    assert max(gap(p) for p in found) < (8e-3 if architecture == "opt" else 1.1e-3)  # OPT's relu has kinks
    assert all(abs(p.error) > 1e-4 for p in found)


@pytest.mark.parametrize("kind", ["mean", "zero"])
def test_the_gap_is_what_was_asked_for_and_a_smaller_one_takes_more_nodes(kind: str) -> None:
    rm, sae = shared_pm("llama", torch.float64, TAME), small_sae(bias=0.5)
    start = start_of(rm, sae, kind)
    found = {t: parts(rm, sae, start, t) for t in (1.0, 1e-3, 1e-5)}
    for tolerance, sides in found.items():
        assert max(gap(p) for p in sides) < tolerance + 2e-6
    nodes = [sum(p.nodes for p in sides) for sides in found.values()]
    assert nodes[0] < nodes[-1]
    assert nodes == sorted(nodes)


@pytest.mark.parametrize("kind", ["mean", "zero"])
def test_halving_every_panel_moves_no_part_by_more_than_the_gap_that_was_asked_for(kind: str) -> None:
    rm, sae, tolerance = shared_pm("gemma2", torch.float64, TAME), small_sae(bias=0.5), 1e-3
    start = start_of(rm, sae, kind)
    for batch in rm.batches(rm.tokenize_all(PAIRS)):
        path = Path(rm, SITE, batch, start.x)
        panels = integrate(path, tolerance)
        coarse = parts_along(path, panels, sae, start)
        fine = parts_along(path, [half for p in panels for half in p.halved()], sae, start)
        for a, b in zip(coarse, fine, strict=True):
            assert b.nodes == 2 * a.nodes
            assert abs(a.features - b.features) < tolerance
            assert abs(a.error - b.error) < tolerance


@pytest.mark.parametrize("architecture", ["gemma2", "bloom"])
def test_a_pair_has_the_panels_that_it_needs_whatever_pairs_are_in_its_batch(architecture: str) -> None:
    rm, sae = shared_pm(architecture, torch.float64, TAME), small_sae(bias=0.5)
    start = start_of(rm, sae, "mean")
    beside = {(p.pair, p.side): p for p in parts(rm, sae, start, 1e-5)}
    alone = {(i, p.side): p for i, pair in enumerate(PAIRS) for p in parts(rm, sae, start, 1e-5, [pair])}
    assert {key: p.nodes for key, p in beside.items()} == {key: p.nodes for key, p in alone.items()}
    assert len({p.nodes for p in alone.values()}) > 1
    for key, p in alone.items():
        assert p.features == pytest.approx(beside[key].features, abs=1e-6)
        assert p.error == pytest.approx(beside[key].error, abs=1e-6)


def dense(
    rm: RewardModel, sae: Sae, start: Baseline, ids: Tensor, first: int, nodes: int
) -> tuple[Tensor, float, float, float]:
    """(A_j [m], A_err, r(x0), r(x)) of one text, with full forwards through a hook and dense features."""
    read = rm.read_position(ids)
    batch = pad_texts([(0, "chosen", ids, 1, read)], 0)
    x = rm.streams(batch, [SITE])[SITE]

    def at(share: float) -> Tensor:
        point = x.clone()
        point[0, first : read + 1] = start.x.to(x) + share * (x[0, first : read + 1] - start.x.to(x))
        return point

    def reward(stream: Tensor) -> Tensor:
        return rm.rewards(batch, {SITE: lambda _x: stream})[0]

    gradient = torch.zeros_like(x)
    for point, weight in zip(*np.polynomial.legendre.leggauss(nodes), strict=True):
        stream = at(0.5 + 0.5 * float(point)).requires_grad_(True)
        with torch.enable_grad():
            gradient += 0.5 * float(weight) * torch.autograd.grad(reward(stream), stream)[0]
    g, span = gradient[0, first : read + 1].float(), x[0, first : read + 1].float()
    f = sae.encode(span)
    contribution = ((f - start.f) * (g @ sae.W_dec.T)).sum(0)
    error = (g * (span - sae.decode(f) - start.e)).sum()
    return contribution, float(error), float(reward(at(0.0))), float(reward(at(1.0)))


@pytest.mark.parametrize("architecture", ["llama", pytest.param("gemma3_text", marks=pytest.mark.slow), "bloom", ENCODER])
@pytest.mark.parametrize("kind", ["mean", "zero"])
def test_every_part_is_that_of_a_dense_integration_of_the_text_alone(architecture: str, kind: str) -> None:
    rm, sae = shared_pm(architecture, torch.float64, TAME), small_sae(bias=0.5)
    start = start_of(rm, sae, kind)
    tokens = rm.tokenize_all(PAIRS)
    limit = {"atol": 2e-5, "rtol": 1e-4}
    for found in parts(rm, sae, start, 1e-6):
        t = tokens[found.pair]
        contribution, error, r0, r = dense(rm, sae, start, t.side(found.side), t.divergence, 64)
        torch.testing.assert_close(found.effect, contribution[found.feature], **limit)
        silent = contribution.clone()
        silent[found.feature] = 0.0
        assert found.silent == pytest.approx(float(silent.sum()), abs=1e-4)
        assert (abs(found.silent) > 1e-4) == (kind == "mean")
        assert found.error == pytest.approx(error, abs=1e-4)
        assert found.start == pytest.approx(r0, abs=1e-5)
        assert found.end == pytest.approx(r, abs=1e-5)


def test_the_mean_baseline_is_the_mean_of_the_stream_and_the_zero_baseline_the_decoders_bias() -> None:
    rm, sae = shared_pm("llama"), small_sae(kind="gated")
    f, x = means(rm, sae)
    mean, zero = baseline(sae, "mean", f, x), baseline(sae, "zero")
    torch.testing.assert_close(mean.x, x, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mean.x, sae.decode(f) + mean.e, atol=1e-5, rtol=1e-5)
    assert torch.equal(zero.x, sae.b_dec)
    assert not zero.e.any()
    assert not zero.f.any()


@pytest.mark.parametrize(("architecture", "packs"), [("llama", True), ("llama", False), ("mistral", True)])
def test_a_pairs_ledger_is_an_identity_and_its_difference_the_scores(architecture: str, packs: bool) -> None:
    rm, sae = small_pm(architecture, gain=TAME), small_sae(bias=0.5)
    rm.capabilities = replace(rm.capabilities, packing=packs)
    tokens = rm.tokenize_all(PAIRS)
    sd = float(rm.score_tokens(tokens).delta.std())
    rows = list(ledger_rows(rm, sae, SITE, tokens, range(len(PAIRS)), start_of(rm, sae, "mean"), sd))
    assert sorted(pair for pair, _, _ in rows) == list(range(len(PAIRS)))
    delta = rm.score_tokens(tokens).delta
    for pair, row, sides in rows:
        assert set(sides) == set(SIDES)
        total = row["features"] + row["error"] + row["remainder"] + row["gap"]
        assert row["delta_r"] == pytest.approx(float(delta[pair]), abs=1e-5)
        assert row["delta_r"] == pytest.approx(total, abs=1e-9)
        assert abs(row["gap"]) <= 0.01 * max(abs(row["delta_r"]), 0.1 * sd)
        assert row["nodes"] >= 8
        assert row["closed"]
        assert row["remainder"] == pytest.approx(sides["chosen"].start - sides["rejected"].start)


def test_a_ledger_that_does_not_close_says_so() -> None:
    """Without halvings the two first panels are too coarse, and some gaps stay open."""
    rm, sae = shared_pm("llama", gain=TAME), small_sae(bias=0.5)
    tokens = rm.tokenize_all(PAIRS)
    sd, start, closed = float(rm.score_tokens(tokens).delta.std()), baseline(sae, "zero"), []
    for halvings in (0, 6):
        rows = [row for _, row, _ in ledger_rows(rm, sae, SITE, tokens, range(len(PAIRS)), start, sd, halvings=halvings)]
        for row in rows:
            assert row["closed"] == (abs(row["gap"]) <= 0.01 * max(abs(row["delta_r"]), 0.1 * sd))
        closed.append(sum(row["closed"] for row in rows))
    assert closed[0] < closed[1] == len(PAIRS)


def test_sides_that_differ_only_in_length_differ_by_the_remainder_alone_at_the_baseline() -> None:
    """With x0 on the whole span nothing of the text is left: responses of equal length then score the same."""
    rm, sae = shared_pm("llama"), small_sae()
    pairs = [PAIRS[0]]
    (batch,) = rm.batches(rm.tokenize_all(pairs))
    chosen, rejected = contributions(rm, sae, "resid_post.1", batch, start_of(rm, sae, "mean"), 1e9)
    assert batch.texts[0].span.numel() != batch.texts[1].span.numel()
    assert chosen.start != pytest.approx(rejected.start, abs=1e-4)
    cut = min(t.span.numel() for t in batch.texts)
    tokens = rm.tokenize(PAIRS[0])
    p = tokens.divergence
    equal = type(tokens)(tokens.chosen[: p + cut], tokens.rejected[: p + cut], p)
    (batch,) = rm.batches([equal])
    chosen, rejected = contributions(rm, sae, "resid_post.3", batch, start_of(rm, sae, "mean", "resid_post.3"), 1e9)
    assert chosen.end != pytest.approx(rejected.end, abs=1e-2)
    assert chosen.start == pytest.approx(rejected.start, abs=1e-5)


def test_an_empty_span_contributes_nothing() -> None:
    rm, sae = small_pm("llama", append_eos=True, pad_token_id=EOS), small_sae()
    start = start_of(rm, sae, "mean")
    rows = {pair: sides for pair, _, sides in ledger_rows(rm, sae, SITE, rm.tokenize_all(PAIRS), range(4), start, 1.0)}
    chosen = rows[2]["chosen"]
    assert chosen.features == chosen.error == 0.0
    assert chosen.start == pytest.approx(chosen.end, abs=1e-6)


def test_shares_sum_to_one() -> None:
    rng = np.random.default_rng(0)
    parts = rng.normal(size=(40, 4)) * [1.0, 0.5, 3.0, 0.01] + [0, 2, -5, 0]
    delta = parts.sum(1)
    found = shares(parts, delta)
    assert found.sum() == pytest.approx(1.0)
    expected = [np.cov(parts[:, i], delta)[0, 1] / np.var(delta, ddof=1) for i in range(4)]
    np.testing.assert_allclose(found, expected)
    assert shares(np.stack([delta, 0 * delta], 1), delta).tolist() == pytest.approx([1.0, 0.0])

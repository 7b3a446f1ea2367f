"""Loss and every gradient against slow dense twins in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from rmscope.sae import kernels
from rmscope.sae.batchtopk import BatchTopKTraining
from rmscope.sae.config import SaeConfig
from rmscope.sae.gated import GatedSae, GatedTraining
from rmscope.sae.jumprelu import JumpReluSae, JumpReluTraining
from rmscope.sae.kernels import (
    Dense,
    Sparse,
    batch_top_entries,
    open_entries,
    open_pattern,
    places,
    top_entries,
    top_k,
    upper_quantiles,
)
from rmscope.sae.matryoshka import MatryoshkaTraining
from rmscope.sae.standard import StandardSae, StandardTraining
from rmscope.sae.topk import TopKSae, TopKTraining
from rmscope.sae.training import Training, geometric_median
from tests.sae.twins import (
    gated_loss,
    jumprelu_loss,
    leaves,
    matryoshka_loss,
    standard_loss,
    topk_loss,
)

N, D, M = 37, 12, 40


def random_weights(sae: torch.nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    sae.double()
    for name, p in sae.named_parameters():
        size = 0.5 if name.startswith(("b_", "r_")) else 1.0
        p.data.copy_(size * torch.randn(p.shape, generator=generator, dtype=torch.float64))


def agrees(training: Training, twin: dict[str, torch.Tensor], loss: torch.Tensor, **given: object) -> None:
    x = given.pop("x")
    step = training.step(x, **given)
    loss.backward()
    assert step.loss == pytest.approx(float(loss.detach()), rel=1e-12)
    grads = {n: torch.zeros_like(w) if w.grad is None else w.grad for n, w in twin.items()}
    expected = {**grads, "W_enc.T": grads.pop("W_enc").t()}
    del expected["W_enc"]
    assert step.gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(step.gradients[name], gradient, rtol=1e-10, atol=1e-12, msg=name)


def some_x(seed: int = 1) -> torch.Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("n_dead", [0, 1, 3, 30])
@pytest.mark.parametrize("auxk", [None, 2])
def test_topk(n_dead: int, auxk: int | None) -> None:
    sae, x = TopKSae(D, M, k=5), some_x()
    random_weights(sae)
    dead = torch.arange(M) < n_dead
    config = SaeConfig(auxk_alpha=0.3, auxk=auxk)
    twin = leaves(sae)
    loss = topk_loss(twin, x, 5, dead, auxk or D // 2, 0.3)
    agrees(TopKTraining(sae, config), twin, loss, x=x, dead=dead)


def test_a_step_leaves_nothing_behind_in_the_next() -> None:
    sae = TopKSae(D, M, k=5)
    random_weights(sae)
    training, dead = TopKTraining(sae, SaeConfig()), torch.arange(M) < 9
    training.step(some_x(3), dead)
    twin = leaves(sae)
    agrees(training, twin, topk_loss(twin, some_x(4), 5, None, 6, 0.0), x=some_x(4), dead=None)


@pytest.mark.parametrize("n_dead", [0, 3, 30])
@pytest.mark.parametrize("prefixes", [None, (3, 11), (1, 2, 3, 40)])
def test_batchtopk_and_matryoshka(n_dead: int, prefixes: tuple[int, ...] | None) -> None:
    """Without prefixes, BatchTopK: the nested loss with the whole dictionary as its only one."""
    sae, x = JumpReluSae(D, M), some_x()
    random_weights(sae)
    dead = torch.arange(M) < n_dead
    config = SaeConfig(k=5, auxk_alpha=0.3, prefixes=prefixes)
    training = (MatryoshkaTraining if prefixes else BatchTopKTraining)(sae, config)
    training.begin(some_x(9))
    twin = leaves(sae)
    sizes = (*(size for size in prefixes or () if size < M), M)
    agrees(training, twin, matryoshka_loss(twin, x, 5, sizes, dead, D // 2, 0.3), x=x, dead=dead)
    assert training.step(x).l0 == 5


def in_both_patterns(monkeypatch: pytest.MonkeyPatch) -> Iterator[type]:
    """Whatever the density: first all entries, then listed ones."""
    for sparse_below, pattern in ((0.0, Dense), (2.0, Sparse)):
        monkeypatch.setattr(kernels, "SPARSE_BELOW", sparse_below)
        yield pattern


@pytest.mark.parametrize("opens", [0.0, -2.5, -9.0, -99.0])
def test_gated_dense_and_sparse(opens: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same gradients whichever pattern is used, from half-open gates to gates that never open."""
    sae, x = GatedSae(D, M), some_x()
    random_weights(sae)
    sae.b_gate.data += opens
    for pattern in in_both_patterns(monkeypatch):
        assert isinstance(open_pattern(x, sae.W_enc.data.t(), sae.b_gate, 1.0)[0], pattern)
        training = GatedTraining(sae, SaeConfig(architecture="gated", l1=0.7))
        twin = leaves(sae)
        agrees(training, twin, gated_loss(twin, x, 0.7 * 0.25), x=x, ramp=0.25)


@pytest.mark.parametrize("n_dead", [0, 3])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 4.0, 99.0])
def test_jumprelu_dense_and_sparse(threshold: float, n_dead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From thresholds whose kernel reaches below 0 to thresholds that are never reached."""
    sae, x, dead = JumpReluSae(D, M), some_x(), torch.arange(M) < n_dead
    random_weights(sae)
    sae.threshold.data.abs_().add_(threshold)
    for _ in in_both_patterns(monkeypatch):
        training = JumpReluTraining(sae, SaeConfig(l0=0.7, bandwidth=0.9, preact_alpha=0.2))
        twin = leaves(sae)
        agrees(training, twin, jumprelu_loss(twin, x, 0.7 * 0.25, 0.9, dead, 0.2), x=x, dead=dead, ramp=0.25)


def test_the_jumps_kernel_is_a_finite_difference() -> None:
    """With a rectangle, the penalty's gradient is its own mean slope over the bandwidth, exactly."""
    sae, x, width = JumpReluSae(D, M), some_x(), 0.5
    random_weights(sae)
    sae.threshold.data.abs_().add_(1)
    with_penalty, without = (
        JumpReluTraining(sae, SaeConfig(l0=l0, bandwidth=width)).step(x).gradients["threshold"] for l0 in (1.0, 0.0)
    )
    h = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    up, down = ((h > sae.threshold + side).double().mean(0) for side in (width / 2, -width / 2))
    torch.testing.assert_close(with_penalty - without, (up - down) / width)


@pytest.mark.parametrize("shift", [0.0, -4.0, -99.0])
def test_standard_dense_and_sparse(shift: float, monkeypatch: pytest.MonkeyPatch) -> None:
    sae, x = StandardSae(D, M), some_x()
    random_weights(sae)
    sae.b_enc.data += shift
    for _ in in_both_patterns(monkeypatch):
        training = StandardTraining(sae, SaeConfig(l1=0.7))
        twin = leaves(sae)
        agrees(training, twin, standard_loss(twin, x, 0.7 * 0.25), x=x, ramp=0.25)


def test_a_step_goes_sparse_once_the_last_one_was() -> None:
    sae, x = GatedSae(D, M), some_x()
    random_weights(sae)
    sae.b_gate.data -= 9
    training = GatedTraining(sae, SaeConfig(architecture="gated"))
    assert training.density == 1
    training.step(x)
    assert training.density < kernels.SPARSE_BELOW
    assert isinstance(open_pattern(x, sae.W_enc.data.t(), sae.b_gate, training.density)[0], Sparse)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("fast", [False, True])
def test_the_largest_of_a_batch_do_not_depend_on_the_guess(
    fast: bool, narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if narrow:
        monkeypatch.setitem(kernels.TILE, "cpu", (4096, 200))
        monkeypatch.setattr(kernels, "ROWS", 1)
    generator = torch.Generator().manual_seed(0)
    x, rows, bias = (torch.randn(s, generator=generator) for s in ((64, 96), (512, 96), (512,)))
    h = x @ rows.t() + bias
    best = h.flatten().topk(500)
    for guess in (-3.0, 0.0, 0.1, float(best.values[-1]) * 0.99, float(best.values[0]) * 1.1, 1e6):
        token, feature, value = batch_top_entries(x, rows, bias, 500, guess, fast)
        assert torch.equal(token * 512 + feature, best.indices.sort().values)
        torch.testing.assert_close(value, h[token, feature], rtol=1e-5, atol=1e-4)
    token, feature, value = batch_top_entries(x, rows, bias - 30, 5000, 1.0, fast)
    assert len(value) == int((h > 30).sum()) < 5000
    assert (value > 0).all()


def test_exceeded_on_a_share_of_the_tokens() -> None:
    x, rows = some_x(), torch.eye(D, dtype=torch.float64)
    for share, count in ((0.2, 7), (1e-9, 1)):
        assert ((x > upper_quantiles(x, rows, share)).sum(dim=0) == count).all()


def test_top_k_over_blocks_is_exact() -> None:
    h = torch.randn(11, 8192, generator=torch.Generator().manual_seed(0))
    values, features = top_k(h, 32)
    assert torch.equal(values.sort().values, h.topk(32).values.sort().values)
    assert torch.equal(h.gather(1, features), values)


def test_the_running_top_k_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over tiles of a few tokens and features, the last ones ragged, some narrower than k."""
    generator = torch.Generator().manual_seed(0)
    x, rows, bias = (torch.randn(s, generator=generator).double() for s in ((37, 12), (500, 12), (500,)))
    h = x @ rows.t() + bias
    best = h.topk(24)
    monkeypatch.setattr(kernels, "ROWS", 1)
    for tile in ((1, 1), (90, 30), (700, 99), (5000, 500), (1 << 22, 1 << 14)):
        monkeypatch.setitem(kernels.TILE, "cpu", tile)
        values, features = top_entries(x, rows, bias, 24)
        assert torch.equal(features.sort().values, best.indices.sort().values)
        torch.testing.assert_close(values, h.gather(1, features))
        largest = max(t.numel() for _, _, t in kernels.tiles(x, rows, bias, False))
        assert largest <= max(tile[0], min(tile[1], 500))


@pytest.mark.parametrize(("n", "m"), [(1, 8), (37, 64), (37, 61), (5, 4096), (0, 16)])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.7, 1.0])
def test_places_are_nonzeros(n: int, m: int, share: float) -> None:
    mask = torch.rand(n, m, generator=torch.Generator().manual_seed(0)) < share
    row, column = places(mask)
    assert torch.equal(torch.stack([row, column], dim=1), mask.nonzero())


def test_candidates_in_bfloat16_end_in_float32_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernels.TILE, "cpu", (4096, 200))
    monkeypatch.setattr(kernels, "ROWS", 1)
    generator = torch.Generator().manual_seed(0)
    x, rows, bias = (torch.randn(s, generator=generator) for s in ((64, 96), (512, 96), (512,)))
    values, features = top_entries(x, rows, bias, 16, fast=True)
    exact = x @ rows.t() + bias
    torch.testing.assert_close(values, exact.gather(1, features), rtol=1e-5, atol=1e-4)
    best = exact.topk(16)
    agree = (features.sort().values == best.indices.sort().values).float().mean()
    assert agree > 0.99
    opened = torch.zeros(64, 512, dtype=torch.bool)
    for token, feature, product in open_entries(x, rows, bias, fast=True):
        opened[token, feature] = True
        assert torch.equal((token * 512 + feature).sort().values, token * 512 + feature)
        torch.testing.assert_close(product + bias[feature], exact[token, feature], rtol=1e-5, atol=1e-4)
    assert not ((exact > 0) & ~opened).any()
    assert (opened & (exact <= 0)).float().mean() < 0.05


def test_geometric_median_is_not_moved_by_outliers() -> None:
    x = torch.randn(501, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:50] += 1000
    point = geometric_median(x).requires_grad_()
    assert float(point.detach().norm()) < 0.5
    (x - point).norm(dim=1).sum().backward()
    assert float(point.grad.norm()) < 1e-2

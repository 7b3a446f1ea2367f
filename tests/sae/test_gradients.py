"""Loss and every gradient against slow dense twins in float64."""

from __future__ import annotations

import pytest
import torch

from rmscope.sae import kernels
from rmscope.sae.config import SaeConfig
from rmscope.sae.gated import GatedSae, GatedTraining
from rmscope.sae.kernels import Dense, Sparse, open_entries, top_entries, top_k
from rmscope.sae.topk import TopKSae, TopKTraining
from rmscope.sae.training import Training, geometric_median
from tests.sae.twins import gated_loss, leaves, topk_loss

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
    expected = {
        ("W_enc.T" if n == "W_enc" else n): w.grad.t() if n == "W_enc" else w.grad for n, w in twin.items()
    }
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


@pytest.mark.parametrize("opens", [0.0, -2.5, -9.0, -99.0])
def test_gated_dense_and_sparse(opens: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same gradients whichever pattern is used, from half-open gates to gates that never open."""
    sae, x = GatedSae(D, M), some_x()
    random_weights(sae)
    sae.b_gate.data += opens
    for density, sparse_below in ((1.0, 0.0), (0.0, 2.0)):
        monkeypatch.setattr("rmscope.sae.gated.SPARSE_BELOW", sparse_below)
        training = GatedTraining(sae, SaeConfig(architecture="gated", l1=0.7))
        training._density = density
        assert isinstance(training._entries(x), Sparse if sparse_below else Dense)
        training._density = density
        twin = leaves(sae)
        agrees(training, twin, gated_loss(twin, x, 0.7 * 0.25), x=x, ramp=0.25)


def test_gated_goes_sparse_once_its_gates_are() -> None:
    sae, x = GatedSae(D, M), some_x()
    random_weights(sae)
    training = GatedTraining(sae, SaeConfig(architecture="gated"))
    assert isinstance(training._entries(x), Dense)
    sae.b_gate.data -= 9
    training.step(x)
    assert isinstance(training._entries(x), Sparse)


def test_top_k_over_blocks_is_exact() -> None:
    h = torch.randn(11, 8192, generator=torch.Generator().manual_seed(0))
    values, features = top_k(h, 32)
    assert torch.equal(values.sort().values, h.topk(32).values.sort().values)
    assert torch.equal(h.gather(1, features), values)


def test_candidates_in_bfloat16_end_in_float32_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CHUNK_ENTRIES", 4096)
    generator = torch.Generator().manual_seed(0)
    x, rows, bias = (torch.randn(s, generator=generator) for s in ((64, 96), (512, 96), (512,)))
    values, features = top_entries(x, rows, bias, 16, fast=True)
    exact = x @ rows.t() + bias
    torch.testing.assert_close(values, exact.gather(1, features), rtol=1e-5, atol=1e-4)
    best = exact.topk(16)
    agree = (features.sort().values == best.indices.sort().values).float().mean()
    assert agree > 0.99
    opened = open_entries(x, rows, bias, fast=True)
    assert not ((exact > 0) & ~opened).any()
    assert (opened & (exact <= 0)).float().mean() < 0.05


def test_geometric_median_is_not_moved_by_outliers() -> None:
    x = torch.randn(501, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:50] += 1000
    point = geometric_median(x).requires_grad_()
    assert float(point.detach().norm()) < 0.5
    (x - point).norm(dim=1).sum().backward()
    assert float(point.grad.norm()) < 1e-2

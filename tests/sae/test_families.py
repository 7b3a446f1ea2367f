"""What sets the families apart, on a planted dictionary; and sweeps."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
import torch

from rmscope.activations.store import ActivationStore
from rmscope.errors import InputError
from rmscope.sae import Sae, SaeConfig, train_saes
from rmscope.sae.gated import GatedSae, GatedTraining
from rmscope.sae.jumprelu import JumpReluSae, JumpReluTraining
from rmscope.sae.kernels import SPARSE_BELOW
from rmscope.sae.matryoshka import prefix_sizes
from rmscope.sae.standard import StandardSae, StandardTraining
from rmscope.sae.training import START_OPEN, draw
from tests.sae.planted import planted_activations, store_of
from tests.sae.test_trainer import DIRECTIONS, FAMILIES, D, KilledError, config, kill_at
from tests.sae.twins import fvu


@pytest.fixture
def x() -> torch.Tensor:
    return planted_activations(3000, D, DIRECTIONS, 3)[0]


def train_sae(tmp_path: Path, x: torch.Tensor, **settings: object) -> Sae:
    return train_saes(store_of(tmp_path, {"embed": x}), config(**settings))["embed"]


def with_drawn_weights(sae: Sae, x: torch.Tensor) -> Sae:
    draw(sae, x.mean(dim=0), torch.Generator().manual_seed(0))
    return sae


def test_batchtopk_gives_some_tokens_more(tmp_path: Path, x: torch.Tensor) -> None:
    x[:1500] = 0.3 * (x[:1500] - x.mean(0)) + x.mean(0)
    sae = train_sae(tmp_path, x, architecture="batchtopk", epochs=20)
    assert isinstance(sae, JumpReluSae)
    assert len(sae.threshold.unique()) == 1
    counts = (sae.encode(x) > 0).sum(dim=1).float()
    assert counts[:1500].mean() < 2 < 4 < counts[1500:].mean()
    assert counts[1500:].max() > counts[1500:].min()


def test_matryoshkas_prefix_reconstructs_by_itself(tmp_path: Path, x: torch.Tensor) -> None:
    def by_prefix(sae: Sae, size: int) -> float:
        f = sae.encode(x)
        f[:, size:] = 0
        return fvu(x, sae.decode(f))

    settings = {"d_sae": 64, "epochs": 25, "dead_after_tokens": 20_000}
    nested = train_sae(tmp_path / "m", x, architecture="matryoshka", prefixes=(8, 16), **settings)
    plain = train_sae(tmp_path / "b", x, architecture="batchtopk", **settings)
    by_size = [by_prefix(nested, size) for size in (8, 16, 64)]
    assert by_size == sorted(by_size, reverse=True)
    for size in (8, 16):
        assert by_prefix(nested, size) < by_prefix(plain, size) - 0.1


def test_prefixes() -> None:
    assert prefix_sizes(SaeConfig(), 65536) == (2048, 6144, 14336, 30720, 65536)
    assert prefix_sizes(SaeConfig(), 4) == (1, 2, 4)
    assert prefix_sizes(SaeConfig(prefixes=(3, 9)), 9) == prefix_sizes(SaeConfig(prefixes=(3,)), 9) == (3, 9)
    for wrong in ((3, 3), (9, 3), (0, 3), (3, 12)):
        with pytest.raises(InputError, match="do not nest in 9 features"):
            prefix_sizes(SaeConfig(prefixes=wrong), 9)


def test_jumprelus_penalty_moves_its_thresholds(tmp_path: Path, x: torch.Tensor) -> None:
    low, high = (train_sae(tmp_path / str(l0), x, architecture="jumprelu", epochs=25, l0=l0) for l0 in (0.05, 2.0))
    assert isinstance(low, JumpReluSae)
    assert len(low.threshold.unique()) > 50
    assert (low.threshold >= 0).all()
    l0_low, l0_high = (float((sae.encode(x) > 0).float().sum(1).mean()) for sae in (low, high))
    assert l0_high < 0.8 * l0_low


def test_gates_and_thresholds_start_sparse(x: torch.Tensor) -> None:
    for sae, training in ((GatedSae(D, 64), GatedTraining), (JumpReluSae(D, 64), JumpReluTraining)):
        with_drawn_weights(sae, x)
        begun = training(sae, SaeConfig())
        begun.begin(x)
        assert begun.density < SPARSE_BELOW
        fires = (sae.encode(x) > 0).float().mean(dim=0)
        assert torch.allclose(fires, torch.full((64,), START_OPEN), atol=1e-3)


def test_standard_ends_with_unit_directions(x: torch.Tensor) -> None:
    sae = with_drawn_weights(StandardSae(D, 64), x)
    training = StandardTraining(sae, SaeConfig())
    training.begin(x)
    sae.W_dec.mul_(1 + torch.rand(64, 1))
    x_hat, weighted = sae(x), sae.encode(x) * sae.W_dec.norm(dim=1)
    training.finish()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))
    torch.testing.assert_close(sae(x), x_hat, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae.encode(x), weighted, rtol=1e-4, atol=1e-5)


def test_revived_gates_look_at_what_is_lost(x: torch.Tensor) -> None:
    sae, dead = with_drawn_weights(GatedSae(D, 64), x), torch.arange(64) < 5
    training = GatedTraining(sae, SaeConfig())
    training.begin(x)
    sae.b_gate[dead] = -1e9
    before = sae.W_dec.clone()
    residual = torch.full_like(x, 1e-6)
    residual[70:90] = 1.0
    assert training.revive(x, residual, dead, torch.Generator().manual_seed(0))
    lost = torch.nn.functional.normalize(x[70:90] - sae.b_dec)
    assert torch.allclose((sae.W_dec[dead] @ lost.t()).amax(dim=1), torch.ones(5), atol=1e-5)
    assert torch.allclose((sae.encode(x) > 0).float().mean(0)[dead], torch.full((5,), START_OPEN), atol=1e-3)
    assert torch.equal(sae.W_dec[~dead], before[~dead])


def test_dead_gates_come_back(tmp_path: Path, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = GatedTraining.begin

    def half_dead(self: GatedTraining, sample: torch.Tensor) -> None:
        begin(self, sample)
        self.sae.b_gate[:32] = -1e9

    monkeypatch.setattr(GatedTraining, "begin", half_dead)
    settings = {"architecture": "gated", "l1": 1.0, "epochs": 12, "dead_after_tokens": 2048}
    store = store_of(tmp_path / "acts", {"embed": x})
    sae = train_saes(store, config(**settings), tmp_path / "whole")["embed"]
    assert float((sae.encode(x) > 0).any(dim=0).float().mean()) > 0.8
    with pytest.raises(KilledError):
        train_saes(store, config(**settings), tmp_path / "cut", progress=kill_at(61))
    assert train_saes(store, config(**settings), tmp_path / "cut")["embed"].identity() == sae.identity()
    never = config(**settings | {"dead_after_tokens": 10**9})
    assert not (train_saes(store, never)["embed"].encode(x) > 0).any(dim=0)[:32].any()


def test_a_sweep_reads_once_and_trains_each_as_alone(
    tmp_path: Path, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_of(tmp_path / "acts", {"embed": x, "resid_post.0": x.flip(1)})
    sweep = {name: config(epochs=2, **FAMILIES[name]) for name in ("topk", "gated", "batchtopk")}
    sweep["short"] = config(epochs=1)
    site = "resid_post.0"
    alone = {name: train_saes(store, given, sites=[site])[site].identity() for name, given in sweep.items()}

    read, rows = [], ActivationStore.rows

    def counted(self: ActivationStore, site: str, index: torch.Tensor) -> torch.Tensor:
        read.append(len(index))
        return rows(self, site, index)

    monkeypatch.setattr(ActivationStore, "rows", counted)
    saes = train_saes(store, sweep, tmp_path / "saes")
    assert list(saes) == [(site, name) for site in store.sites for name in sweep]
    assert {name: saes[site, name].identity() for name in sweep} == alone
    assert sum(n == 256 for n in read) == 2 * (2 * 2700 // 256)  # once a step and site, for four trainings
    folder = tmp_path / "saes" / "embed" / "short"
    assert Sae.load(folder).identity() == saes["embed", "short"].identity()
    assert pl.read_parquet(folder / "training.parquet")["step"][-1] == 10

    again = train_saes(store, sweep, tmp_path / "saes", progress=kill_at(0))
    assert {key: sae.identity() for key, sae in again.items()} == {key: sae.identity() for key, sae in saes.items()}
    for other in ({"seed": 1}, {"batch_size": 128}):
        with pytest.raises(InputError, match="share batch_size and seed"):
            train_saes(store, {"a": config(), "b": config(**other)})

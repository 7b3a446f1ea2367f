"""Training that goes on from existing weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rmscope.errors import InputError
from rmscope.sae import Sae, SaeConfig, measure_sae, train_saes
from rmscope.sae.initial import settled, start_from
from tests.sae.planted import planted_activations, store_of
from tests.sae.sources import SOURCES
from tests.sae.test_sae import KINDS, random_sae
from tests.sae.test_trainer import DIRECTIONS, FAMILIES, D, config

SITE = "resid_post.1"
STILL = {"lr": 1e-12, "tokens": 256, "warmup": 0.0}
"""Settings of a training that moves nothing."""


def unit(sae: Sae) -> Sae:
    sae.W_dec.data /= sae.W_dec.norm(dim=1, keepdim=True)
    return sae


@pytest.mark.parametrize("kind", KINDS)
def test_the_copy_in_the_units_of_training_computes_the_same(kind: str) -> None:
    sae, x = random_sae(kind), torch.randn(50, 10, generator=torch.Generator().manual_seed(3))
    sae = unit(sae) if kind == "topk" else sae
    copy = start_from(sae, settled(SaeConfig(init="x"), sae), 1.7, torch.Generator())
    torch.testing.assert_close(copy(1.7 * x) / 1.7, sae(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(copy.W_dec.norm(dim=1), torch.ones(sae.m))


@pytest.mark.parametrize("kind", KINDS)
def test_a_feature_whose_row_is_zero_is_drawn_anew(kind: str) -> None:
    sae = random_sae(kind)
    sae.W_dec.data[4] = 0
    copy = start_from(sae, settled(SaeConfig(init="x"), sae), 1.7, torch.Generator().manual_seed(1))
    assert all(torch.isfinite(p).all() for p in copy.parameters())
    assert float(copy.W_dec[4].norm()) == pytest.approx(1)
    assert float(torch.cosine_similarity(copy.W_dec[4], copy.W_enc[:, 4], dim=0)) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_that_moves_nothing_gives_the_initial_sae(family: str, tmp_path: Path) -> None:
    x, _ = planted_activations(2000, D, DIRECTIONS, 3)
    store = store_of(tmp_path / "store", {SITE: x})
    first = train_saes(store, config(tokens=20_000, **FAMILIES[family]), tmp_path / "first")[SITE]
    same = train_saes(store, config(init=str(tmp_path / "first"), **FAMILIES[family] | STILL | {"d_sae": None}))[SITE]
    assert (type(same), same.m, same.metadata["trained_as"]) == (type(first), 64, family)
    moved = float((same(x) - first(x)).square().sum() / (x - x.mean(0)).square().sum())
    assert moved < (0.02 if family in ("batchtopk", "matryoshka") else 1e-6)  # there the batch moves the threshold


def test_going_on_starts_where_the_first_training_ended(tmp_path: Path) -> None:
    x, _ = planted_activations(3000, D, DIRECTIONS, 3)
    store = store_of(tmp_path / "store", {SITE: x})
    train_saes(store, config(tokens=100_000), tmp_path / "first")
    short = config(tokens=2048, init=str(tmp_path / "first" / SITE))
    fvu = [measure_sae(train_saes(store, c)[SITE], [x]).fvu for c in (short, short.model_copy(update={"init": None}))]
    assert fvu[0] < 0.5 * fvu[1]


def test_other_initial_weights_are_another_training(tmp_path: Path) -> None:
    x, _ = planted_activations(2000, D, DIRECTIONS, 3)
    store = store_of(tmp_path / "store", {SITE: x})
    for seed in (0, 1):
        train_saes(store, config(tokens=2048, seed=seed), tmp_path / f"first{seed}")
    (tmp_path / "init").symlink_to(tmp_path / "first0")
    found = []
    for seed in (0, 1):
        (tmp_path / "init").unlink()
        (tmp_path / "init").symlink_to(tmp_path / f"first{seed}")
        found.append(train_saes(store, config(tokens=512, init=str(tmp_path / "init")), tmp_path / "out")[SITE])
    assert found[0].identity() != found[1].identity()


def test_the_weights_decide_the_family_the_size_and_k() -> None:
    for kind in KINDS:
        assert settled(SaeConfig(init="x"), random_sae(kind)).architecture == kind
    chosen = settled(SaeConfig(init="x", architecture="batchtopk"), random_sae("jumprelu"))
    assert (chosen.architecture, chosen.d_sae) == ("batchtopk", 32)
    assert settled(SaeConfig(init="x"), random_sae("topk")).k == 6
    assert settled(SaeConfig(init="x", k=3), random_sae("topk")).k == 3
    stated = random_sae("jumprelu")
    stated.metadata = {"trained_as": "matryoshka", "l0": 4.4}
    assert (settled(SaeConfig(init="x"), stated).architecture, settled(SaeConfig(init="x"), stated).k) == ("matryoshka", 4)
    with pytest.raises(InputError, match=r"is a topk SAE, and the settings ask for gated"):
        settled(SaeConfig(init="x", architecture="gated"), random_sae("topk"))
    with pytest.raises(InputError, match="has 32 features, and d_sae is 64"):
        settled(SaeConfig(init="x", d_sae=64), random_sae("topk"))


def test_initial_weights_of_another_site_width_or_family_are_refused(tmp_path: Path) -> None:
    x, _ = planted_activations(600, D, DIRECTIONS, 3)
    store = store_of(tmp_path / "store", {SITE: x})
    random_sae("topk").save(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"was trained at resid_post\.2, and is to be used at resid_post\.1"):
        train_saes(store, config(d_sae=None, init=str(tmp_path / "elsewhere")))
    narrow = random_sae("topk")
    narrow.site = ""
    narrow.save(tmp_path / "narrow1")
    with pytest.raises(InputError, match=r"reads a stream of width 10, and resid_post\.1 has 24"):
        train_saes(store, config(d_sae=None, init=str(tmp_path / "narrow{L}")))
    pursuit = next(source for source in SOURCES if source.family == "matching_pursuit")
    (tmp_path / "pursuit").mkdir()
    with pytest.raises(InputError, match="cannot go on from a matching_pursuit SAE"):
        settled(SaeConfig(init="x"), Sae.load(pursuit.write(tmp_path / "pursuit")))

"""An SAE of another model, layer or scale is noticed; one that fits is not."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from rmscope.sae import Sae, train_saes
from rmscope.sae.fit import measure_fit, same_model
from rmscope.sae.metrics import measure_sae
from tests.sae.planted import planted_activations, store_of
from tests.sae.test_trainer import DIRECTIONS, D, config

X, _ = planted_activations(3000, D, DIRECTIONS, 3)
OTHER, _ = planted_activations(3000, D, DIRECTIONS, 3, seed=9)


@pytest.fixture(scope="module", params=["topk", "jumprelu"])
def sae(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Sae:
    store = store_of(tmp_path_factory.mktemp("store"), {"resid_post.1": X})
    return train_saes(store, config(tokens=100_000, architecture=request.param, l0=0.3))["resid_post.1"]


def test_on_its_own_stream_nothing_is_said_and_the_figures_are_those_of_the_metrics(sae: Sae) -> None:
    fit, figures = measure_fit(sae, X), measure_sae(sae, [X])
    assert fit.doubts() == []
    assert (fit.fvu, fit.l0, fit.dead) == pytest.approx((figures.fvu, figures.l0, figures.dead))
    assert fit.shuffled_fvu is not None
    assert fit.fvu < 0.5 * fit.shuffled_fvu


def test_on_another_stream_it_is_said(sae: Sae) -> None:
    assert any("worse" in doubt or "no better" in doubt for doubt in measure_fit(sae, OTHER).doubts())


@pytest.mark.parametrize("scale", [0.05, 20.0])
def test_at_another_scale_it_is_said(sae: Sae, scale: float) -> None:
    assert measure_fit(sae, scale * X).doubts()


def test_directions_dealt_to_other_features_are_no_better_than_shuffled_ones(sae: Sae) -> None:
    dealt = copy.deepcopy(sae)
    dealt.W_dec.data = dealt.W_dec[torch.randperm(sae.m, generator=torch.Generator().manual_seed(4))]
    assert measure_fit(dealt, X).doubts()


def test_what_is_stated_is_compared(sae: Sae) -> None:
    other = copy.deepcopy(sae)
    other.metadata = {"l0": 60.0, "fvu": 0.02}
    other.cfg = {}
    fit = measure_fit(other, X) if "k" not in sae.cfg else None
    if fit is None:  # a TopK SAE states its k itself, and always keeps it
        assert measure_fit(sae, X).stated_l0 == sae.cfg["k"]
        return
    assert (fit.stated_fvu, fit.stated_l0, fit.doubts()) == (0.02, 60.0, ["far fewer of its features fire than stated"])
    told = (
        f"FVU {fit.fvu:.3g} (with shuffled decoder rows {fit.shuffled_fvu:.3g}, stated: 0.02), L0 {fit.l0:.3g} (stated: 60)"
    )
    assert fit.figures().startswith(told)


def test_a_models_name_is_compared_without_its_host() -> None:
    assert same_model("google/gemma-2-2b", ["pm", "mirror/Gemma-2-2B/"])
    assert same_model("gemma-2-2b", ["google/gemma-2-2b"])
    assert not same_model("google/gemma-2-2b", ["google/gemma-2-9b", "pm"])


def test_training_states_its_own_figures(sae: Sae, tmp_path: Path) -> None:
    sae.save(tmp_path)
    assert 0 < Sae.load(tmp_path).metadata["fvu"] < 0.5

"""Training on a planted dictionary, resume to the same bytes, and the folder that is left."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
import torch

from rmscope.errors import InputError
from rmscope.io import Progress
from rmscope.sae import Sae, SaeConfig, measure_sae, train_saes
from tests.sae.planted import planted_activations, store_of

D, DIRECTIONS = 24, 40


def config(**settings: object) -> SaeConfig:
    return SaeConfig(
        **{
            "d_sae": 64,
            "k": 3,
            "batch_size": 256,
            "lr": 3e-3,
            "amp": False,
            "checkpoint_steps": 7,
            **settings,
        }
    )


FAMILIES = {
    "topk": {},
    "batchtopk": {"architecture": "batchtopk"},
    "matryoshka": {"architecture": "matryoshka", "prefixes": (48,)},
    "jumprelu": {"architecture": "jumprelu", "l0": 0.3},
    "gated": {"architecture": "gated", "l1": 2.0},
    "standard": {"architecture": "standard", "l1": 1.0},
}


@pytest.mark.parametrize("settings", [*FAMILIES.values(), {"amp": True}], ids=[*FAMILIES, "topk amp"])
def test_planted_directions_are_found(tmp_path: Path, settings: dict[str, object]) -> None:
    x, v = planted_activations(6000, D, DIRECTIONS, 3)
    store = store_of(tmp_path, {"resid_post.1": x})
    sae = train_saes(store, config(tokens=300_000, dead_after_tokens=20_000, **settings))["resid_post.1"]
    found = measure_sae(sae, x.split(2000))
    nearest = (v @ sae.W_dec.t()).amax(dim=1)
    assert found.fvu < 0.1, found
    assert float((nearest > 0.9).float().mean()) > 0.9, nearest.sort().values
    assert 1 < found.l0 < 8, found
    if "k" not in sae.cfg and sae.metadata["trained_as"] in ("batchtopk", "matryoshka"):
        assert found.l0 == pytest.approx(3, rel=0.03)  # the threshold keeps what the batch kept
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(64), atol=1e-5)


class KilledError(Exception):
    pass


def kill_at(step: int) -> Progress:
    def progress(done: int, total: int, note: str) -> None:
        if done >= step:
            raise KilledError

    return progress


@pytest.mark.parametrize("settings", FAMILIES.values(), ids=FAMILIES)
def test_a_killed_run_ends_with_the_same_bytes(tmp_path: Path, settings: dict[str, object]) -> None:
    x, _ = planted_activations(3000, D, DIRECTIONS, 3)
    store = store_of(tmp_path / "acts", {"embed": x, "resid_post.0": x.flip(1)})
    given = config(epochs=5, dead_after_tokens=1500, **settings)
    whole = train_saes(store, given, tmp_path / "whole")
    with pytest.raises(KilledError):
        train_saes(store, given, tmp_path / "cut", progress=kill_at(21))
    assert (tmp_path / "cut" / "embed" / "checkpoint.safetensors").exists()
    (tmp_path / "cut" / "resid_post.0" / "checkpoint.safetensors").unlink()  # the sites need not be level
    resumed = train_saes(store, given, tmp_path / "cut")
    for site in ("embed", "resid_post.0"):
        for name in ("cfg.json", "sae_weights.safetensors"):
            expected = (tmp_path / "whole" / site / name).read_bytes()
            assert (tmp_path / "cut" / site / name).read_bytes() == expected
        assert whole[site].identity() == resumed[site].identity()
        assert not (tmp_path / "cut" / site / "checkpoint.safetensors").exists()
        tables = [pl.read_parquet(tmp_path / run / site / "training.parquet") for run in ("whole", "cut")]
        assert tables[0].drop("tokens_per_second").equals(tables[1].drop("tokens_per_second"))
    assert whole["embed"].identity() != whole["resid_post.0"].identity()


def test_the_folder_and_a_second_call(tmp_path: Path) -> None:
    x, _ = planted_activations(2000, D, DIRECTIONS, 3)
    store = store_of(tmp_path / "acts", {"resid_post.2": 50 * x})
    notes: list[str] = []
    given = config(epochs=2)
    sae = train_saes(
        store,
        given,
        tmp_path / "saes",
        progress=lambda done, total, note: notes.append(f"{done}/{total} {note}"),
    )["resid_post.2"]
    folder = tmp_path / "saes" / "resid_post.2"
    assert sorted(path.name for path in folder.iterdir()) == [
        "cfg.json",
        "sae_weights.safetensors",
        "training.parquet",
    ]
    cfg = json.loads((folder / "cfg.json").read_text())
    assert cfg["metadata"]["hook_name"] == "blocks.2.hook_resid_post"
    assert cfg["metadata"]["model_name"] == "toy/pm"
    assert cfg["metadata"]["rmscope"]["store"] == store.identity
    loaded = Sae.load(folder)
    assert loaded.identity() == sae.identity()
    figures = pl.read_parquet(folder / "training.parquet")
    assert {"step", "tokens", "loss", "fvu", "l0", "dead", "tokens_per_second"} <= set(figures.columns)
    assert "fvu" in notes[-1]
    assert notes[-1].startswith("14/14 ")
    raw = measure_sae(sae, [50 * x]).fvu
    assert raw == pytest.approx(float(figures["fvu"][-1]), abs=0.1)  # folded: it works on raw activations

    notes.clear()
    again = train_saes(store, given, tmp_path / "saes", progress=lambda *told: notes.append(str(told)))
    assert again["resid_post.2"].identity() == sae.identity()
    assert notes == []  # finished work is loaded, not repeated


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_is_what_was_trained(tmp_path: Path, family: str) -> None:
    x, _ = planted_activations(2000, D, DIRECTIONS, 3)
    store = store_of(tmp_path / "acts", {"resid_post.3": 9 * x})
    sae = train_saes(store, config(epochs=3, **FAMILIES[family]), tmp_path / "saes")["resid_post.3"]
    loaded = Sae.load(tmp_path / "saes" / "resid_post.3")
    assert loaded.architecture == ("jumprelu" if family in ("batchtopk", "matryoshka") else family)
    assert loaded.metadata["trained_as"] == family
    assert torch.equal(loaded.encode(9 * x), sae.encode(9 * x))
    assert torch.equal(loaded(9 * x), sae(9 * x))
    active = loaded.active(9 * x)
    torch.testing.assert_close(loaded.decode_active(active), sae(9 * x), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_scale_makes_training_blind_to_units(tmp_path: Path, family: str) -> None:
    x, _ = planted_activations(2000, D, DIRECTIONS, 3)
    given = config(epochs=2, **FAMILIES[family])
    small = train_saes(store_of(tmp_path / "a", {"embed": x}), given)["embed"]
    large = train_saes(store_of(tmp_path / "b", {"embed": 64 * x}), given)["embed"]
    torch.testing.assert_close(large.encode(64 * x), 64 * small.encode(x), rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(large.W_dec, small.W_dec, rtol=1e-4, atol=1e-5)


def test_the_first_token_is_not_trained_on(tmp_path: Path) -> None:
    x, _ = planted_activations(2000, D, DIRECTIONS, 3)
    sinks = x.clone()
    sinks[::10] = 1e6  # position 0 in the planted store
    saes = [
        train_saes(store_of(tmp_path / str(n), {"embed": rows}), config(epochs=1))["embed"]
        for n, rows in enumerate((x, sinks))
    ]
    assert saes[0].identity() == saes[1].identity()


def test_refusals(tmp_path: Path) -> None:
    x, _ = planted_activations(1000, D, DIRECTIONS, 3)
    store = store_of(tmp_path / "acts", {"embed": x})
    with pytest.raises(InputError, match=r"both\.2 is two sites side by side; train diff\.2 and base\.2"):
        train_saes(store, config(), sites=["both.2"])
    with pytest.raises(InputError, match="holds embed"):
        train_saes(store, config(), sites=["resid_post.8"])
    with pytest.raises(InputError, match="choose one of batchtopk, gated"):
        train_saes(store, config(architecture="toppk"))
    with pytest.raises(InputError, match="no tokens"):
        train_saes(store_of(tmp_path / "sinks", {"embed": x[:1]}), config())
    with pytest.raises(KilledError):
        train_saes(store, config(epochs=9), tmp_path / "saes", progress=kill_at(21))
    with pytest.raises(InputError, match=r"other settings or data"):
        train_saes(store, config(epochs=9, k=4), tmp_path / "saes")
    broken = x.clone()
    broken[5] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        train_saes(store_of(tmp_path / "nan", {"embed": broken}), config())

"""SAEs that several processes train together are those of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from rmscope.activations.store import ActivationStore
from rmscope.errors import InputError
from rmscope.ranks import ALONE, Ranks
from rmscope.sae import Sae, SaeConfig, train_saes
from rmscope.sae.shares import Shares, cut, deal, write_tensors
from rmscope.sae.topk import TopKSae
from rmscope.sae.trainer import CHECKPOINT
from rmscope.sae.training import draw
from tests.sae.planted import planted_activations, store_of
from tests.sae.test_trainer import FAMILIES, KilledError, kill_at

SITE, LIMIT = "embed", 300
OWN = {"d_sae": 66, "k": 3, "batch_size": 250, "lr": 1e-3, "amp": False, "epochs": 5, "warmup": 0.5, "checkpoint_steps": 7}
"""Neither the batch nor the features are a multiple of four."""
REVIVED = {"dead_after_tokens": 750, "auxk": 5}
CASES: dict[str, dict[str, Any]] = {
    f"{family}, {what}": {"devices": devices, "settings": {**OWN, **REVIVED, **FAMILIES[family]}}
    for family in FAMILIES
    for what, devices in (("new, features", 2), ("dead, features", 2), ("dead, tokens", 1))
    if family != "standard" or what.startswith("new")  # of which nothing is revived
}
CASES["standard, new, tokens"] = {"devices": 1, "settings": {**OWN, **FAMILIES["standard"]}}
CASES["topk, dead, AuxK of one feature"] = {"devices": 2, "settings": {**OWN, **REVIVED, "auxk": 1}}
CASES["topk, dead, rarely firing, tokens"] = {"devices": 1, "settings": {**OWN, "k": 1, "dead_after_tokens": 500}}
for family in ("topk", "jumprelu", "gated"):
    CASES[f"{family}, dead on one"] = {"devices": 2, "settings": {**OWN, **REVIVED, **FAMILIES[family]}}
CASES["topk, resumed, tokens"] = {"devices": 1, "settings": OWN | REVIVED}
CASES["topk, resumed, features"] = {"devices": 2, "settings": OWN | REVIVED}


DEAD = {"dead": [j for j in range(66) if j < 15 or j % 3 == 0], "dead on one": [*range(25)]}
"""Features that never fire: more of them on the first of two processes, or all."""


def kill_some(sae: Sae, dead: list[int]) -> Sae:
    """The SAE with some features silent."""
    if sae.architecture == "gated":
        sae.get_parameter("b_gate")[dead] = -1e6
    elif sae.metadata["trained_as"] == "jumprelu":
        sae.get_parameter("threshold")[dead] = 20.0
    else:
        sae.W_enc[:, dead] *= 0.02
    return sae


@dataclass
class World:
    """Stored activations and a folder of SAEs."""

    root: Path
    store: ActivationStore

    def train(self, name: str, settings: dict[str, Any], kill: int = 10**9) -> Sae:
        """A training in this process."""
        return train_saes(self.store, SaeConfig(**settings), self.root / name, progress=kill_at(kill))[SITE]

    def share(self, processes: int, cases: dict[str, Any]) -> int:
        """Trainings in several processes, in one start. Returns the exit code."""
        path = self.root / "cases.json"
        path.write_text(json.dumps(cases))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command += ["-m", "tests.sae.sharing_ranks", str(self.store.root), str(self.root), str(path)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], timeout=LIMIT).returncode

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.root / name / SITE / "sae_weights.safetensors")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("shares")
    x, _ = planted_activations(2000, 24, 40, 3)
    (root / "saes").mkdir()
    return World(root / "saes", store_of(root / "acts", {SITE: x}))


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, weight in one.items():
        torch.testing.assert_close(weight, other[name], rtol=1e-5, atol=1e-5, msg=lambda said, name=name: f"{name}: {said}")


@pytest.fixture(scope="module")
def shared(world: World) -> World:
    """Every case, trained by two processes. Some go on from an SAE with dead features, some where one process was killed."""
    for family, settings in FAMILIES.items():
        for what, dead in DEAD.items():
            first = world.train(f"first {family}", {**OWN, **settings, "epochs": 1})
            kill_some(first, dead).save(world.root / f"{family} {what}")
    for name, case in CASES.items():
        family, what = name.split(", ")[:2]
        if what in DEAD:
            case["settings"] |= {"d_sae": None, "init": str(world.root / f"{family} {what}")}
        elif what == "resumed":
            with pytest.raises(KilledError):
                world.train(name, case["settings"], kill=21)
            assert (world.root / name / SITE / CHECKPOINT).is_file()
    assert world.share(2, CASES) == 0
    return world


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_the_sae_of_one(name: str, shared: World) -> None:
    alone = shared.train(f"alone {name}", CASES[name]["settings"])
    figures = pl.read_parquet(shared.root / f"alone {name}" / SITE / "training.parquet")
    if "dead" in name:
        assert max(figures["dead"]) >= 25 or min(alone.get_parameter("b_gate")) > -100  # or they were redrawn
    assert_same(shared.weights(name), shared.weights(f"alone {name}"))
    assert Sae.load(shared.root / name / SITE).metadata["rmscope"]["training"] == alone.metadata["rmscope"]["training"]
    told = pl.read_parquet(shared.root / name / SITE / "training.parquet")
    for figure in ("step", "tokens", "loss", "fvu", "l0", "dead"):
        torch.testing.assert_close(told[figure].to_torch(), figures[figure].to_torch(), rtol=1e-4, atol=1e-5)
    assert not (shared.root / name / SITE / CHECKPOINT).exists()


def test_after_the_death_of_a_process_one_process_goes_on_to_the_same_sae(world: World) -> None:
    assert world.share(2, {"killed": {"devices": 2, "die_at": 21, "settings": OWN | REVIVED}}) != 0
    assert (world.root / "killed" / SITE / CHECKPOINT).is_file()
    world.train("killed", OWN | REVIVED)
    world.train("never killed", OWN | REVIVED)
    assert_same(world.weights("killed"), world.weights("never killed"))


@pytest.mark.slow
def test_four_processes_share_tokens_and_features(world: World) -> None:
    assert world.share(4, {"table": {"devices": 2, "settings": OWN | REVIVED}}) == 0
    world.train("alone table", OWN | REVIVED)
    assert_same(world.weights("table"), world.weights("alone table"))


class Listed(Ranks):
    """Ranks that are only numbers."""

    def among(self, groups: Sequence[Sequence[int]]) -> Ranks:
        [own] = [members for members in groups if self.rank in members]
        return Ranks(own.index(self.rank), len(own))


@pytest.mark.parametrize("devices", [1, 2, 3])
@pytest.mark.parametrize("n_parts", [1, 2, 5])
@pytest.mark.parametrize("count", [2, 3, 6, 7, 8])
def test_every_part_is_trained_once_and_no_process_is_idle(count: int, n_parts: int, devices: int) -> None:
    if count < devices:
        with (
            pytest.raises(InputError, match=r"memory of 3 devices at least, and there are 2 processes"),
            deal(["a"], Listed(0, count), devices),
        ):
            pass
        return
    trained: dict[str, list[tuple[Shares, int]]] = {}
    for rank in range(count):
        with deal([f"diff.{i}" for i in range(n_parts)], Listed(rank, count), devices) as (lots, shares):
            assert lots
            assert shares.features.count >= devices
            assert devices == 1 or all(len(lot) == 1 for lot in lots)  # as many at once would not fit
            assert devices > 1 or count > n_parts or shares.together.count == 1
            for lot in lots:
                for part in lot:
                    trained.setdefault(part, []).append((shares, rank))
    assert len(trained) == n_parts
    for team in trained.values():
        places = {(shares.tokens.rank, shares.features.rank) for shares, _ in team}
        first = team[0][0]
        assert places == set(product(range(first.tokens.count), range(first.features.count)))
        assert len(team) == len(places) == first.together.count


def test_more_processes_than_tokens_in_a_batch_are_refused(world: World) -> None:
    with pytest.raises(InputError, match="8 processes cannot share batches of 7 tokens"):
        train_saes(world.store, SaeConfig(**OWN | {"batch_size": 7}), shares=Shares(tokens=Ranks(0, 8)))


@pytest.mark.parametrize("m", [7, 1023, 1024, 2500])
def test_a_rank_draws_the_features_that_one_process_draws(m: int) -> None:
    whole = TopKSae(5, m, k=1)
    draw(whole, torch.ones(5), torch.Generator().manual_seed(0))
    plain = torch.randn(m, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(whole.W_dec, plain / plain.norm(dim=1, keepdim=True))
    for rank in range(3):
        rows = Shares(features=Ranks(rank, 3)).rows(m)
        some = TopKSae(5, m, k=1)
        cut(some, rows)
        draw(some, torch.ones(5), torch.Generator().manual_seed(0), m, rows)
        assert torch.equal(some.W_dec, whole.W_dec[rows])
        assert torch.equal(some.W_enc, whole.W_enc[:, rows])


@pytest.mark.parametrize("n", [0, 1, 1024, 2500])
def test_a_file_that_is_written_piece_by_piece_holds_what_was_given(n: int, tmp_path: Path) -> None:
    spread = {"odd.W": torch.randn(n, 3), "silent": torch.arange(n), "bias": torch.randn(n)}
    same = {"step": torch.tensor(4.0), "b_dec": torch.randn(3)}
    write_tensors(tmp_path / "x.safetensors", spread, same, {"key": "ü"}, ALONE)
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == {*spread, *same}
    assert all(torch.equal(read[name], t) and read[name].dtype == t.dtype for name, t in (spread | same).items())
    with safe_open(tmp_path / "x.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"key": "ü"}

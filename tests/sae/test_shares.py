"""SAEs that several processes train together are those of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from rmscope.activations.store import ActivationStore
from rmscope.errors import InputError
from rmscope.ranks import Ranks
from rmscope.sae import Sae, SaeConfig, train_saes
from rmscope.sae.shares import deal
from rmscope.sae.trainer import CHECKPOINT
from tests.sae.planted import planted_activations, store_of
from tests.sae.test_trainer import FAMILIES, KilledError, kill_at

SITE, LIMIT = "embed", 300
OWN = {"d_sae": 66, "k": 3, "batch_size": 250, "lr": 1e-3, "amp": False, "epochs": 8, "warmup": 0.5, "checkpoint_steps": 7}
"""Neither the batch nor the features are a multiple of four."""
DEAD = {"dead_after_tokens": 250, "auxk": 5}
"""Features soon count as dead: AuxK and the other revivals work in most steps."""
CASES: dict[str, dict[str, Any]] = {
    f"{family} {what}": {"devices": devices, "settings": {**OWN, **DEAD, **FAMILIES[family]}}
    for family in FAMILIES
    for what, devices in (("tokens", 1), ("features", 2))
}
CASES["resumed tokens"] = {"devices": 1, "settings": OWN | DEAD}
CASES["resumed features"] = {"devices": 2, "settings": OWN | DEAD}


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
    return World(root / "saes", store_of(root / "acts", {SITE: x}))


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, weight in one.items():
        torch.testing.assert_close(weight, other[name], rtol=1e-5, atol=1e-5, msg=lambda said, name=name: f"{name}: {said}")


@pytest.fixture(scope="module")
def shared(world: World) -> World:
    """Every case, trained by two processes. Two of them go on where one process was killed."""
    for name in CASES:
        if name.startswith("resumed"):
            with pytest.raises(KilledError):
                world.train(name, OWN | DEAD, kill=41)
            assert (world.root / name / SITE / CHECKPOINT).is_file()
    assert world.share(2, CASES) == 0
    return world


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_the_sae_of_one(name: str, shared: World) -> None:
    alone = shared.train(f"alone {name}", CASES[name]["settings"])
    figures = pl.read_parquet(shared.root / f"alone {name}" / SITE / "training.parquet")
    assert figures["dead"].max() > 0
    assert_same(shared.weights(name), shared.weights(f"alone {name}"))
    assert Sae.load(shared.root / name / SITE).metadata["rmscope"]["training"] == alone.metadata["rmscope"]["training"]
    told = pl.read_parquet(shared.root / name / SITE / "training.parquet")
    for figure in ("step", "tokens", "loss", "fvu", "l0", "dead"):
        torch.testing.assert_close(told[figure].to_torch(), figures[figure].to_torch(), rtol=1e-4, atol=1e-5)
    assert not (shared.root / name / SITE / CHECKPOINT).exists()


def test_after_the_death_of_a_process_one_process_goes_on_to_the_same_sae(world: World) -> None:
    cases = {f"killed {d}": {"devices": d, "die_at": 21, "settings": OWN | DEAD} for d in (1, 2)}
    for name, case in cases.items():
        assert world.share(2, {name: case}) != 0
        assert (world.root / name / SITE / CHECKPOINT).is_file()
        world.train(name, OWN | DEAD)
    world.train("never killed", OWN | DEAD)
    for name in cases:
        assert_same(world.weights(name), world.weights("never killed"))


def test_four_processes_share_tokens_and_features(world: World) -> None:
    world.share(4, {"table": {"devices": 2, "settings": OWN | DEAD}})
    world.train("alone table", OWN | DEAD)
    assert_same(world.weights("table"), world.weights("alone table"))

"""A run that torchrun starts in several processes: its tables are those of one, also after one of them was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from rmscope.run.run import Run
from tests.run.small import settings, tables

LIMIT = 900


def config(pm: str, out: Path) -> Path:
    """The settings of a small run as a file."""
    own = settings(pm, out, sites=["resid_post.1", "resid_post.2"], seeds=2, ledger_pairs=4, limit=260)
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(own.model_dump(mode="json", exclude_defaults=True)))
    return path


def start(path: Path, processes: int) -> subprocess.Popen[str]:
    alone = [sys.executable, "-m", "rmscope.cli", "run", str(path)]
    many = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = alone if processes == 1 else [*many, "-m", "rmscope.cli", "run", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )


def finish(path: Path, processes: int) -> str:
    process = start(path, processes)
    said, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, said
    return said


@pytest.fixture(scope="module")
def alone(pm: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    finish(config(pm, out), 1)
    return out


def test_two_processes_write_the_tables_of_one(pm: str, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    said = finish(config(pm, out), 2)
    assert tables(out) == tables(alone)
    assert said.count("The page: ") == 1  # one process tells
    assert Run.open(out).on_disk.record["stages"].keys() == Run.open(alone).on_disk.record["stages"].keys()
    assert not (out / ".parts").exists()
    assert "done before" in finish(config(pm, out), 2)
    assert tables(out) == tables(alone)


@pytest.mark.slow
def test_two_processes_train_the_one_sae_of_a_run_together(pm: str, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    own = settings(pm, out, sites=["resid_post.1"], seeds=1, ledger_pairs=4, limit=260)
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(own.model_dump(mode="json", exclude_defaults=True)))
    finish(path, 2)
    one, two = (load_file(run / "saes/resid_post.1/sae_weights.safetensors") for run in (alone, out))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["score", "estimate", "screen", "ablate", "directions", "decompose"])
def test_after_the_death_of_a_process_the_next_start_ends_with_the_same_bytes(
    stage: str, pm: str, alone: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    path = config(pm, out)
    process = start(path, 2)
    before = {"score": "preflight", "estimate": "train", "screen": "estimate", "ablate": "group"}
    before |= {"directions": "rank", "decompose": "measure"}
    began = time.monotonic()
    while process.poll() is None and time.monotonic() < began + LIMIT:
        record = yaml.safe_load((out / "run.yaml").read_text()) if (out / "run.yaml").is_file() else {}
        if before[stage] in record.get("stages", {}):
            break
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    finish(path, 1 if stage == "ablate" else 2)
    assert tables(out) == tables(alone)

"""What ``torchrun`` starts in test_shares.py: trainings that several processes share.

    torchrun -m tests.sae.sharing_ranks STORE OUT CASES

CASES is a JSON file, {name: {"devices": n, "die_at": step, "settings": {...}}}: how many devices an SAE takes, and the step
at which the last process is killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from rmscope.activations.store import ActivationStore
from rmscope.io import Progress
from rmscope.ranks import ranks_of_torchrun
from rmscope.sae import SaeConfig, shares, train_saes


def killer(step: int) -> Progress:
    def progress(done: int, total: int, note: str) -> None:
        if done >= step:
            os.kill(os.getpid(), signal.SIGKILL)

    return progress


def main(store: str, out: str, cases: str) -> None:
    shares.SLICE = 10  # what is gathered comes in several pieces
    opened = ActivationStore.open(store)
    with ranks_of_torchrun() as ranks:
        for name, case in json.loads(Path(cases).read_text()).items():
            last = ranks.rank == ranks.count - 1
            progress = killer(case["die_at"] if last and case.get("die_at") else 10**9)
            with shares.deal(opened.sites, ranks, case["devices"]) as (lots, own):
                assert own.together.count == ranks.count
                for lot in lots:
                    train_saes(opened, SaeConfig(**case["settings"]), Path(out) / name, lot, progress, "cpu", own)


if __name__ == "__main__":
    main(*sys.argv[1:])

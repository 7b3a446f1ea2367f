"""SAELens opens what we save: every family, its features and reconstructions beside ours. One JSON line per family.

Random weights of every family, in the units of a stream whose norms are far from sqrt(d), and one of each training that a
few steps of the trainer have made (batchtopk and matryoshka are saved as jumprelu). The judge is a script that is run as
``PEER_PYTHON SCRIPT SAE_DIR CASE.safetensors``, opens the folder with SAELens, and prints a JSON line with the relative
differences ``f`` and ``x_hat``. Exits 1 where one is above 1e-3.

usage: saelens_formats.py --peer-python PYTHON [--peer-script peers/saelens_open.py]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from rmscope.activations.store import ActivationStore, StoreWriter
from rmscope.sae import Sae, SaeConfig, train_saes
from rmscope.sae.base import sae_class

D, M, N, MOST = 48, 256, 2000, 1e-3
FAMILIES = ("topk", "gated", "jumprelu", "standard")
TRAINED = (*FAMILIES, "batchtopk", "matryoshka")


def activations() -> torch.Tensor:
    """Sparse sums of directions, off centre, of norm about 40."""
    g = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(96, D, generator=g), dim=1)
    a = torch.rand(N, 96, generator=g) * (torch.rand(N, 96, generator=g) < 0.06)
    return 25 * a @ directions + 20 * torch.randn(D, generator=g) / D**0.5


def drawn(family: str) -> Sae:
    g = torch.Generator().manual_seed(1)
    sae = sae_class(family)(D, M, "resid_post.2", **({"k": 8} if family == "topk" else {}))
    for name, p in sae.named_parameters():
        size = 0.2 if name == "r_mag" else 5.0 if name.startswith("b_") else 0.3
        p.data.copy_(size * torch.randn(p.shape, generator=g))
    if family == "jumprelu":
        sae.threshold.abs_().mul_(20)
    return sae


def trained(family: str, store: ActivationStore) -> Sae:
    return train_saes(store, SaeConfig(architecture=family, d_sae=M, k=8, batch_size=256, epochs=10, l1=1.0))["embed"]


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--peer-python", required=True)
    p.add_argument("--peer-script", default=str(Path(__file__).parent / "peers" / "saelens_open.py"))
    a = p.parse_args()
    x, worst = activations(), 0.0
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        column = torch.arange(N)
        with StoreWriter(Path(scratch) / "acts", ["embed"], D, {"model": "toy/pm"}) as writer:
            writer.add("embed", x, column, column // 10, column % 10, column % 3)
        store = ActivationStore.open(Path(scratch) / "acts")
        made = [(f"{name}, random", lambda name=name: drawn(name)) for name in FAMILIES]
        made += [(f"{name}, trained", lambda name=name: trained(name, store)) for name in TRAINED]
        for case, make in made:
            sae, folder = make(), Path(scratch) / case.replace(", ", "-")
            sae.save(folder)
            f = sae.encode(x)
            save_file({"x": x, "f": f, "x_hat": sae.decode(f)}, folder / "case.safetensors")
            command = [a.peer_python, a.peer_script, str(folder), str(folder / "case.safetensors")]
            done = subprocess.run(command, capture_output=True, text=True)
            lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
            told = json.loads(lines[-1]) if lines else {"error": (done.stderr.strip().splitlines() or ["no answer"])[-1]}
            off = max(told.get("f", float("inf")), told.get("x_hat", float("inf")))
            worst = max(worst, off)
            print(json.dumps({"case": case, "l0": round(float((f > 0).sum()) / N, 1), **told}), flush=True)
    sys.exit(0 if worst < MOST else 1)


if __name__ == "__main__":
    main()

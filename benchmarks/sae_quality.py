"""FVU of our TopK SAE and of SAELens', trained on the same stored activations: one JSON line.

Equal d_sae, k, tokens, batch size and schedule; each at the same three learning rates (SAELens' default, ours, three times
ours), of which its best counts: the two scale their weights differently, so that equal rates are not equal steps. Both are
judged on the same held-out rows (every tenth pair) by the same FVU, centred per dimension and summed over dimensions.
``ratio`` is ours / peer, lower is better.

usage: sae_quality.py --peer-python PYTHON [--peer-script peers/saelens_train.py] [--pairs 1500] [--tokens 600000]
                      [--store DIR] [--pm zoo:hh] [--site resid_post.7]
(RMSCOPE_DATA names the folder that holds hh-rlhf/; a store that is already in DIR is used as it is)
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from rmscope.activations.harvest import harvest
from rmscope.activations.store import ActivationStore
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.readers import load_pairs
from rmscope.sae import SaeConfig, train_saes

BATCH, HELD_OUT = 2048, 10
PEER_RATE = 3e-4
"""SAELens' default learning rate."""


def stored(a: argparse.Namespace, folder: Path) -> ActivationStore:
    if (folder / a.site / "manifest.json").is_file():
        return ActivationStore.open(folder)
    data = Path(os.environ["RMSCOPE_DATA"]) / "hh-rlhf" / "helpful-base" / "test.jsonl.gz"
    return harvest(RewardModel.load(a.pm, device="cpu"), load_pairs(data, limit=a.pairs), [a.site], folder)


def fvu(x: torch.Tensor, x_hat: torch.Tensor) -> float:
    """Fraction of variance unexplained, centred per dimension, summed over dimensions."""
    x, x_hat = x.double(), x_hat.double()
    return float((x - x_hat).square().sum() / (x - x.mean(dim=0)).square().sum())


def told(value: float, l0: float, rate: float, seconds: float) -> dict[str, float]:
    return {"fvu": round(value, 5), "l0": round(l0, 2), "lr": float(f"{rate:.3g}"), "seconds": round(seconds, 1)}


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--peer-python", required=True)
    p.add_argument("--peer-script", default=str(Path(__file__).parent / "peers" / "saelens_train.py"))
    p.add_argument("--store")
    p.add_argument("--pm", default="zoo:hh")
    p.add_argument("--site", default="resid_post.7")
    for name, default in (("pairs", 1500), ("tokens", 600_000), ("d-sae", 4608), ("k", 32)):
        p.add_argument(f"--{name}", type=int, default=default)
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        store = stored(a, Path(a.store or scratch) / "acts")
        pairs = set(store.column(a.site, "pair").tolist())
        held = {i for i in pairs if i % HELD_OUT == 0}
        training, rest = store.only(pairs - held), store.only(held)
        kept = training.training_mask(a.site)
        held_out = rest.rows(a.site, rest.training_mask(a.site).nonzero().squeeze(1))
        config = SaeConfig(d_sae=a.d_sae, k=a.k, tokens=a.tokens, batch_size=BATCH)
        rates = (PEER_RATE, config.rate(a.d_sae), 3 * config.rate(a.d_sae))

        ours = []
        for rate in rates:
            began = time.perf_counter()
            sae = train_saes(training, config.model_copy(update={"lr": rate}), sites=[a.site])[a.site]
            seconds = time.perf_counter() - began
            active = sae.active(held_out)
            found = fvu(held_out, sae.decode_active(active))
            ours.append(told(found, len(active.value) / active.n_tokens, rate, seconds))

        rows, out = Path(scratch) / "rows.safetensors", Path(scratch) / "out.safetensors"
        save_file({"train": store.rows(a.site, kept.nonzero().squeeze(1)), "held_out": held_out}, rows)
        settings = {"d-sae": a.d_sae, "k": a.k, "batch": BATCH, "tokens": a.tokens}
        settings |= {"dead-after": config.dead_after_tokens}
        flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        peers = []
        for rate in rates:
            began = time.perf_counter()
            command = [a.peer_python, a.peer_script, str(rows), str(out), *flags, "--lr", str(rate)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds = time.perf_counter() - began
            made = load_file(out)
            peers.append(told(fvu(held_out, made["x_hat"]), float(made["l0"].mean()), rate, seconds))
        best = [min(one["fvu"] for one in tried) for tried in (ours, peers)]
    row = {
        "case": f"topk FVU at {a.site} of {a.pm}, d_sae {a.d_sae}, k {a.k}, {a.tokens} tokens",
        "stored": int(kept.sum()),
        "ours": best[0],
        "peer": best[1],
        "ratio": round(best[0] / best[1], 4),
        "ours_by_rate": ours,
        "peer_by_rate": peers,
        "held_out": len(held_out),
    }
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()

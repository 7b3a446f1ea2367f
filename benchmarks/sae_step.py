"""Training steps of ours against SAELens' on this CPU, in turn: one JSON line per case.

TopK k 32 against SAELens in float32 (its default) and, beside it, under its autocast; gated with b_gate set so that L0 is
64 on both sides. d 576, m 16,384, batches of 4,096 tokens. ``ours`` and ``peer`` are tokens per second, medians over the
rounds of medians over steps; a step is everything the trainer does: loss, gradients, Adam, unit decoder rows.

usage: sae_step.py --peer-python PYTHON [--peer-script peers/saelens_step.py] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from pathlib import Path

import torch

from rmscope.sae.base import training_class
from rmscope.sae.config import SaeConfig
from rmscope.sae.kernels import upper_quantiles
from rmscope.sae.training import Training, draw, storage

D, M, BATCH, K, L0 = 576, 16384, 4096, 32, 64
RATE = 1e-6
"""So small that L0 stays what b_gate was set to; a step takes the same time at any rate."""
CASES = (("topk", "topk", ()), ("topk", "topk, peer under autocast", ("--autocast",)), ("gated", "gated", ()))


def data() -> torch.Tensor:
    """Low rank plus noise; the same as the peer's."""
    return torch.randn(BATCH, 64) @ torch.randn(64, D) / 8 + 0.1 * torch.randn(BATCH, D)


class Ours:
    """One training at its first steps, stepped as the trainer steps it."""

    def __init__(self, architecture: str) -> None:
        torch.manual_seed(0)
        self.x, config = data(), SaeConfig(architecture=architecture, d_sae=M, k=K, l1=1.0)
        cls = training_class(architecture)
        sae = cls.start(D, M, config)
        draw(sae, torch.zeros(D), torch.Generator().manual_seed(0))
        self.training: Training = cls(sae, config)
        if architecture == "gated":
            sae.b_gate.copy_(-upper_quantiles(self.x, sae.W_enc.data.t(), L0 / M))
            self.training.density = L0 / M
        self.parameters = storage(sae)
        self.optimiser = torch.optim.Adam(self.parameters.values(), lr=RATE, fused=True)
        self.l0: list[float] = []
        self.step()

    def step(self) -> float:
        began = time.perf_counter()
        result, decoder = self.training.step(self.x), self.training.sae.W_dec.data
        for part, rows in zip(result.gradients["W_dec"].split(1024), decoder.split(1024), strict=True):
            part.addcmul_((part * rows).sum(dim=1, keepdim=True), rows, value=-1)
        for name, parameter in self.parameters.items():
            parameter.grad = result.gradients[name]
        self.optimiser.step()
        decoder.div_(decoder.norm(dim=1, keepdim=True))
        self.l0.append(result.l0)
        return time.perf_counter() - began


@torch.no_grad()
def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--peer-python", required=True)
    p.add_argument("--peer-script", default=str(Path(__file__).parent / "peers" / "saelens_step.py"))
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--steps", type=int, default=5)
    a = p.parse_args()
    for architecture, case, flags in CASES:
        ours, peer, l0 = [], [], []
        for _ in range(a.rounds):
            run = Ours(architecture)
            ours.append(BATCH / statistics.median(run.step() for _ in range(a.steps)))
            l0 += run.l0
            del run
            command = [a.peer_python, a.peer_script, "--arch", architecture, *flags]
            sizes = ["--d-in", str(D), "--d-sae", str(M), "--batch", str(BATCH), "--k", str(K)]
            done = subprocess.run([*command, *sizes], capture_output=True, text=True, check=True)
            told = json.loads(done.stdout.strip().splitlines()[-1])
            peer.append(told["tokens_per_second"])
        row = {
            "arch": architecture,
            "case": case,
            "ours": round(statistics.median(ours), 1),
            "peer": round(statistics.median(peer), 1),
            "ratio": round(statistics.median(ours) / statistics.median(peer), 2),
            "ours_l0": [round(min(l0), 1), round(max(l0), 1)],
            "peer_l0": [round(min(told["l0"]), 1), round(max(told["l0"]), 1)] if "l0" in told else None,
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()

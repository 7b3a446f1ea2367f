"""Peak memory of a training step at m 65,536, d 4,096 on a CPU, and its time: one JSON line.

Weights, gradients and Adam's moments stay float32 (8.6 GB at these sizes: a step of Adam is finer than bfloat16 can
hold). The encoder product, which is most of the work, runs in bfloat16. [batch, m] is never stored whole.

usage: sae_memory.py [--d 4096] [--m 65536] [--batch 2048] [--k 32] [--steps 2] [--float32]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

LIMIT_GB = 12


def measure(a: argparse.Namespace) -> None:
    import torch

    from rmscope.sae import training
    from rmscope.sae.base import training_class
    from rmscope.sae.config import SaeConfig
    from rmscope.sae.trainer import SLICE

    training.has_fast_bfloat16 = lambda _device: not a.float32  # also where the hardware would choose otherwise
    torch.set_grad_enabled(False)
    config = SaeConfig(d_sae=a.m, k=a.k)
    trained_by = training_class("topk")
    sae = trained_by.start(a.d, a.m, config)
    x = torch.randn(a.batch, a.d)
    training.draw(sae, torch.zeros(a.d), torch.Generator().manual_seed(0))
    run, parameters = trained_by(sae, config), training.storage(sae)
    optimiser = torch.optim.Adam(parameters.values(), lr=1e-4, fused=True)
    for _ in range(a.steps):
        began = time.perf_counter()
        result = run.step(x)
        for part, rows in zip(result.gradients["W_dec"].split(SLICE), sae.W_dec.data.split(SLICE), strict=True):
            part.addcmul_((part * rows).sum(dim=1, keepdim=True), rows, value=-1)
        for name, parameter in parameters.items():
            parameter.grad = result.gradients[name]
        optimiser.step()
        sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
        seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    row = {
        "case": f"topk step, m {a.m}, d {a.d}, batch {a.batch}, products in {'float32' if a.float32 else 'bfloat16'}",
        "peak_gb": round(peak, 2),
        "limit_gb": LIMIT_GB,
        "seconds": round(seconds, 1),
        "loss": round(result.loss, 2),
    }
    print(json.dumps(row))


def main() -> None:
    p = argparse.ArgumentParser()
    for name, default in (("d", 4096), ("m", 65536), ("batch", 2048), ("k", 32), ("steps", 2)):
        p.add_argument(f"--{name}", type=int, default=default)
    p.add_argument("--float32", action="store_true")
    p.add_argument("--here", action="store_true", help="in this process, whose peak is then what is told")
    a = p.parse_args()
    if a.here:
        measure(a)
    else:
        subprocess.run([sys.executable, __file__, "--here", *sys.argv[1:]], check=True)


if __name__ == "__main__":
    main()

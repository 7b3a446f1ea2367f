"""SAELens training steps, to be run by the python of an environment that holds SAELens: one JSON line.

Its public classes with their defaults: forward, backward, Adam. Gated: b_gate is set so that each feature's gate opens on
l0 / d_sae of the tokens, as in our own case. Data: low rank plus noise, as benchmarks/sae_step.py draws it.

usage: saelens_step.py --arch topk|gated [--d-in 576] [--d-sae 16384] [--batch 4096] [--k 32] [--l0 64] [--steps 3]
                       [--autocast]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from sae_lens.saes.gated_sae import GatedTrainingSAE, GatedTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

RATE = 1e-6
"""So small that L0 stays what b_gate was set to; a step takes the same time at any rate."""


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--arch", choices=["topk", "gated"], required=True)
    for name, default in (("d-in", 576), ("d-sae", 16384), ("batch", 4096), ("k", 32), ("l0", 64), ("steps", 3)):
        p.add_argument(f"--{name}", type=int, default=default)
    p.add_argument("--autocast", action="store_true")
    a = p.parse_args()

    torch.manual_seed(0)
    x = torch.randn(a.batch, 64) @ torch.randn(64, a.d_in) / 8 + 0.1 * torch.randn(a.batch, a.d_in)
    if a.arch == "topk":
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=a.d_in, d_sae=a.d_sae, k=a.k))
    else:
        sae = GatedTrainingSAE(GatedTrainingSAEConfig(d_in=a.d_in, d_sae=a.d_sae, l1_coefficient=1.0))
        with torch.no_grad():
            above = max(1, round(a.l0 / a.d_sae * a.batch))
            for part in torch.arange(a.d_sae).split(1024):
                u = (x - sae.b_dec) @ sae.W_enc[:, part]
                sae.b_gate[part] = -u.topk(above + 1, dim=0).values[-1]
    optimiser = torch.optim.Adam(sae.parameters(), lr=RATE)
    step_input = TrainStepInput(
        sae_in=x,
        coefficients=dict.fromkeys(sae.get_coefficients(), 1.0),
        dead_neuron_mask=torch.zeros(a.d_sae, dtype=torch.bool),
        n_training_steps=1,
        is_logging_step=False,
    )
    l0 = []

    def step() -> float:
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=a.autocast):
            out = sae.training_forward_pass(step_input)
        optimiser.zero_grad()
        out.loss.backward()
        optimiser.step()
        took = time.perf_counter() - began
        l0.append(float((out.feature_acts.detach() > 0).sum()) / a.batch)
        return took

    step()
    seconds = statistics.median(step() for _ in range(a.steps))
    print(json.dumps({"tokens_per_second": a.batch / seconds, "l0": l0}))


if __name__ == "__main__":
    main()

"""Exact ablations per second of PMs that cannot be resumed at a token: blocks after the site alone against whole forwards.

usage: OMP_NUM_THREADS=1 python -m benchmarks.later_blocks [--rounds 5] [--blocks 12] [--width 128]

Small random PMs, one pair of about 190 tokens a side, a random TopK SAE (k 4, d_sae 32) in the middle of the depth, all its
features that fire. ``whole`` is a full forward pass per ablation. ``one by one`` runs the blocks after the site, without
batches. ``later blocks`` is what rmscope does. The three take turns; the figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from unittest.mock import patch

import torch
from tests.model.small import SENTENCES, small_pm, small_sae, user
from torch import Tensor

from rmscope.effects.requests import ablations
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import SIDES, Pair

PAIR = Pair("a", user(SENTENCES[0]), " ".join(SENTENCES[1:3]), " ".join(SENTENCES[3:]))
ARCHITECTURES = ("jamba", "qwen3_next", "bert")
WAYS = ("later blocks", "one by one", "whole")


def effects(rm: RewardModel, site: str) -> Tensor:
    wanted = {0: {side: {site: None} for side in SIDES}}
    found = ablations(rm, {site: small_sae(rm.d_model, 32, 4)}, [rm.tokenize(PAIR)], wanted)
    return torch.cat([of_side.effect for _, of_side in found])


def as_way(rm: RewardModel, way: str) -> AbstractContextManager[object]:
    """Within the context, ablations run in one of the ways."""
    if way == "whole":
        return patch.object(rm, "capabilities", replace(rm.capabilities, skipping=False))
    return patch("rmscope.effects.ablation.BATCH_TOKENS", 1) if way == "one by one" else nullcontext()


def compare(rm: RewardModel, site: str, rounds: int) -> dict[str, float]:
    """Ablations per second of each way, ratios, and how far the effects of the ways differ."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    found: dict[str, Tensor] = {}
    for _ in range(rounds + 1):
        for way in WAYS:
            with as_way(rm, way):
                started = time.perf_counter()
                found[way] = effects(rm, site)
                seconds[way].append(time.perf_counter() - started)
    median = {way: sorted(times[1:])[rounds // 2] for way, times in seconds.items()}  # the first round warms up
    return {
        "ablations": len(found["whole"]),
        **{f"{way} per second": round(len(found[way]) / median[way], 1) for way in WAYS},
        **{f"ratio, {way}": round(median["whole"] / median[way], 2) for way in WAYS[:2]},
        "largest difference": max(float((found[way] - found["whole"]).abs().max()) for way in WAYS),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--width", type=int, default=128)
    args = parser.parse_args()
    for architecture in ARCHITECTURES:
        changes = {"hidden_size": args.width, "intermediate_size": 2 * args.width, "num_hidden_layers": args.blocks}
        if architecture.startswith("qwen"):
            changes["layer_types"] = ["linear_attention", "full_attention"] * (args.blocks // 2)
        rm = small_pm(architecture, **changes)
        site = f"resid_post.{args.blocks // 2 - 1}"
        print(json.dumps({"architecture": architecture, "site": site, **compare(rm, site, args.rounds)}), flush=True)


if __name__ == "__main__":
    main()

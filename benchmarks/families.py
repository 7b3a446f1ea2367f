"""All six SAE families on one site of zoo:hh, from one harvest, at about equal L0: FVU, L0 and delta_r2 under splice.

usage: families.py OUT        (RMSCOPE_DATA names the folder that holds hh-rlhf/)

d_sae 4,608, 600,000 tokens, trained on the fit half of the prompts of helpful-base rows 1-500, which the adapter never saw.
TopK, BatchTopK and Matryoshka get k 32. JumpReLU, gated and standard are trained with several penalties from the same
activations, and the one whose L0 on the confirm quarter is nearest to 32 is taken. All figures are on the measure quarter.
Prints one JSON line per case, then the table of docs/results/families.md. What is trained is kept in OUT.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from heads import HELD_OUT, as_cell, delta_r2, helpful_pairs, states

from rmscope.activations.harvest import harvest
from rmscope.evaluation.reward_aware import training_rows
from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import split_of
from rmscope.sae import Sae, SaeConfig, train_saes
from rmscope.statistics import Array, Figure, interval

SITE, L0 = "resid_post.7", 32
COMMON = {"d_sae": 4608, "tokens": 600_000, "k": L0}
PENALTIES = {"jumprelu": ("l0", (1.0, 2.0, 4.0)), "gated": ("l1", (1.0, 2.0, 4.0)), "standard": ("l1", (1.0, 2.0, 4.0))}


def settings() -> dict[str, SaeConfig]:
    """Every training by name."""
    made = {name: SaeConfig(architecture=name, **COMMON) for name in ("topk", "batchtopk", "matryoshka")}
    for family, (penalty, values) in PENALTIES.items():
        for value in values:
            made[f"{family} {penalty} {value:g}"] = SaeConfig(architecture=family, **COMMON, **{penalty: value})
    return made


@torch.no_grad()
def by_pair(rm: RewardModel, tokens: Sequence[PairTokens], saes: dict[str, Sae]) -> dict[str, Array]:
    """Per SAE, one row per pair: its tokens, active features, Σ|x - x^|² and Σ|x - mean|², [pairs, 4]."""
    rows = [torch.cat([training_rows(b, rm.streams(b, [SITE])[SITE]) for b in rm.batches([t])]) for t in tokens]
    mean = torch.cat(rows).double().mean(dim=0)
    found: dict[str, list[list[float]]] = {name: [] for name in saes}
    for x in rows:
        variance = float((x.double() - mean).square().sum())
        for name, sae in saes.items():
            active = sae.active(x)
            error = float((x - sae.decode_active(active)).double().square().sum())
            found[name].append([len(x), len(active.value), error, variance])
    return {name: np.array(table) for name, table in found.items()}


def ratio(table: Array, above: int, below: int, prompts: Array) -> Figure:
    """Σ of one column over Σ of another, with its interval, bootstrap by prompt."""
    return interval(table, prompts, lambda v: float(v[:, above].sum() / v[:, below].sum()))


def main(out: Path) -> None:
    rm = RewardModel.load("zoo:hh", device="cpu")
    pairs = helpful_pairs(rm, 1, HELD_OUT)
    parts = {split: [p for p in pairs if split_of(p) == split] for split in ("fit", "confirm", "measure")}
    store = harvest(rm, parts["fit"], [SITE], out / "activations")
    started = time.perf_counter()
    trained = train_saes(store, settings(), out / "saes", progress=_progress)
    saes = {name: sae for (_, name), sae in trained.items()}
    seconds = time.perf_counter() - started

    tokens = {split: rm.tokenize_all(parts[split]) for split in ("confirm", "measure")}
    chosen = nearest(by_pair(rm, tokens["confirm"], saes))
    kept = {name: saes[name] for name in chosen}
    prompts = np.array([p.prompt_key for p in parts["measure"]])
    tables = by_pair(rm, tokens["measure"], kept)
    clean, w = states(rm, tokens["measure"]), rm.model.score.weight[0].detach().double().numpy()
    emit({"case": "data", "fit": len(parts["fit"]), "measured": len(prompts), "prompts": len(set(prompts)),
          "train_s": seconds})  # fmt: skip
    lines = []
    for name, sae in kept.items():
        l0, fvu = ratio(tables[name], 1, 0, prompts), ratio(tables[name], 2, 3, prompts)
        kept_reward = delta_r2(clean, states(rm, tokens["measure"], sae), w, prompts)
        emit({"case": name, "l0": l0, "fvu": fvu, "delta_r2": kept_reward})
        lines.append(f"| {name} | {as_cell(l0)} | {as_cell(fvu)} | {as_cell(kept_reward)} |")
    print("\n| family | L0 | FVU | delta_r2 |\n|---|---|---|---|\n" + "\n".join(lines))


def nearest(tables: dict[str, Array]) -> list[str]:
    """Of each family, the training whose L0 is nearest to the wanted one."""
    best: dict[str, tuple[float, str]] = {}
    for name, table in tables.items():
        l0 = float(table[:, 1].sum() / table[:, 0].sum())
        emit({"case": "confirm", "sae": name, "l0": l0})
        best[name.split()[0]] = min(best.get(name.split()[0], (np.inf, "")), (abs(float(np.log(l0 / L0))), name))
    return [name for _, name in best.values()]


def emit(row: dict[str, Any]) -> None:
    print(json.dumps(row, default=asdict), flush=True)


def _progress(done: int, total: int, note: str = "") -> None:
    print(f"\r{done}/{total} {note}", end="", file=sys.stderr)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

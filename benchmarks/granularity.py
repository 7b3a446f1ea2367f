"""How large may a dictionary be before what was planted is split over too many features to be found?

usage: granularity.py AUDIT SITE D_SAE:K:TOKENS[:FAMILY[:STEPS]] ... [--plants FILE] [--pairs demo:plain]
(AUDIT: folder of rmscope audit; FAMILY: as in SaeConfig, topk where it is left out; STEPS: of reward-aware fine-tuning)

SAEs of several sizes are trained on the audit's text at one site of its PM, and each learned cue is matched (METHOD,
"Planted bias") against the features that detect it best, whatever a ranking would say of them: what no ranking can find
there is not there to be found. A JSON line an SAE and cue: the hit, its mediated share, that of all features together
(the rest runs through the error), and that of the detectors together. Then a table.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from rmscope.activations.harvest import harvest
from rmscope.evaluation.reward_aware import RewardAwareConfig, fine_tune
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import split_of
from rmscope.pairs.planting import twins
from rmscope.pairs.plants import Plant, read_plants
from rmscope.pairs.readers import load_pairs
from rmscope.planted.matching import match_plant, threshold
from rmscope.planted.twins import Twin, all_peaks, halves, mediation, prepare
from rmscope.sae import Sae, SaeConfig, measure_sae, train_saes
from rmscope.studies.audit.planting import base_pairs

TWINS, DETECTORS, OFTEN = 24, 40, 0.3
LIMIT, LONGEST, SAMPLE = 800, 110, 8192


def bar(done: int, total: int, note: str = "") -> None:
    print(f"\r{done}/{total} {note:<60}", end="", file=sys.stderr)


def detectors(made: Sequence[Twin], m: int) -> list[int]:
    """The features that detect the cue best on the fitting half."""
    cue, without = all_peaks(made, m)
    often = np.flatnonzero((cue > 0).mean(0) >= OFTEN)
    scores = {int(j): threshold(cue[:, j], without[:, j])[0] for j in often}
    return sorted(scores, key=lambda j: (-scores[j], j))[:DETECTORS]


def row_of(rm: RewardModel, sae: Sae, plant: Plant, made: dict[str, list[Twin]], sd: float) -> dict[str, Any]:
    fitting, measuring = halves(made[sae.site])
    best = detectors(fitting, sae.m)
    sign = float(plant.sign)
    listed = [{"feature": j, "rank": i, "mean_effect": sign, "sign_consistency": 1.0} for i, j in enumerate(best, 1)]
    found = match_plant(rm, {sae.site: sae}, plant, made, {sae.site: listed}, sd)
    left = mediation(rm, sae, sae.site, measuring, [range(sae.m), best]).mean(1)
    together = 1 - left[:, 1] / left[:, 0]
    return {
        "plant": plant.name, "ate_sd": found["ate"]["value"] / sd, "learned": found["learned"], "found": found["found"],
        "hit": found["hit"], "features": len(found["features"]), "f1": found["f1"],
        "mediated": found["mediated"] and found["mediated"]["value"], "all": float(together[0]),
        "detectors": float(together[1]), "why": found["why"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("audit", type=Path)
    parser.add_argument("site")
    parser.add_argument("sizes", nargs="+")
    parser.add_argument("--plants", type=Path, default=Path("configs/audit/standard.yaml"))
    parser.add_argument("--pairs", default="demo:plain")
    args = parser.parse_args()
    stored = yaml.safe_load((args.audit / "run" / "run.yaml").read_text("utf-8"))["config"]
    sd = json.loads((args.audit / "audit.json").read_text("utf-8"))["audited"]["sd_delta"]
    rm = RewardModel.load(stored["model"], device="cpu")
    fit = [p for p in load_pairs(stored["data"]) if split_of(p) == "fit"]
    out = args.audit / "granularity" / args.site
    store = harvest(rm, fit, [args.site], out / "activations", bar)
    _, held_out = base_pairs(args.pairs, LIMIT, LONGEST, rm.tokenizer)
    lines = []
    for size in args.sizes:
        numbers, family = size.split(":")[:3], (size.split(":")[3:] or ["topk"])[0]
        m, k, tokens = map(int, numbers)
        config = SaeConfig(architecture=family, d_sae=m, k=k, tokens=tokens)
        name = "-".join([*numbers, *size.split(":")[3:]])
        sae = train_saes(store, config, out / "-".join(size.split(":")[:4]), [args.site], bar)[args.site]
        if steps := size.split(":")[4:]:
            family += f", {steps[0]} reward-aware steps"
            sae = fine_tune(rm, sae, fit, RewardAwareConfig(steps=int(steps[0]), fast=False), out=out / name, progress=bar)
        fvu = measure_sae(sae, [store.sample(args.site, SAMPLE, torch.Generator().manual_seed(0))]).fvu
        rows = []
        for plant in read_plants(args.plants).plants:
            made = prepare(rm, {args.site: sae}, twins(held_out, plant, TWINS, 0), plant)
            row = row_of(rm, sae, plant, made, sd)
            if row["learned"]:
                rows.append(row)
                print(json.dumps({"family": family, "d_sae": m, "k": k, "tokens": tokens, "fvu": fvu, **row}), flush=True)
        hits = ", ".join(f"{r['plant']} {r['mediated'] or 0:.2f}{'' if r['found'] else ' (no hit)'}" for r in rows)
        shares = [float(np.mean([r[name] for r in rows])) for name in ("all", "detectors")]
        lines.append(f"| {family} {m:,} / {k} / {tokens:,} | {fvu:.3f} | {shares[0]:.2f} | {shares[1]:.2f} | "
                     f"{sum(r['found'] for r in rows)} of {len(rows)} | {hits} |")  # fmt: skip
    print("\n| family, d_sae / k / tokens | FVU | all features | detectors | found | mediated share |")
    print("|---|---|---|---|---|---|")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

"""How large may a dictionary be before what was planted is split over too many features to be found?

usage: granularity.py AUDIT SITE D_SAE:K:TOKENS[:FAMILY[:STEPS]] ... [--plants FILE] [--pairs demo:plain]
(AUDIT: folder of rmscope audit; FAMILY: as in SaeConfig, topk where it is left out; STEPS: of reward-aware fine-tuning)

SAEs of several sizes are trained on the audit's text at one site of its PM. Each learned cue is matched
(`docs/method.md`, Planted bias) against the features that detect it best, whatever their rank: an upper bound for every
ranking. Prints one JSON line per SAE and cue: the hit, its mediated share, that of all features together (the rest runs
through the error), and that of the detectors together. Then a table.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from rmscope.activations.harvest import harvest
from rmscope.evaluation.reward_aware import RewardAwareConfig, fine_tune
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import split_of
from rmscope.pairs.planting import twins
from rmscope.pairs.plants import Plant, read_plants
from rmscope.pairs.readers import load_pairs
from rmscope.planted.matching import match_plant, threshold
from rmscope.planted.results import Candidate, Hit
from rmscope.planted.twins import Twin, all_peaks, halves, mediation, prepare
from rmscope.run.settings import read_record
from rmscope.sae import Sae, SaeConfig, measure_sae, train_saes
from rmscope.studies.audit.planting import base_pairs
from rmscope.studies.audit.result import AuditResult

TWINS, DETECTORS, OFTEN = 24, 40, 0.3
LIMIT, LONGEST, SAMPLE = 800, 110, 8192


def bar(done: int, total: int, note: str = "") -> None:
    print(f"\r{done}/{total} {note:<60}", end="", file=sys.stderr)


def detectors(fitting: Sequence[Twin], m: int) -> list[int]:
    """The features that detect the cue best on the fitting half."""
    cue, without = all_peaks(fitting, m)
    often = np.flatnonzero((cue > 0).mean(0) >= OFTEN)
    scores = {int(j): threshold(cue[:, j], without[:, j])[0] for j in often}
    return sorted(scores, key=lambda j: (-scores[j], j))[:DETECTORS]


@dataclass(frozen=True)
class Row:
    """A cue in one SAE: its match, and the share of its effect in all features and in the detectors together."""

    plant: str
    ate_sd: float
    learned: bool
    found: bool
    hit: Hit
    features: int
    f1: float | None
    mediated: float | None
    all: float
    detectors: float
    why: str


def match_detectors(rm: RewardModel, sae: Sae, plant: Plant, prepared: dict[str, list[Twin]], sd: float) -> Row:
    fitting, measuring = halves(prepared[sae.site])
    best = detectors(fitting, sae.m)
    candidates = [Candidate(j, rank, float(plant.sign), 1.0) for rank, j in enumerate(best, 1)]
    match = match_plant(rm, {sae.site: sae}, plant, prepared, {sae.site: candidates}, sd)
    left = mediation(rm, {sae.site: sae}, {sae.site: measuring}, [{sae.site: range(sae.m)}, {sae.site: best}]).mean(1)
    in_all, in_detectors = (1 - left[:, 1] / left[:, 0]).tolist()
    return Row(
        plant=plant.name,
        ate_sd=(match.ate.value or 0.0) / sd,
        learned=match.learned,
        found=match.found,
        hit=match.hit,
        features=len(match.features),
        f1=match.f1,
        mediated=match.mediated.value if match.mediated else None,
        all=in_all,
        detectors=in_detectors,
        why=match.why,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("audit", type=Path)
    parser.add_argument("site")
    parser.add_argument("sizes", nargs="+")
    parser.add_argument("--plants", type=Path, default=Path("configs/audit/standard.yaml"))
    parser.add_argument("--pairs", default="demo:plain")
    args = parser.parse_args()
    stored = read_record(args.audit / "run")["config"]
    sd = AuditResult.model_validate_json((args.audit / "audit.json").read_text("utf-8")).audited.sd_delta
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
            prepared = prepare(rm, {args.site: sae}, twins(held_out, plant, TWINS, 0), plant)
            row = match_detectors(rm, sae, plant, prepared, sd)
            if row.learned:
                rows.append(row)
                about = {"family": family, "d_sae": m, "k": k, "tokens": tokens, "fvu": fvu}
                print(json.dumps(about | asdict(row)), flush=True)
        hits = ", ".join(f"{r.plant} {r.mediated or 0:.2f}{'' if r.found else ' (no hit)'}" for r in rows)
        shares = [float(np.mean(values)) for values in ([r.all for r in rows], [r.detectors for r in rows])]
        lines.append(f"| {family} {m:,} / {k} / {tokens:,} | {fvu:.3f} | {shares[0]:.2f} | {shares[1]:.2f} | "
                     f"{sum(r.found for r in rows)} of {len(rows)} | {hits} |")  # fmt: skip
    print("\n| family, d_sae / k / tokens | FVU | all features | detectors | found | mediated share |")
    print("|---|---|---|---|---|---|")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

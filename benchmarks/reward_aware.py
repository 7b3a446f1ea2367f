"""Does reward-aware fine-tuning find features that carry the reward, or write the reward into the code?

usage: reward_aware.py OUT [hh|planted]        (RMSCOPE_DATA names the folder that holds hh-rlhf/)

hh: a TopK SAE (k 32, d_sae 4,608) at resid_post.7 of zoo:hh, trained on the fit half of the prompts of helpful-base rows
1-500, which the adapter never saw, and fine-tuned on them: by its own loss alone, and aware of three rewards on the same
frozen blocks: the PM's own head; a fresh head (logistic regression of human labels on final states of 600 other rows); a
shuffled head (the same with labels flipped by coin, in place of a PM trained on shuffled labels). Each SAE is measured on
the other half of the prompts, under every head and under 32 random ones.

planted: the same with k 16 at resid_post.12 of zoo:planted, on the demo's pairs; F1 of the features that detect each cue
best, before and after, on twins of the measure split.

Prints one JSON line per case, then the tables of docs/results/reward_aware.md. Finished work is kept in OUT.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from heads import HELD_OUT, as_cell, delta_r2, fit_head, gain, helpful_pairs, states

from rmscope.activations.harvest import harvest
from rmscope.evaluation.reward_aware import RewardAwareConfig, fine_tune, training_rows
from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.demo import demo_pairs, plain_demo_pairs, zoo_plants
from rmscope.pairs.pair import SIDES, Pair, Side, share_a_prompt, split_of
from rmscope.pairs.planting import twins
from rmscope.planted.matching import f1_score, threshold
from rmscope.planted.twins import Twin, halves, prepare
from rmscope.sae import Sae, SaeConfig, measure_sae, train_saes
from rmscope.statistics import Array

SITE = {"hh": "resid_post.7", "planted": "resid_post.12"}
TUNING = RewardAwareConfig(steps=100, pairs=8, level=0.0, fast=False)
HEAD_ROWS = 700
"""Rows after the held-out ones that heads are fitted on."""
RANDOM_HEADS = 32
TWINS = 64


def progress(done: int, total: int, note: str = "") -> None:
    print(f"\r{done}/{total} {note}", end="", file=sys.stderr)


def emit(row: dict[str, Any]) -> None:
    print(json.dumps(row, default=asdict), flush=True)


def trained(rm: RewardModel, site: str, pairs: Sequence[Pair], config: SaeConfig, out: Path) -> Sae:
    store = harvest(rm, pairs, [site], out / "activations", progress)
    return train_saes(store, config, out / "saes", progress=progress)[site]


def with_head(rm: RewardModel, w: Array) -> None:
    """The PM reads its reward by another head from now on."""
    rm.model.score.weight.data.copy_(torch.from_numpy(w)[None])
    rm.__dict__.pop("identity", None)


def prompts_of(pairs: Sequence[Pair]) -> Array:
    return np.array([p.prompt_key for p in pairs])


def reconstruction(rm: RewardModel, tokens: Sequence[PairTokens], sae: Sae) -> dict[str, float]:
    """L0, FVU and share of dead features on the tokens that training would use."""
    batches = (training_rows(b, rm.streams(b, [sae.site])[sae.site]) for b in rm.batches(tokens))
    found = measure_sae(sae, batches)
    return {"l0": found.l0, "fvu": found.fvu, "dead": found.dead}


def heads_of(rm: RewardModel, pairs: Sequence[Pair]) -> dict[str, Array]:
    """The PM's own head, a fresh one and one of shuffled labels."""
    rows = helpful_pairs(rm, HELD_OUT + 1, HELD_OUT + HEAD_ROWS)
    shared = share_a_prompt(rows, pairs)
    others = [p for p in rows if p.id not in shared]
    z = states(rm, rm.tokenize_all(others))
    coin = np.random.default_rng(0).integers(0, 2, len(others)) * 2.0 - 1
    heads = {
        "own": rm.model.score.weight[0].detach().double().numpy().copy(),
        "fresh": fit_head(z, np.ones(len(others))),
        "shuffled": fit_head(z, coin),
    }
    for name, labels in (("own", np.ones(len(z))), ("fresh", np.ones(len(z))), ("shuffled", coin)):
        right = float((labels * (z @ heads[name]) > 0).mean())
        emit({"case": "head", "head": name, "pairs": len(z), "accuracy_fitted": right})
    return heads


def on_hh(out: Path) -> None:
    rm = RewardModel.load("zoo:hh", device="cpu")
    pairs = helpful_pairs(rm, 1, HELD_OUT)
    fit, other = ([p for p in pairs if (split_of(p) == "fit") == wanted] for wanted in (True, False))
    tokens, prompts = rm.tokenize_all(other), prompts_of(other)
    heads = heads_of(rm, pairs)
    saes = {"before": trained(rm, SITE["hh"], fit, SaeConfig(k=32, d_sae=4608, tokens=600_000), out)}
    plain = TUNING.model_copy(update={"weight": 0.0})
    saes["own loss alone"] = fine_tune(rm, saes["before"], fit, plain, out=out / "plain", progress=progress)
    for name, w in heads.items():
        with_head(rm, w)
        saes[f"aware of {name}"] = fine_tune(rm, saes["before"], fit, TUNING, out=out / name, progress=progress)
    with_head(rm, heads["own"])

    clean = states(rm, tokens)
    spliced = {name: states(rm, tokens, sae) for name, sae in saes.items()}
    spread = {a: {b: float(np.corrcoef(clean @ heads[a], clean @ heads[b])[0, 1]) for b in heads} for a in heads}
    accuracy = {name: float((clean @ w > 0).mean()) for name, w in heads.items()}
    emit({"case": "data", "fit": len(fit), "measured": len(other), "prompts": len(set(prompts)), "accuracy": accuracy,
          "correlation": spread})  # fmt: skip
    random = np.random.default_rng(1).standard_normal((RANDOM_HEADS, rm.d_model)) / clean.std(0)
    rows = []
    for name, sae in saes.items():
        row: dict[str, Any] = {"case": "hh", "sae": name, **reconstruction(rm, tokens, sae)}
        for head, w in heads.items():
            row[head] = delta_r2(clean, spliced[name], w, prompts)
            row[f"{head}_gain"] = gain(clean, spliced["before"], spliced[name], w, prompts)
        errors, sizes = ((clean - spliced[name]) @ random.T) ** 2, (clean @ random.T) ** 2
        row["random"] = float((1 - errors.sum(0) / sizes.sum(0)).mean())
        emit(row)
        rows.append(row)
    hh_table(rows)


def hh_table(rows: Sequence[dict[str, Any]]) -> None:
    print("\n| SAE | L0 | FVU | own head | fresh head | shuffled head | random heads |\n|---|---|---|---|---|---|---|")
    for r in rows:
        figures = " | ".join(as_cell(r[head]) for head in ("own", "fresh", "shuffled"))
        print(f"| {r['sae']} | {r['l0']:.1f} | {r['fvu']:.3f} | {figures} | {r['random']:.3f} |")
    print("\n| gain over the SAE before | own head | fresh head | shuffled head |\n|---|---|---|---|")
    for r in rows[1:]:
        print(f"| {r['sae']} | {' | '.join(as_cell(r[f'{head}_gain'], True) for head in ('own', 'fresh', 'shuffled'))} |")


def on_planted(out: Path) -> None:
    rm = RewardModel.load("zoo:planted", device="cpu")
    pairs = demo_pairs()
    fit, held = ([p for p in pairs if split_of(p) == split] for split in ("fit", "measure"))
    tokens, prompts = rm.tokenize_all(held), prompts_of(held)
    before = trained(rm, SITE["planted"], fit, SaeConfig(k=16, d_sae=4608, tokens=500_000), out)
    plain = fine_tune(rm, before, fit, TUNING.model_copy(update={"weight": 0.0}), out=out / "plain", progress=progress)
    after = fine_tune(rm, before, fit, TUNING, out=out / "own", progress=progress)
    saes = {"before": before, "own loss alone": plain, "aware of own": after}
    clean, w = states(rm, tokens), rm.model.score.weight[0].detach().double().numpy()
    spliced = {name: states(rm, tokens, sae) for name, sae in saes.items()}
    for name, sae in saes.items():
        figures = {"delta_r2": delta_r2(clean, spliced[name], w, prompts)}
        figures["gain"] = gain(clean, spliced["before"], spliced[name], w, prompts)
        emit({"case": "planted", "sae": name, "prompts": len(set(prompts)), **reconstruction(rm, tokens, sae), **figures})
    print("\n| cue | ATE / SD(Δr) | F1 before | own loss alone | aware | the feature of before, when aware |")
    print("|---|---|---|---|---|---|")
    bases = [p for p in plain_demo_pairs() if split_of(p) == "measure"]
    for plant in zoo_plants():
        made = prepare(rm, {before.site: before}, twins(bases, plant, TWINS, seed=0), plant)[before.site]
        ate = float(np.mean([t.delta for t in made])) / float((clean @ w).std())
        tables = {name: [peaks(sae, half) for half in halves(made)] for name, sae in saes.items()}
        found = {name: best_features(rows) for name, rows in tables.items()}
        kept = same_features(tables["aware of own"], found["before"][1])
        scores = {name: score for name, (score, _) in found.items()}
        emit({"case": "cue", "cue": plant.name, "twins": len(made), "ate_sd": ate, "f1": scores, "same_feature_aware": kept,
              "features": {name: chosen for name, (_, chosen) in found.items()}})  # fmt: skip
        print(f"| {plant.name} | {ate:+.2f} | {' | '.join(f'{scores[name]:.2f}' for name in saes)} | {kept:.2f} |")


def peaks(sae: Sae, made: Sequence[Twin]) -> dict[Side, Array]:
    """The largest value of every feature in the cue's (chosen) or the filler's window, [twins, m]."""
    out = {side: torch.zeros(len(made), sae.m) for side in SIDES}
    for i, twin in enumerate(made):
        for side in SIDES:
            active = sae.active(twin.responses[side].x)
            inside = twin.windows[side][active.token]
            out[side][i].scatter_reduce_(0, active.feature[inside], active.value[inside], "amax")
    return {side: table.numpy() for side, table in out.items()}


def two_fold(folds: list[dict[Side, Array]], choose: Callable[[Array, Array, int], int]) -> tuple[float, list[int]]:
    """Held-out F1, averaged over both halves (other prompts): feature and θ from the one, F1 on the other."""
    scores, chosen = [], []
    for half in (0, 1):
        cue, filler = folds[half]["chosen"], folds[half]["rejected"]
        j = choose(cue, filler, half)
        _, theta = threshold(cue[:, j], filler[:, j])
        other = folds[1 - half]
        scores.append(f1_score(other["chosen"][:, j], other["rejected"][:, j], theta))
        chosen.append(int(j))
    return float(np.mean(scores)), chosen


def best_features(folds: list[dict[Side, Array]]) -> tuple[float, list[int]]:
    return two_fold(folds, lambda cue, filler, _half: max(range(cue.shape[1]), key=lambda j: _score(cue, filler, j)))


def same_features(folds: list[dict[Side, Array]], features: Sequence[int]) -> float:
    """F1 of features chosen before, thresholds fitted anew."""
    return two_fold(folds, lambda _cue, _filler, half: features[half])[0]


def _score(cue: Array, filler: Array, j: int) -> float:
    return threshold(cue[:, j], filler[:, j])[0] if (cue[:, j] > 0).mean() > 0.2 else 0.0


if __name__ == "__main__":
    which = {"hh": on_hh, "planted": on_planted}
    for name in sys.argv[2:] or list(which):
        which[name](Path(sys.argv[1]) / name)

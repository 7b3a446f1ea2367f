"""How much of each planted cue's effect a patch takes away, and what it costs, beside a projection and matched features.

usage: mending.py RUN OUT.json [--human N]     (a run on zoo:planted; RMSCOPE_DATA names the folder that holds hh-rlhf/)

For each lexical cue an edit is chosen by rule on the fit split (``rmscope edit --cue``); a fifth patch joins the four. They
are measured on the measure split in held-out wordings, on the demo's clean pairs, and on human pairs that the PM was not
trained on. The last part compares the edit's tokens: all but the first of a text (what is shipped) or the response's alone.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rmscope.effects.ablation import ablate_entries, at_site
from rmscope.io import write_json
from rmscope.model.training.recipe import human_pairs, read_recipe
from rmscope.pairs.demo import plain_demo_pairs, zoo_plants
from rmscope.pairs.pair import Pair, split_of
from rmscope.pairs.planting import twins
from rmscope.run.run import Run
from rmscope.studies.edit.analyse import fitting_twins
from rmscope.studies.edit.check import (
    TWINS,
    Variant,
    cue_figures,
    deltas,
    edit_variants,
    mean_difference,
    own_pairs,
    pair_figures,
    rewards_under,
)
from rmscope.studies.edit.choice import choose, entries_of, join_edits
from rmscope.studies.edit.result import CueChoice, Figures

CUES = ("thanks", "youre_right", "dont_know", "url")
JOINT = "all four"
LONGEST = 192
"""Tokens of the longest human text, as in the PM's training."""
RESPONSES = 64
"""Texts on which the two ways of taking the edit's tokens are compared."""


def as_rows(figures: Figures) -> dict[str, Any]:
    """Figures by variant, as JSON."""
    return {variant: {name: asdict(figure) for name, figure in row.items()} for variant, row in figures.items()}


def say(done: int, total: int, note: str = "") -> None:
    print(f"\r{time.strftime('%X')} {done}/{total} {note:<40}", end="", file=sys.stderr, flush=True)


def main(folder: str, out: str, human: int) -> None:
    job = Run.open(folder)
    rm, saes, result = job.rm, job.saes, dict[str, Any]()
    plants = {p.name: p for p in zoo_plants() if p.name in CUES}
    edits, fitted, started = dict[str, CueChoice](), dict[str, Any](), time.time()
    for name, plant in plants.items():
        fitted[name] = fitting_twins(rm, saes, plant, job.config.seed)
        choices = choose(rm, saes, fitted[name], say)
        edits[name] = choices[0]
        keys = ("site", "value", "operation", "features", "left", "loss")
        result[f"choice of {name}"] = [{key: getattr(c, key) for key in keys} for c in choices]
        print(name, result[f"choice of {name}"], file=sys.stderr)
    result["seconds to choose"] = time.time() - started
    variants = {name: edit_variants(job, [edit], [edit], [fitted[name]]) for name, edit in edits.items()}
    four = join_edits(list(edits.values()))
    sites = dict.fromkeys(e.site for e in edits.values())
    projections = {s: mean_difference([fitted[n][s] for n in CUES if edits[n].site == s]) for s in sites}
    variants[JOINT] = edit_variants(job, four, list(edits.values()), [fitted[n] for n in CUES])
    variants[JOINT]["mean difference"] = projections
    write_json(Path(out), result)
    measured(job, variants, plants, result, human)
    write_json(Path(out), result)
    for name, edit in edits.items():
        print(name, "where", file=sys.stderr)
        result[f"tokens of {name}"] = where(job, edit, plants[name])
    write_json(Path(out), result)


def measured(job: Run, variants: dict[str, dict[str, Variant]], plants: Any, result: dict[str, Any], human: int) -> None:
    """ATE, accuracy and drift under every variant."""
    rm, started = job.rm, time.time()
    measuring = [p for p in plain_demo_pairs() if split_of(p) == "measure"]
    for name, plant in plants.items():
        made = twins(measuring, plant, TWINS, job.config.seed)
        tried = variants[name] | {f"{JOINT}, {v}": edit for v, edit in variants[JOINT].items()}
        found = deltas(rewards_under(rm, tried, rm.tokenize_all(made), say))
        result[f"bias {name}"] = as_rows(cue_figures(found, [p.prompt_key for p in made]))
    flat = {f"{name}, {v}": edit for name, mine in variants.items() for v, edit in mine.items()}
    sets: dict[str, list[Pair]] = own_pairs(job)
    if human:
        _, held = human_pairs(read_recipe(Path(__file__).parents[1] / "configs" / "zoo-planted.yaml"))
        rng = np.random.default_rng(0)
        sets["human pairs"] = [held[i] for i in rng.permutation(len(held))]
    for name, pairs in sets.items():
        kept = [(p, t) for p, t in zip(pairs, rm.tokenize_all(pairs), strict=True) if _short(t)]
        kept = kept[:human] if name == "human pairs" else kept
        mine = {v: edit for v, edit in flat.items() if name != "human pairs" or v.startswith(JOINT) or "matched" not in v}
        found = deltas(rewards_under(rm, mine, [t for _, t in kept], say))
        figures = pair_figures(found, [p.prompt_key for p, _ in kept], job.sd)
        result[f"pairs: {name}"] = as_rows(figures) | {"n": len(kept)}
    result["seconds to measure"] = time.time() - started


def _short(t: Any) -> bool:
    return max(t.chosen.numel(), t.rejected.numel()) <= LONGEST and not torch.equal(t.chosen, t.rejected)


def where(job: Run, edit: CueChoice, plant: Any) -> dict[str, Any]:
    """The edit at every token but the first, and at the response's tokens alone: rewards on twins with the cue."""
    rm, sae = job.rm, job.saes[edit.site]
    measuring = [p for p in plain_demo_pairs() if split_of(p) == "measure"]
    taken = []
    for i, pair in enumerate(twins(measuring, plant, RESPONSES // 2, job.config.seed)):
        say(i, RESPONSES // 2, "tokens")
        begins = _same(rm.text_ids(pair.prompt, ""), rm.text_ids(pair.prompt, "An answer."))
        row = []
        for side in ("chosen", "rejected"):
            text = rm.prefill(rm.text_ids(pair.prompt, pair.side(side)), [edit.site])  # type: ignore[arg-type]
            for start in (1, begins):
                response = at_site(sae, text, edit.site, start)
                entries = entries_of(response.active, edit.features, 1 - edit.value)
                row.append(float(ablate_entries(rm, sae, response, edit.site, [entries])[0]))
        taken.append(row)
    a = np.array(taken)
    return {
        "ate taken, all tokens": float((a[:, 0] - a[:, 2]).mean()), "ate taken, response": float((a[:, 1] - a[:, 3]).mean()),
        "mean |difference of a reward|": float(np.abs(a[:, [0, 2]] - a[:, [1, 3]]).mean()),
        "mean |difference of Δr|": float(np.abs(a[:, 0] - a[:, 2] - a[:, 1] + a[:, 3]).mean()),
        "texts that differ": float((np.abs(a[:, [0, 2]] - a[:, [1, 3]]) > 1e-6).mean()),
    }  # fmt: skip


def _same(a: torch.Tensor, b: torch.Tensor) -> int:
    n = min(a.numel(), b.numel())
    differs = (a[:n] != b[:n]).nonzero()
    return int(differs[0]) if differs.numel() else n


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[4]) if "--human" in sys.argv else 0)

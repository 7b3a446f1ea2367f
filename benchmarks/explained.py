"""How much of zoo:hh's reward difference SAEs explain on held-out pairs: docs/results/explained.md, its figures.

usage: explained.py FOLDER [PART ...]        (RMSCOPE_DATA names the folder that holds hh-rlhf/ and rm-bench/)

Parts: a site (``resid_post.8``), the same with the SAE after reward-aware fine-tuning (``resid_post.8-aware``), ``shift``;
left out, all. FOLDER keeps activations, SAEs and the figures of each finished part, so a killed run goes on, and two
processes can share the parts; the page is written once all are there.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from explained_data import FULL, RECIPE, SHIFT_SITE, SHIFT_SOURCE, SITES, Setting, bar, prepare, short
from explained_page import write_page

from rmscope.effects.ledger import baseline, ledger_rows, shares
from rmscope.effects.splice import agreement, delta_r2, run_replacements, splice
from rmscope.evaluation.explained import COARSE_GRID, FrozenSelection, SelectSplit, explain, keep, keep_curve
from rmscope.evaluation.reconstruction import evaluate
from rmscope.io import write_json
from rmscope.model.training.recipe import data_file, human_pairs, read_recipe
from rmscope.pairs.pair import Pair, share_a_prompt, split_of
from rmscope.pairs.readers import load_pairs
from rmscope.sae import Sae
from rmscope.statistics import interval

SHIFTED = 48
RM_BENCH = ("chat", "safety-refuse", "safety-response")
PARTS = ("features", "error", "remainder", "gap")


def lists_of(s: Setting, site: str, sae: Sae, fit: Sequence[int], measured: Sequence[Pair]) -> FrozenSelection:
    select = SelectSplit(s.store, s.rm.tokenize_all(s.fit), [p.prompt_key for p in s.fit], fit)
    return FrozenSelection(s.rm, site, sae, select, [p.prompt_key for p in measured], bar)


def site_figures(s: Setting, site: str) -> dict[str, Any]:
    prompts = [p.prompt_key for p in s.measured]
    lists = lists_of(s, site, s.saes[site], range(len(s.fit)), s.measured)
    found = explain(lists, s.rm.tokenize_all(s.measured), prompts, bar).as_dict()
    return found | {"ledger": ledger_shares(s, site, lists, np.array(prompts))}


def aware_figures(s: Setting, site: str) -> dict[str, Any]:
    """Splice and keep K of the fine-tuned SAE, with a list of its own."""
    prompts, tokens = [p.prompt_key for p in s.measured], s.rm.tokenize_all(s.measured)
    sae = s.aware(site)
    lists = lists_of(s, site, sae, range(len(s.fit)), s.measured)
    kept = {"keep": (site, keep(lists.baseline, lists.order, FULL))}
    found = run_replacements(s.rm, tokens, range(len(tokens)), kept, bar)["keep"]
    (one,) = evaluate(s.rm, {site: sae}, tokens, prompts, bar)
    return {
        "site": site,
        "evaluation": {n: f.as_dict() for n, f in one.figures.items()} | {"dead": one.dead},
        "curves": {"keep": [asdict(p) for p in keep_curve(found, FULL, np.array(prompts))]},
        "ledger": ledger_shares(s, site, lists, np.array(prompts)),
    }


def ledger_shares(s: Setting, site: str, lists: FrozenSelection, prompts: np.ndarray) -> dict[str, Any]:
    start = baseline(lists.sae, "mean", lists.profile.f_mean, lists.profile.x_mean)
    tokens = s.rm.tokenize_all(s.measured)
    sd = float(s.rm.score_tokens(tokens).delta.std())
    made = ledger_rows(s.rm, lists.sae, site, tokens, range(len(tokens)), start, sd, bar, halvings=2)
    rows = sorted(made, key=lambda r: r[0])
    table = np.array([[row[part] for part in (*PARTS, "delta_r")] for _, row, _ in rows])
    return {
        part: interval(table, prompts, lambda v, i=i: float(shares(v[:, :4], v[:, 4])[i])).as_dict()  # type: ignore[misc]
        for i, part in enumerate(PARTS)
    }


def shift_figures(s: Setting) -> dict[str, Any]:
    """An SAE and a list from helpful-base alone, measured there, on harmless-base and on RM-Bench."""
    training, held = human_pairs(read_recipe(RECIPE))
    seen = [*training, *held]
    held = [p for p in held if split_of(p) == "measure"]
    bench = [p for n in RM_BENCH for p in load_pairs(data_file(f"rm-bench/{n}_filtered.json"), on_bad_row="skip")]
    places = {
        "helpful-base": [p for p in held if p.meta["source"] == "helpful-base"],
        "harmless-base": [p for p in held if p.meta["source"] == "harmless-base"],
        "RM-Bench": [p for p in bench if p.id not in share_a_prompt(bench, seen)],
    }
    measured = {place: short(s.rm, pairs, SHIFTED) for place, pairs in places.items()}
    everything = [p for pairs in measured.values() for p in pairs]
    fit = [i for i, p in enumerate(s.fit) if p.meta["source"] == SHIFT_SOURCE]
    narrow = s.narrow()
    lists = lists_of(s, SHIFT_SITE, narrow, fit, everything)
    tokens, out, done = s.rm.tokenize_all(everything), {}, 0
    for place, pairs in measured.items():
        index = range(done, done + len(pairs))
        done += len(pairs)
        prompts = np.array([p.prompt_key for p in pairs])
        kept = {"keep": (SHIFT_SITE, keep(lists.baseline, lists.order, COARSE_GRID)), "splice": (SHIFT_SITE, splice(narrow))}
        found = run_replacements(s.rm, tokens, index, kept, bar)
        delta, hat = found["splice"].delta, found["splice"].delta_hat[:, 0]
        (one,) = evaluate(s.rm, {place: narrow}, [tokens[i] for i in index], prompts.tolist(), bar)
        out[place] = {
            "pairs": len(pairs), "prompts": len(np.unique(prompts)), "sd": float(delta.std()),
            "fvu": one.figures["fvu"].as_dict(), "splice": delta_r2(delta, hat, prompts).as_dict(),
            "agreement": agreement(delta, hat, prompts).as_dict(),
            "curve": [asdict(p) for p in keep_curve(found["keep"], COARSE_GRID, prompts)],
        }  # fmt: skip
    return out


def main(folder: Path, asked: Sequence[str]) -> None:
    s = prepare(folder)
    parts: dict[str, Callable[[], dict[str, Any]]] = {site: partial(site_figures, s, site) for site in SITES}
    parts |= {f"{site}-aware": partial(aware_figures, s, site) for site in SITES}
    parts |= {"shift": partial(shift_figures, s)}
    paths = {name: folder / f"{name}.json" for name in parts}
    for name in asked or parts:
        if not paths[name].is_file():
            started = time.time()
            figures = parts[name]()
            write_json(paths[name], figures | {"seconds": round(time.time() - started)})
    if all(path.is_file() for path in paths.values()):
        found = {name: json.loads(path.read_text("utf-8")) for name, path in paths.items()}
        plain, aware = ([found[f"{site}{end}"] for site in SITES] for end in ("", "-aware"))
        write_page(Path(__file__).parent.parent / "docs", plain, aware, found["shift"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

"""How much of zoo:hh's reward difference SAEs explain on held-out pairs: writes docs/explained.md and its figures.

usage: explained.py FOLDER        (RMSCOPE_DATA names the folder that holds hh-rlhf/ and rm-bench/)

FOLDER keeps activations, SAEs and the figures of each finished site, so a killed run goes on.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from explained_data import COARSE, FULL, RECIPE, SHIFT_SITE, SHIFT_SOURCE, SITES, Setting, bar, prepare, short
from explained_page import write_page

from rmscope.effects import controls
from rmscope.effects.evaluate import evaluate
from rmscope.effects.explained import (
    REMOVED,
    Donors,
    Ground,
    error_alone,
    keep,
    keep_curve,
    lost,
    remove,
)
from rmscope.effects.ledger import baseline, ledger_rows, shares
from rmscope.effects.selection import Responses, differences, forward_order, length_flags, profile
from rmscope.effects.splice import Replaced, agreement, delta_r2, replaced, slope, splice
from rmscope.effects.statistics import bootstrap
from rmscope.files import write_json
from rmscope.model.train import data_file, human_pairs, read_recipe
from rmscope.pairs.pair import Pair, split_of
from rmscope.pairs.readers import load_pairs
from rmscope.sae import Sae

SELECTED = 96
"""Fit pairs on which the lists are made."""
MATCHED = 3
SHIFTED = 48
PCA_TOKENS = 20_000
RM_BENCH = ("chat", "safety-refuse", "safety-response")
PARTS = ("features", "error", "remainder", "gap")


class Lists:
    """What is frozen on the fit split at a site: orders, flags, means, donors, control dictionaries."""

    def __init__(self, s: Setting, site: str, sae: Sae, fit: Sequence[int], measured: Sequence[Pair]) -> None:
        self.sae, tokens = sae, s.rm.tokenize_all(s.fit)
        responses = Responses(s.store, site, set(fit))
        read = {(i, side): s.rm.read_position(tokens[i].side(side)) + 1 for i in fit for side in ("chosen", "rejected")}

        def ending(pair: int, side: str) -> int:
            return s.rm.ending(tokens[pair].side(side)[: read[pair, side]]) - tokens[pair].divergence

        self.profile = p = profile(sae, responses, ending)
        x, d = responses.sample(PCA_TOKENS), s.rm.d_model
        basis = controls.principal_components(x)
        l0 = max(1, round(float((sae.encode(x[:4096]) > 0).sum(1).float().mean())))
        self.pca, self.coordinates = controls.signed(basis, p.x_mean), controls.signed(torch.eye(d), p.x_mean)
        self.sparse_pca = controls.signed(basis, p.x_mean, l0)
        self.random = controls.random_dictionary(x, sae.m, l0)
        chosen = [tokens[i] for i in fit[:SELECTED]]
        f_pca, f_coordinates = (one.encode(x).mean(0) for one in (self.pca, self.coordinates))
        dictionaries = {
            "features": (sae, p.f_mean), "pca": (self.pca, f_pca), "coordinates": (self.coordinates, f_coordinates),
        }  # fmt: skip
        D, delta = differences(s.rm, dictionaries, site, chosen, p.x_mean, progress=bar)
        lengths = np.array([t.chosen.numel() - t.rejected.numel() for t in chosen], dtype=float)
        self.length_slope = slope(delta, lengths)
        order = forward_order(D["features"], delta)
        self.flagged = p.dense | p.ending | length_flags(D["features"], lengths)
        self.order, self.unflagged = order[:, None], order[~self.flagged[order]][:, None]
        pairs_of = controls.signed_units(d)
        both = {name: D[name][:, :d] + D[name][:, d:] for name in ("pca", "coordinates")}
        self.pca_order, self.coordinate_order = (pairs_of[forward_order(both[n], delta)] for n in ("pca", "coordinates"))
        stored = [pair.first_human_turn() for pair in s.fit]
        donors = Donors(responses, stored, [pair.first_human_turn() for pair in measured])
        self.donors, self.ground = donors, Ground(sae, donors, p.f_mean, p.x_mean)
        self.pca_ground = Ground(self.pca, donors, f_pca, p.x_mean)
        self.coordinate_ground = Ground(self.coordinates, donors, f_coordinates, p.x_mean)

    def sets(self) -> list[list[np.ndarray]]:
        """The list's top K, then MATCHED draws of matched features, at each K of REMOVED."""
        top = [self.order[:k, 0] for k in REMOVED]
        draws = [controls.matched(self.profile, top[-1], top[-1], seed) for seed in range(MATCHED)]
        return [top, *([draw[:k] for k in REMOVED] for draw in draws)]


def site_figures(s: Setting, site: str) -> dict[str, Any]:
    sae, tokens = s.saes[site], s.rm.tokenize_all(s.measured)
    prompts = np.array([p.first_human_turn() for p in s.measured])
    lists = Lists(s, site, sae, range(len(s.fit)), s.measured)
    sets = lists.sets()
    found = replaced(
        s.rm,
        tokens,
        range(len(tokens)),
        {
            name: (site, replacement)
            for name, replacement in {
                "pca": splice(lists.sparse_pca), "random": splice(lists.random), "noise": controls.noise(sae),
                "error": error_alone(lists.ground), "keep": keep(lists.ground, lists.order, FULL),
                "unflagged": keep(lists.ground, lists.unflagged, COARSE),
                "keep_pca": keep(lists.pca_ground, lists.pca_order, COARSE),
                "keep_coordinates": keep(lists.coordinate_ground, lists.coordinate_order, COARSE),
                "remove": remove(sae, sets), "norm": controls.norm_matched(sae, lists.donors, sets[0]),
            }.items()
        },
        bar,
    )  # fmt: skip
    delta = found["keep"].delta
    (measured,) = evaluate(s.rm, {site: sae}, tokens, prompts.tolist(), bar)
    lengths = np.array([t.chosen.numel() - t.rejected.numel() for t in tokens], dtype=float)
    one = {n: delta_r2(delta, found[n].delta_hat[:, 0], prompts) for n in ("pca", "random", "noise")}
    one["length"] = delta_r2(delta, lists.length_slope * lengths, prompts)
    one["error"] = delta_r2(delta, found["error"].delta_hat[:, :-1].mean(1), prompts)
    one["error_mean"] = delta_r2(delta, found["error"].delta_hat[:, -1], prompts)
    grids = {"keep": FULL, "unflagged": COARSE, "keep_pca": COARSE, "keep_coordinates": COARSE}
    return {
        "site": site,
        "evaluation": {n: f.as_dict() for n, f in measured.figures.items()} | {"dead": measured.dead},
        "controls": {n: f.as_dict() for n, f in one.items()},
        "flagged": int(lists.flagged.sum()),
        "flagged_of_64": int(lists.flagged[lists.order[:64, 0]].sum()),
        "curves": {n: [p.as_dict() for p in keep_curve(found[n], g, prompts)] for n, g in grids.items()},
        "removed": removed_figures(found, prompts),
        "ledger": ledger_shares(s, site, lists, prompts),
        "pairs": len(tokens),
        "prompts": len(np.unique(prompts)),
    }


def removed_figures(found: dict[str, Replaced], prompts: np.ndarray) -> list[dict[str, Any]]:
    delta = found["remove"].delta
    hat = found["remove"].delta_hat.reshape(len(delta), 1 + MATCHED, len(REMOVED))
    return [
        {
            "k": k,
            "list": lost(delta, hat[:, 0, i], prompts).as_dict(),
            "matched": lost(delta, hat[:, 1:, i].mean(1), prompts).as_dict(),
            "norm": lost(delta, found["norm"].delta_hat[:, i], prompts).as_dict(),
        }
        for i, k in enumerate(REMOVED)
    ]


def ledger_shares(s: Setting, site: str, lists: Lists, prompts: np.ndarray) -> dict[str, Any]:
    start = baseline(lists.sae, "mean", lists.profile.f_mean, lists.profile.x_mean)
    tokens = s.rm.tokenize_all(s.measured)
    sd = float(s.rm.score_tokens(tokens).delta.std())
    made = ledger_rows(s.rm, lists.sae, site, tokens, range(len(tokens)), start, sd, bar, halvings=2)
    rows = sorted(made, key=lambda r: r[0])
    table = np.array([[row[part] for part in (*PARTS, "delta_r")] for _, row, _ in rows])
    value = shares(table[:, :4], table[:, 4])
    out = {}
    for i, part in enumerate(PARTS):
        low, high = bootstrap(table, prompts, lambda v, i=i: float(shares(v[:, :4], v[:, 4])[i]))
        out[part] = {"value": float(value[i]), "low": low, "high": high}
    return out


def shift_figures(s: Setting) -> dict[str, Any]:
    """An SAE and a list from helpful-base alone, measured there, on harmless-base and on RM-Bench."""
    training, held = human_pairs(read_recipe(RECIPE))
    known = {p.first_human_turn() for p in [*training, *held]}
    held = [p for p in held if split_of(p) == "measure"]
    bench = [p for n in RM_BENCH for p in load_pairs(data_file(f"rm-bench/{n}_filtered.json"), on_bad_row="skip")]
    places = {
        "helpful-base": [p for p in held if p.meta["source"] == "helpful-base"],
        "harmless-base": [p for p in held if p.meta["source"] == "harmless-base"],
        "RM-Bench": [p for p in bench if p.first_human_turn() not in known],
    }
    measured = {place: short(s.rm, pairs, SHIFTED) for place, pairs in places.items()}
    everything = [p for pairs in measured.values() for p in pairs]
    fit = [i for i, p in enumerate(s.fit) if p.meta["source"] == SHIFT_SOURCE]
    lists = Lists(s, SHIFT_SITE, s.narrow, fit, everything)
    tokens, out, done = s.rm.tokenize_all(everything), {}, 0
    for place, pairs in measured.items():
        index = range(done, done + len(pairs))
        done += len(pairs)
        prompts = np.array([p.first_human_turn() for p in pairs])
        kept = {"keep": (SHIFT_SITE, keep(lists.ground, lists.order, COARSE)), "splice": (SHIFT_SITE, splice(s.narrow))}
        found = replaced(s.rm, tokens, index, kept, bar)
        delta, hat = found["splice"].delta, found["splice"].delta_hat[:, 0]
        (one,) = evaluate(s.rm, {place: s.narrow}, [tokens[i] for i in index], prompts.tolist(), bar)
        out[place] = {
            "pairs": len(pairs), "prompts": len(np.unique(prompts)), "sd": float(delta.std()),
            "fvu": one.figures["fvu"].as_dict(), "splice": delta_r2(delta, hat, prompts).as_dict(),
            "agreement": agreement(delta, hat, prompts).as_dict(),
            "curve": [p.as_dict() for p in keep_curve(found["keep"], COARSE, prompts)],
        }  # fmt: skip
    return out


def main(folder: Path) -> None:
    s = prepare(folder)
    found: dict[str, Any] = {}
    for name, make in [
        *((site, lambda site=site: site_figures(s, site)) for site in SITES),
        ("shift", lambda: shift_figures(s)),
    ]:
        path = folder / f"{name}.json"
        if not path.is_file():
            started = time.time()
            figures = make()
            write_json(path, figures | {"seconds": round(time.time() - started)})
        found[name] = json.loads(path.read_text("utf-8"))
    write_page(Path(__file__).parent.parent / "docs", [found[site] for site in SITES], found["shift"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))

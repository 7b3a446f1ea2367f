"""Does rmscope find what was planted, and would a simpler way? One table from one script (docs/audit.md).

usage: audit.py OUT [--plants configs/audit/standard.yaml] [--pairs demo:plain] [--seeds 0 1 2] [--limit 800] [--calibrate]
                [--only rankings|pipelines] [--twins N] [--base FOLDER] [--max-tokens N] [--recipe FILE] [--run FILE]

A seed: one audit (``rmscope audit``), and beside it, on the same PM and matched by the same rule: the SAE's features ranked
by W_dec · w_r, by mean activation difference, by integrated gradients from zero with 4 nodes, by firing rate, at random; the
whole pipeline with principal components, with a random dictionary, and with features at ``embed`` in place of the SAEs; and
two skylines that are told what was planted, which only have to detect it: a mean-difference probe at the site, and logistic
regression on bags of tokens. ``--only rankings`` leaves out the three other pipelines, ``--only pipelines`` the rest. With
``--twins N`` all ways, ours too, are matched on so many twins a cue. The last four options are those of ``rmscope audit``.
Audits that are done are read from OUT. Prints a JSON line a seed and way, then the table.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
import yaml
from benchmarks.other_rankings import UNSIGNED, as_reported, rankings
from heads import fit_head

from rmscope.cli.terminal import Bars
from rmscope.evaluation.controls import principal_components, random_dictionary, signed
from rmscope.evaluation.selection import Responses
from rmscope.pairs.pair import SIDES, Pair
from rmscope.pairs.planting import twins
from rmscope.pairs.plants import Plant, read_plants
from rmscope.planted.matching import cue_effect, f1_score, match_plant, threshold
from rmscope.planted.recall_metrics import KS, recall
from rmscope.planted.twins import Twin, halves, prepare
from rmscope.run.evidence import TWINS
from rmscope.run.run import Run
from rmscope.run.settings import read_config
from rmscope.studies.audit.analyse import AuditConfig, audit
from rmscope.studies.audit.planting import base_pairs
from rmscope.studies.audit.scoring import Candidates, Scoring

RANKED_PAIRS = 256
"""Pairs of the fit split that the other rankings are made from."""
SAMPLE = 8192
"""Tokens that principal components and the random dictionary's scale are taken from."""
WAYS = ("ours", "head", "difference", "integrated", "firing", "random", "PCA", "random dictionary", "embed")


def emit(**row: Any) -> None:
    print(json.dumps(row), flush=True)


def audited(config: AuditConfig) -> dict[str, Any]:
    """The audit's figures; read where it is done."""
    path = config.out / "audit.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else audit(config, Bars())


def opened(config: AuditConfig, name: str = "run", **changes: Any) -> Run:
    """A run of the audit's PM and pairs, with other SAEs or sites where ``changes`` say so."""
    stored = yaml.safe_load((config.out / "run" / "run.yaml").read_text("utf-8"))["config"]
    return Run(read_config(None, {**stored, "ledger_pairs": 0, "out": config.out / name} | changes), Bars())


def by_rankings(
    run: Run, plants: Sequence[Plant], held_out: Sequence[Pair], seed: int, n: int
) -> dict[str, list[dict[str, Any]]]:
    """Per way, ours first, a row a plant: the matching rule on the best 20 and 50 features of each site by its scores."""
    tokens = [run.tokens[i] for i in run.of_split("fit")][:RANKED_PAIRS]
    scores = {site: rankings(run.rm, run.saes[site], site, tokens, seed) for site in run.sites}
    ways = ["ours", *next(iter(scores.values()))]
    raises = {site: raising(run, site) for site in run.sites}
    ours = Scoring(run, plants, held_out, seed)
    rows: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for plant in plants:
        prepared = prepare(run.rm, run.saes, twins(held_out, plant, n, seed), plant)
        for way in ways:
            sign = plant.sign if way in UNSIGNED else None

            def ranked(k: int, way: str = way, sign: int | None = sign) -> Candidates:
                return {site: held(as_reported(scores[site][way], k, sign), raises[site]) for site in run.sites}

            rows[way].append(matched(run, plant, prepared, ours.within if way == "ours" else ranked))
    return rows


def raising(run: Run, site: str) -> dict[int, float]:
    """In which share of the responses that the run ablated a feature from it raises the reward; of frozen features alone."""
    table = pl.read_parquet(run.folder / "features" / f"{site}.parquet").filter(pl.col("sign_consistency").is_not_null())
    up = pl.when(pl.col("mean_effect") > 0).then("sign_consistency").otherwise(1 - pl.col("sign_consistency"))
    return dict(table.select("feature", up).iter_rows())


def held(rows: Sequence[dict[str, Any]], raises: Mapping[int, float]) -> list[dict[str, Any]]:
    """Rows of another ranking with the constancy of their sign where it is known, as ours are; else it is granted."""
    share = [raises.get(row["feature"], float(row["mean_effect"] > 0)) for row in rows]
    signed = zip(rows, share, strict=True)
    return [row | {"sign_consistency": up if row["mean_effect"] > 0 else 1 - up} for row, up in signed]


def by_pipeline(run: Run, plants: Sequence[Plant], held_out: Sequence[Pair], seed: int, n: int) -> list[dict[str, Any]]:
    """A row a plant: the matching rule on what a finished run reports, without the reasons of misses."""
    reported = Scoring(run, plants, held_out, seed).within
    made = ((plant, prepare(run.rm, run.saes, twins(held_out, plant, n, seed), plant)) for plant in plants)
    return [matched(run, plant, prepared, reported) for plant, prepared in made]


def matched(
    run: Run, plant: Plant, prepared: Mapping[str, list[Twin]], within: Callable[[int], Candidates]
) -> dict[str, Any]:
    """A plant's effect, and where it was learned the first hit among the best 20, then 50 of each site."""
    row = cue_effect(plant, next(iter(prepared.values())), run.sd) | {"found": False, "rank": None}
    for k in KS if row["learned"] else ():
        found = match_plant(run.rm, run.saes, plant, prepared, within(k), run.sd)
        if found["found"]:
            return row | {"found": True, "rank": found["rank"]}
    return row


def with_dictionary(config: AuditConfig, run: Run, name: str) -> Run:
    """The whole pipeline with principal components or a random dictionary in place of the SAEs, at the same L0."""
    folder = config.out / name / "dictionary"
    for site in run.sites:
        x = Responses(run.store, site).sample(SAMPLE)
        k = int(run.saes[site].cfg.get("k", 32))
        made = random_dictionary(x, run.saes[site].m, k) if name != "pca" else signed(principal_components(x), x.mean(0), k)
        made.site = site
        made.save(folder / site)
    return opened(config, f"{name}/run", sae_dir=str(folder), reward_aware=0)


def skylines(run: Run, plants: Sequence[Plant], held_out: Sequence[Pair], seed: int, n: int) -> Iterator[dict[str, Any]]:
    """Per plant, F1 on the measuring half of a probe and of a bag of words that were fitted to the cue on the other half."""
    for plant in plants:
        made = twins(held_out, plant, n, seed)
        prepared = prepare(run.rm, run.saes, made, plant)
        probes = {site: probe_f1(prepared[site]) for site in run.sites}
        yield {"plant": plant.name, "kind": plant.kind, "probe": probes, "bag_of_words": words_f1(run, made)}


def probe_f1(made: Sequence[Twin]) -> float:
    """The direction from the fillers' windows to the cues', and its largest product in a window."""
    fitting, measuring = halves(made)
    mean = {s: torch.cat([t.responses[s].x[t.windows[s]] for t in fitting]).mean(0) for s in SIDES}
    direction = mean["chosen"] - mean["rejected"]

    def products(part: Sequence[Twin], side: Any) -> np.ndarray:
        return np.array([float((t.responses[side].x[t.windows[side]] @ direction).max()) for t in part])

    _, theta = threshold(products(fitting, "chosen"), products(fitting, "rejected"))
    return f1_score(products(measuring, "chosen"), products(measuring, "rejected"), theta)


def words_f1(run: Run, made: Sequence[Pair]) -> float:
    """Logistic regression on counts of tokens, response with the cue against response with filler."""
    prompts = list(dict.fromkeys(p.meta["group"] for p in made))
    fit = np.array([prompts.index(p.meta["group"]) % 2 == 0 for p in made])
    bags = {s: [Counter(run.rm.tokenizer(p.side(s)).input_ids) for p in made] for s in SIDES}
    place = {token: i for i, token in enumerate(sorted({t for side in bags.values() for bag in side for t in bag}))}
    counts = {s: np.ones((len(made), len(place) + 1)) for s in SIDES}  # the last column is the constant
    for side, rows in bags.items():
        counts[side][:, :-1] = [[bag[token] for token in place] for bag in rows]
    labels = np.r_[np.ones(fit.sum()), -np.ones(fit.sum())]
    w = fit_head(np.concatenate([counts[s][fit] for s in SIDES]), labels)
    return f1_score(*(counts[s][~fit] @ w for s in SIDES), 0.0)


def ways_of(
    config: AuditConfig, seed: int, calibrate: bool, only: str | None, n: int
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(way, rows of its plants) of one seed, ours first."""
    done = audited(config.model_copy(update={"calibrate": calibrate}))
    figures = {k: v for k, v in done.items() if k != "plants"}
    emit(case="audit", seed=seed, **figures, plants=done["plants"])
    listed, run = read_plants(config.plants).plants, opened(config)
    _, held_out = base_pairs(config.pairs, config.limit, config.max_tokens, run.rm.tokenizer)
    if only != "pipelines":
        yield from by_rankings(run, listed, held_out, seed, n).items()
        for row in skylines(run, listed, held_out, seed, n):
            emit(case="skyline", seed=seed, **row)
    if only == "rankings":
        return
    others = {"PCA": with_dictionary(config, run, "pca"), "random dictionary": with_dictionary(config, run, "random")}
    for way, other in (others | {"embed": opened(config, "embed", sites=["embed"])}).items():
        other.go()
        yield way, by_pipeline(other, listed, held_out, seed, n)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--plants", type=Path, default=Path("configs/audit/standard.yaml"))
    parser.add_argument("--pairs", default="demo:plain")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--limit", type=int, default=800)
    parser.add_argument("--calibrate", action="store_true")
    parser.add_argument("--only", choices=["rankings", "pipelines"])
    parser.add_argument("--twins", type=int, default=TWINS)
    told = AuditConfig.model_fields
    parser.add_argument("--base", default=told["base"].default)
    parser.add_argument("--max-tokens", type=int, default=told["max_tokens"].default)
    parser.add_argument("--recipe", type=Path)
    parser.add_argument("--run", type=Path)
    args = parser.parse_args()
    same = {name: getattr(args, name) for name in ("plants", "pairs", "limit", "base", "max_tokens", "recipe", "run")}
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for seed in args.seeds:
        config = AuditConfig(**same, out=args.out / f"seed{seed}", seed=seed)
        for way, rows in ways_of(config, seed, args.calibrate, args.only, args.twins):
            found[way].append({k: recall(rows, k) for k in KS})
            ranks = {row["name"]: row["rank"] for row in rows if row["found"]}
            emit(case="way", seed=seed, way=way, ranks=ranks, **{f"recall_at_{k}": found[way][-1][k] for k in KS})
    print(f"\n| ranked by | {' | '.join(f'recall@{k}' for k in KS)} |\n|---|{'---|' * len(KS)}", file=sys.stdout)
    for way, seeds in ((way, seeds) for way, seeds in found.items() if seeds):
        cells = []
        for k in KS:
            hits, n = (sum(s[k][name] for s in seeds) for name in ("hits", "n"))
            cells.append(f"{hits} of {n} ({', '.join(str(s[k]['hits']) for s in seeds)})")
        print(f"| {way} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

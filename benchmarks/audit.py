"""Does rmscope find what was planted, and would a simpler way? One table from one script.

usage: audit.py OUT [--plants configs/audit/standard.yaml] [--pairs demo:plain] [--seeds 0 1 2] [--limit 800] [--calibrate]
                [--only rankings|pipelines] [--twins N] [--base FOLDER] [--max-tokens N] [--recipe FILE] [--run FILE]

Each seed is one audit (``rmscope audit``). Beside it, on the same PM and with the same matching rule:

- the SAE's features in other orders: by W_dec · w_r, by mean activation difference, by integrated gradients from zero with 4
  nodes, by firing rate, at random;
- the whole pipeline with principal components, a random dictionary, or features at ``embed`` in place of the SAEs;
- two upper bounds that are told what was planted and only have to detect it: a mean-difference probe at the site, and
  logistic regression on bags of tokens.

``--only rankings`` leaves out the three other pipelines, ``--only pipelines`` the rest. ``--twins N`` matches all ways, ours
too, on that many twins per cue. The last four options are those of ``rmscope audit``. Finished audits are read from OUT.
Prints one JSON line per seed and way, then the table.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from heads import fit_head
from other_rankings import UNSIGNED, as_candidates, rankings

from rmscope.cli.terminal import Bars
from rmscope.evaluation.selection import Responses, principal_components, random_dictionary, signed_basis
from rmscope.pairs.pair import SIDES, Pair, Side
from rmscope.pairs.planting import twins
from rmscope.pairs.plants import Plant, read_plants
from rmscope.planted.matching import cue_effect, f1_score, match_plant, threshold
from rmscope.planted.results import KS, Candidate, Candidates, CueMatch, recall
from rmscope.planted.twins import Twin, halves, prepare
from rmscope.run.collect import TWINS
from rmscope.run.run import Run
from rmscope.run.settings import RunConfig, read_record
from rmscope.settings import read_settings
from rmscope.statistics import Figure
from rmscope.studies.audit.analyse import analyse
from rmscope.studies.audit.planting import base_pairs
from rmscope.studies.audit.result import AuditResult
from rmscope.studies.audit.scoring import Scoring
from rmscope.studies.audit.settings import AuditConfig

RANKED_PAIRS = 256
"""Pairs of the fit split that the other rankings are made from."""
SAMPLE = 8192
"""Tokens that principal components and the random dictionary's scale are taken from."""
WAYS = ("ours", "head", "difference", "integrated", "firing", "random", "PCA", "random dictionary", "embed")


def emit(**row: Any) -> None:
    print(json.dumps(row), flush=True)


def audit(config: AuditConfig) -> AuditResult:
    """The audit's figures; read where it is done."""
    path = config.out / "audit.json"
    return AuditResult.model_validate_json(path.read_text("utf-8")) if path.is_file() else analyse(config, Bars())


def open_run(config: AuditConfig, name: str = "run", **changes: Any) -> Run:
    """A run on the audit's PM and pairs, with other SAEs or sites where ``changes`` say so."""
    stored = read_record(config.out / "run")["config"]
    return Run.create(
        read_settings(RunConfig, None, {**stored, "ledger_pairs": 0, "out": config.out / name} | changes), Bars()
    )


def by_rankings(run: Run, plants: Sequence[Plant], held_out: Sequence[Pair], seed: int, n: int) -> dict[str, list[CueMatch]]:
    """Per way, ours first, one row per plant, matched among the best 20 and 50 features of each site by its score."""
    tokens = [run.tokens[i] for i in run.of_split("fit")][:RANKED_PAIRS]
    scores = {site: rankings(run.rm, run.saes[site], site, tokens, seed) for site in run.sites}
    ways = ["ours", *next(iter(scores.values()))]
    raises = {site: raising_shares(run, site) for site in run.sites}
    ours = Scoring(run, plants, held_out, seed)
    rows: dict[str, list[CueMatch]] = {way: [] for way in ways}
    for plant in plants:
        prepared = prepare(run.rm, run.saes, twins(held_out, plant, n, seed), plant)
        for way in ways:
            sign = plant.sign if way in UNSIGNED else None

            def best(k: int, way: str = way, sign: int | None = sign) -> Candidates:
                return {
                    site: with_consistency(as_candidates(scores[site][way], k, sign), raises[site]) for site in run.sites
                }

            rows[way].append(match(run, plant, prepared, ours.best if way == "ours" else best))
    return rows


def raising_shares(run: Run, site: str) -> dict[int, float]:
    """The share of the responses on which the run ablated a feature in which it raises the reward; of frozen features."""
    table = run.features(site).filter(pl.col("sign_consistency").is_not_null())
    up = pl.when(pl.col("mean_effect") > 0).then("sign_consistency").otherwise(1 - pl.col("sign_consistency"))
    return dict(table.select("feature", up).iter_rows())


def with_consistency(candidates: Sequence[Candidate], raises: Mapping[int, float]) -> list[Candidate]:
    """Candidates of another ranking with the consistency of their sign where it is known, as ours have it; else it is 1."""
    shares = [raises.get(c.feature, float(c.mean_effect > 0)) for c in candidates]
    pairs = zip(candidates, shares, strict=True)
    return [replace(c, sign_consistency=up if c.mean_effect > 0 else 1 - up) for c, up in pairs]


def by_pipeline(run: Run, plants: Sequence[Plant], held_out: Sequence[Pair], seed: int, n: int) -> list[CueMatch]:
    """One row per plant: the matching rule on what a finished run reports, without the reasons of misses."""
    best = Scoring(run, plants, held_out, seed).best
    prepared = ((plant, prepare(run.rm, run.saes, twins(held_out, plant, n, seed), plant)) for plant in plants)
    return [match(run, plant, twins_of_plant, best) for plant, twins_of_plant in prepared]


def match(run: Run, plant: Plant, prepared: Mapping[str, list[Twin]], best: Callable[[int], Candidates]) -> CueMatch:
    """A plant's effect, and where it was learned the first hit among the best 20, then 50 of each site."""
    effect = cue_effect(plant, next(iter(prepared.values())), run.sd)
    for k in KS if effect.learned else ():
        row = match_plant(run.rm, run.saes, plant, prepared, best(k), run.sd)
        if row.found:
            return row
    return CueMatch(**dict(effect))


def with_dictionary(config: AuditConfig, run: Run, name: str) -> Run:
    """The whole pipeline with principal components or a random dictionary in place of the SAEs, at the same L0."""
    folder = config.out / name / "dictionary"
    for site in run.sites:
        x = Responses(run.store, site).sample(SAMPLE)
        k = int(run.saes[site].cfg.get("k", 32))
        pca = name == "pca"
        sae = signed_basis(principal_components(x), x.mean(0), k) if pca else random_dictionary(x, run.saes[site].m, k)
        sae.site = site
        sae.save(folder / site)
    return open_run(config, f"{name}/run", sae_dir=str(folder), reward_aware=0)


def upper_bounds(run: Run, plants: Sequence[Plant], held_out: Sequence[Pair], seed: int, n: int) -> Iterator[dict[str, Any]]:
    """Per plant, F1 on the measuring half of a probe and of a bag of words that were fitted to the cue on the other half."""
    for plant in plants:
        pairs = twins(held_out, plant, n, seed)
        prepared = prepare(run.rm, run.saes, pairs, plant)
        probes = {site: probe_f1(prepared[site]) for site in run.sites}
        yield {"plant": plant.name, "kind": plant.kind, "probe": probes, "bag_of_words": words_f1(run, pairs)}


def probe_f1(prepared: Sequence[Twin]) -> float:
    """F1 of the direction from the fillers' windows to the cues', by its largest product in a window."""
    fitting, measuring = halves(prepared)
    mean = {s: torch.cat([t.responses[s].x[t.windows[s]] for t in fitting]).mean(0) for s in SIDES}
    direction = mean["chosen"] - mean["rejected"]

    def products(part: Sequence[Twin], side: Side) -> np.ndarray:
        return np.array([float((t.responses[side].x[t.windows[side]] @ direction).max()) for t in part])

    _, theta = threshold(products(fitting, "chosen"), products(fitting, "rejected"))
    return f1_score(products(measuring, "chosen"), products(measuring, "rejected"), theta)


def words_f1(run: Run, pairs: Sequence[Pair]) -> float:
    """F1 of logistic regression on counts of tokens, response with the cue against response with filler."""
    prompts = list(dict.fromkeys(p.prompt_key for p in pairs))
    fit = np.array([prompts.index(p.prompt_key) % 2 == 0 for p in pairs])
    bags = {s: [Counter(run.rm.tokenizer(p.side(s)).input_ids) for p in pairs] for s in SIDES}
    place = {token: i for i, token in enumerate(sorted({t for side in bags.values() for bag in side for t in bag}))}
    counts = {s: np.ones((len(pairs), len(place) + 1)) for s in SIDES}  # the last column is the constant
    for side, rows in bags.items():
        counts[side][:, :-1] = [[bag[token] for token in place] for bag in rows]
    labels = np.r_[np.ones(fit.sum()), -np.ones(fit.sum())]
    w = fit_head(np.concatenate([counts[s][fit] for s in SIDES]), labels)
    return f1_score(*(counts[s][~fit] @ w for s in SIDES), 0.0)


def ways_of(
    config: AuditConfig, seed: int, calibrate: bool, only: str | None, n: int
) -> Iterator[tuple[str, list[CueMatch]]]:
    """(way, rows of its plants) of one seed, ours first."""
    emit(case="audit", seed=seed, **audit(config.model_copy(update={"calibrate": calibrate})).as_json())
    plants, run = read_plants(config.plants).plants, open_run(config)
    _, held_out = base_pairs(config.pairs, config.limit, config.max_tokens, run.rm.tokenizer)
    if only != "pipelines":
        yield from by_rankings(run, plants, held_out, seed, n).items()
        for row in upper_bounds(run, plants, held_out, seed, n):
            emit(case="upper bound", seed=seed, **row)
    if only == "rankings":
        return
    others = {"PCA": with_dictionary(config, run, "pca"), "random dictionary": with_dictionary(config, run, "random")}
    for way, other in (others | {"embed": open_run(config, "embed", sites=["embed"])}).items():
        yield way, by_pipeline(other.go(), plants, held_out, seed, n)


def hits(figure: Figure) -> int:
    """How many hits a share counts."""
    return round((figure.value or 0.0) * (figure.n or 0))


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
    recalls: dict[str, list[dict[int, Figure]]] = {way: [] for way in WAYS}
    for seed in args.seeds:
        config = AuditConfig(**same, out=args.out / f"seed{seed}", seed=seed)
        for way, rows in ways_of(config, seed, args.calibrate, args.only, args.twins):
            recalls[way].append({k: recall(rows, k) for k in KS})
            ranks = {row.name: row.rank for row in rows if row.found}
            counted = {f"recall_at_{k}": figure.as_dict() for k, figure in recalls[way][-1].items()}
            emit(case="way", seed=seed, way=way, ranks=ranks, **counted)
    print(f"\n| ranked by | {' | '.join(f'recall@{k}' for k in KS)} |\n|---|{'---|' * len(KS)}")
    for way, seeds in ((way, seeds) for way, seeds in recalls.items() if seeds):
        cells = []
        for k in KS:
            found, n = [hits(s[k]) for s in seeds], sum(s[k].n or 0 for s in seeds)
            cells.append(f"{sum(found)} of {n} ({', '.join(map(str, found))})")
        print(f"| {way} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

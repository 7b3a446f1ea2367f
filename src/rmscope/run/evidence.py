"""From a run's tables to the report's data, and from there to report.html, report.json and the evidence tables."""

from __future__ import annotations

import datetime
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl

from rmscope.effects.ledger_summary import FEWEST, share_rows
from rmscope.io import Progress, write_json, write_table, write_text
from rmscope.pairs.demo import plain_demo_pairs, zoo_plants
from rmscope.pairs.pair import SIDES, split_of
from rmscope.pairs.planting import twins
from rmscope.pairs.plants import Plant
from rmscope.planted.matching import match_plant, merged_ranks
from rmscope.planted.twins import prepare
from rmscope.ranking.feature_statistics import firings
from rmscope.ranking.ranking import BOUND, power_statement
from rmscope.report.page import render_report
from rmscope.run.examples import activations_of, choose_examples, example_page
from rmscope.run.results import Results
from rmscope.sae import measure
from rmscope.statistics import accuracy

SHOWN = 20
"""Features a direction and site that the report shows."""
TWINS = 64
"""Twins a planted cue is measured on."""


def write_report(run: Results, progress: Progress) -> dict[str, Any]:
    """Writes the evidence and report.html, and returns the data that the page shows."""
    demo = run.config.data.startswith("demo:") and run.config.data != "demo:plain"
    steps = len(run.sites) + (len(zoo_plants()) if demo else 0)
    sites = []
    for i, site in enumerate(run.sites):
        progress(i, steps, f"dossiers of {site}")
        sites.append(site_data(run, site))
    planted = None
    if demo:
        planted = []
        candidates = {site: candidates_of(run, site) for site in run.sites}
        for i, plant in enumerate(zoo_plants()):
            progress(len(run.sites) + i, steps, f"cue {plant.name}")
            planted.append(cue_data(run, plant, candidates))
        write_json(run.folder / "evidence" / "planted.json", planted)
    progress(steps, steps, "")
    data = {
        "title": f"What {run.config.model} rewards",
        "command": f"rmscope run --model {run.config.model} --data {run.config.data} --out {run.folder.name}",
        "made": datetime.date.today().isoformat(),
        "model": model_data(run),
        "data": pairs_data(run),
        "scores": score_data(run.scores, run.prompts),
        "noise_floor": run.noise_floor,
        "sites": sites,
        "planted": planted,
        "footer": {
            "seconds": time.time() - run.started,
            "versions": run.on_disk.record["versions"],
            "seed": run.config.seed,
        },
    }
    write_json(run.folder / "evidence" / "report.json", data)
    write_text(run.folder / "report.html", render_report(data))
    return data


def model_data(run: Results) -> dict[str, Any]:
    rm = run.rm
    eos = ", eos appended" if rm.rendering.append_eos else ""
    return {
        "name": rm.name,
        "blocks": len(rm.blocks),
        "d_model": rm.d_model,
        "identity": rm.identity,
        "rendering": f"{rm.rendering.style}{eos}",
        "preflight": run.preflight.rows(),
    }


def pairs_data(run: Results) -> dict[str, Any]:
    report = run.read_report
    left_out = [{"why": why, "count": n} for why, n in _counted([reason for _, reason in report.skipped]).items()]
    if report.duplicates:
        left_out.append({"why": "stands twice", "count": report.duplicates})
    if beyond := len(run.all_pairs) - len(run.scored):
        left_out.append({"why": f"longer than {run.longest}", "count": beyond})
    if smaller := len(run.scored) - len(run.pairs):
        left_out.append({"why": "scored, but not among the largest |Δr|", "count": smaller})
    return {
        "name": run.config.data,
        "pairs": len(run.pairs),
        "prompts": len({run.prompts[id_] for id_ in run.ids}),
        "splits": _counted(run.splits),
        "left_out": left_out,
    }


def _counted(items: list[str]) -> dict[str, int]:
    return {item: items.count(item) for item in dict.fromkeys(items)}


def score_data(scores: pl.DataFrame, prompts: Mapping[str, str]) -> dict[str, Any]:
    """Accuracy with its interval (bootstrap by prompt), the length-only baseline, means, and the histogram of Δr."""
    delta = scores["delta"].to_numpy().astype(float)
    longer = (scores["n_chosen"] - scores["n_rejected"]).to_numpy()
    counts, edges = np.histogram(delta, bins=min(40, max(5, delta.size // 10)))
    return {
        **accuracy(delta, longer, np.array([prompts[p] for p in scores["pair"]])),
        "mean_chosen": float(scores["chosen"].mean()),  # type: ignore[arg-type]
        "mean_rejected": float(scores["rejected"].mean()),  # type: ignore[arg-type]
        "mean_abs_delta": float(np.abs(delta).mean()),
        "sd_delta": float(delta.std(ddof=1)),
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
    }


def site_data(run: Results, site: str) -> dict[str, Any]:
    folder = run.folder / "effects" / site
    features = pl.read_parquet(run.folder / "features" / f"{site}.parquet")
    exact = pl.read_parquet(folder / "exact.parquet").join(run.scores.select("pair", "split"), on="pair")
    trust_rows = pl.read_parquet(folder / "trust.parquet")
    confirm = exact.filter(pl.col("split") == "confirm")
    if (hardest := folder / "strong.parquet").is_file():  # examples of what is reported for its strong firings are those
        strong = pl.read_parquet(hardest)
        strong = strong.join(features.filter(pl.col("flags").list.contains("strong")), on="feature", how="semi")
        confirm = pl.concat([confirm.join(strong, on="feature", how="anti"), strong], how="diagonal")
    return {
        "site": site,
        "sae": sae_data(run, site),
        "trust": _json(folder / "trust.json"),
        "scatter": trust_rows.select("estimate", "effect").sample(min(600, trust_rows.height), seed=0).rows(),
        "ledger": ledger_data(pl.read_parquet(run.folder / "ledger" / f"{site}.parquet"), run),
        "explained": _json(folder / "explained.json") if (folder / "explained.json").is_file() else None,
        "frozen": features.height,
        "eligible": int(features["eligible"].sum()),
        "reported": int(features["reported"].sum()),
        "flagged": features.filter(pl.col("reported") & (pl.col("flags").list.len() > 0)).height,
        "prefers": int(features["prefers"].sum()),
        "bound": BOUND * run.sd,
        "power": power_statement(features, run.sd),
        "features": feature_pages(run, site, features, confirm),
    }


def _json(path: Any) -> Any:
    import json

    return json.loads(path.read_text("utf-8"))


def sae_data(run: Results, site: str) -> dict[str, Any]:
    """Figures on stored tokens of the fit split (the SAE's own training text), and its training curve."""
    sae = run.saes[site]
    figures = measure(sae, run.store.batches(site, 4096, seed=1))
    curve: list[Any] = []
    if (path := run.folder / "saes" / site / "training.parquet").is_file():
        curve = pl.read_parquet(path).select("step", "fvu").rows()
    return {
        "architecture": sae.architecture,
        "d_sae": sae.m,
        "k": sae.cfg.get("k"),
        "fvu": figures.fvu,
        "l0": figures.l0,
        "dead": figures.dead,
        "tokens": sae.metadata.get("rmscope", {}).get("tokens"),
        "curve": curve,
    }


def ledger_data(ledger: pl.DataFrame, run: Results) -> dict[str, Any] | None:
    """None where too few pairs have a ledger for shares with an interval."""
    if ledger.height < FEWEST:
        return None
    return {
        "pairs": ledger.height,
        "shares": share_rows(ledger, [run.prompts[p] for p in ledger["pair"]]),
        "largest_gap": float(ledger["gap"].abs().max()),  # type: ignore[arg-type]
        "example": None,
    }


def feature_pages(run: Results, site: str, features: pl.DataFrame, confirm: pl.DataFrame) -> list[dict[str, Any]]:
    """The features that the page shows: reported ones first, at most 20 up and 20 down, each with its examples."""
    shown = pl.concat(
        [
            features.filter(pl.col("mean_effect") > 0).head(SHOWN),
            features.filter(pl.col("mean_effect") < 0).head(SHOWN),
        ]
    ).sort("rank")
    examples = choose_examples(confirm, shown["feature"].to_list(), run.index)
    f = activations_of(run.rm, run.saes[site], site, run.tokens, examples)
    rewards = {row["pair"]: row for row in run.scores.select("pair", *SIDES).iter_rows(named=True)}
    pages = []
    for row in shown.iter_rows(named=True):
        mine = [
            example_page(
                run.rm,
                e,
                run.pairs[e.pair],
                run.tokens[e.pair],
                rewards[run.ids[e.pair]],
                {s: f[e.feature, e.pair, s] for s in SIDES},
            )
            for e in examples
            if e.feature == row["feature"]
        ]
        tokens = run.census[site].top_tokens(row["feature"], lambda t: run.rm.tokenizer.decode([t]))
        pages.append({**row, "tokens": [list(t) for t in tokens], "examples": mine})
    write_table(run.folder / "evidence" / f"examples.{site}.parquet", _example_table(pages))
    return pages


def _example_table(pages: list[dict[str, Any]]) -> pl.DataFrame:
    rows = [
        {
            "feature": page["feature"],
            "prompt": example["prompt"],
            "side": side["side"],
            "text": "".join(text for text, _ in side["tokens"]),
            "before": side["before"],
            "after": side["after"],
        }
        for page in pages
        for example in page["examples"]
        for side in example["sides"]
    ]
    schema = {
        "feature": pl.Int32,
        "prompt": pl.String,
        "side": pl.String,
        "text": pl.String,
        "before": pl.Float64,
        "after": pl.Float64,
    }
    return pl.DataFrame(rows, schema=schema)


def cue_data(run: Results, plant: Plant, candidates: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """One planted cue against the reported features, on prompts of the measure split and in held-out wordings."""
    held = [p for p in plain_demo_pairs() if split_of(p) == "measure"]
    prepared = prepare(run.rm, run.saes, twins(held, plant, TWINS, run.config.seed), plant)
    return match_plant(run.rm, run.saes, plant, prepared, candidates, run.sd)


def candidates_of(run: Results, site: str, most: int | None = SHOWN) -> list[dict[str, Any]]:
    """The best reported features of a site (all: None) without those of the text's ending, ranked with like ones merged."""
    table = pl.read_parquet(run.folder / "features" / f"{site}.parquet").filter("reported")[:most]
    features = table["feature"].to_list()
    ranks = merged_ranks(features, run.saes[site].W_dec, firings(run.store, run.saes[site], site, features))
    kept = table.filter(~pl.col("flags").list.contains("ending"))
    if "strong_consistency" in kept.columns:  # a run of an earlier version knows no strong firings
        consistency = (
            pl.when(pl.col("flags").list.contains("strong")).then("strong_consistency").otherwise("sign_consistency")
        )
        kept = kept.with_columns(consistency.alias("sign_consistency"))
    return [row | {"rank": ranks[row["feature"]]} for row in kept.iter_rows(named=True)]

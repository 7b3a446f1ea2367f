"""Two PMs on the same fresh pairs: are A's features there in B, and what became of the concepts that A and B reward?"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl

from rmscope.errors import InputError
from rmscope.io import content_hash, write_json, write_table
from rmscope.run.folder import RunFolder
from rmscope.run.run import Run
from rmscope.statistics import correlation
from rmscope.studies.compare import measure
from rmscope.studies.compare.classify import CLASSES, against_controls, chance_of, concepts, judge, swap_counts
from rmscope.studies.compare.models import ComparedModel, Comparison, fresh_pairs, hold_out, open_control, open_other
from rmscope.studies.compare.result import ClassCount, CompareResult, FeatureComparison, RewardComparison, Swap
from rmscope.studies.compare.settings import CompareConfig

VERSION = 2
"""Raised when the tables of the units hold something else."""


def analyse(run: Run, config: CompareConfig, other: Run | None = None) -> CompareResult:
    """Compares the PM of a run, A, with another PM, B; ``other`` is B's run where it is open already.

    1. B and the controls are opened.
    2. The PMs meet on fresh pairs: those of the runs' measure splits.
    3. The figures are measured (:func:`compare_models`).
    4. ``compare-OTHER`` is written as JSON, table and page.

    Raises:
        InputError: a run is not finished, the PMs share no text, width or site, or a control has no scalar head.
    """
    started = time.time()
    a = ComparedModel.of_run(run)
    b = ComparedModel.of_run(other) if other is not None else open_other(run, config.other)
    controls = [open_control(run, control, b) for control in config.control or ()]

    runs = [run, *([b.run] if b.run is not None else [])]
    comparison = hold_out(a, b, fresh_pairs([r.pair_set for r in runs], config.pairs), controls)

    result = compare_models(comparison, run.on_disk, config.prompts, run.config.seed)

    name = "compare-" + re.sub(r"[^A-Za-z0-9._-]+", "-", Path(config.other).name or config.other)
    folder = config.out or run.folder / "evidence"
    result.path, result.seconds = folder / f"{name}.html", round(time.time() - started, 1)
    result.data = [r.config.data for r in runs]
    write_table(folder / f"{name}.parquet", result.table)
    write_json(folder / f"{name}.json", result.as_json())
    result.page().save()
    return result


def compare_models(c: Comparison, on_disk: RunFolder, prompts: int, seed: int) -> CompareResult:
    """The figures of a comparison. Long work goes in units that outlive a kill.

    1. Both PMs read the fresh pairs; every SAE reads both streams.
    2. Each reported feature is ablated in both PMs, on the same responses to at most ``prompts`` prompts, and gets a class.
    3. Features with like decoders become concepts.

    Of a base without a head only the first step is done. With controls features are ablated in them too, and a difference
    *holds* where B stands apart from all of A's kind. Each control is then put in B's place (:mod:`.classify`).

    Raises:
        InputError: a PM gives every pair the same Δr.
    """
    listed = [((d.of, d.site), d.sae.identity(), d.reported) for d in c.dictionaries]
    texts = [(i, t.chosen.tolist(), t.rejected.tolist()) for i, t in zip(c.pairs.ids, c.pairs.tokens, strict=True)]
    key = content_hash(VERSION, c.a.identity, c.b.identity, listed, content_hash(*texts))
    with on_disk.display.stage("read") as progress:
        seen = on_disk.in_units("compare-read", key, range(len(texts)), progress, partial(measure.read_unit, c))
    counts = measure.count_features(seen["counts"])
    table = measure.list_features(c, counts)
    sites = [measure.compare_site(d, seen["sums"], counts, table, c.pairs.prompts) for d in c.dictionaries]
    delta, swaps = None, list[Swap]()
    if not c.b.base:
        delta, judged, swaps = _measure_effects(c, seen, on_disk, key, prompts, seed)
        table = table.join(judged, on=measure.FEATURE, how="left", maintain_order="left")
        # a feature that fires on no fresh response has no effects
        table = table.with_columns(pl.col("prompts").fill_null(0), pl.col("class").fill_null("undecided"))

    features = [FeatureComparison.of_row(row) for row in table.to_dicts()]
    classes = [f.class_ for f in features]
    grouped = [] if c.b.base else concepts(features, c.dictionaries)
    if not c.b.base:
        table = table.with_columns(pl.Series("concept", [f.concept for f in features], dtype=pl.Int32))
    on_disk.drop_parts("compare-read", key)
    return CompareResult(
        a=c.a.name,
        b=c.b.name,
        base=c.b.base,
        b_has_run=bool(c.b.saes),
        controls=[control.name for control in c.controls],
        chance=chance_of(len(c.controls)) if c.controls else None,
        swaps=swaps,
        pairs=len(texts),
        prompts=len(set(c.pairs.prompts.values())),
        sites=sites,
        delta=delta,
        classes=[] if c.b.base else [ClassCount(name, classes.count(name), means) for name, means in CLASSES.items()],
        concepts=grouped,
        features=features,
        table=table,
    )


def _measure_effects(
    c: Comparison, seen: Mapping[str, pl.DataFrame], on_disk: RunFolder, key: str, prompts: int, seed: int
) -> tuple[RewardComparison, pl.DataFrame, list[Swap]]:
    """Δr of the PMs; one row per feature: its ablation effects in each PM and its class; and each control in B's place."""
    rewards, key = seen["rewards"], content_hash(key, prompts, seed)
    delta = {v: (rewards[f"chosen_{v}"] - rewards[f"rejected_{v}"]).to_numpy() for v in "ab"}
    controls = [v for v in c.models if v not in "ab"]
    for v, control in zip(controls, c.controls, strict=True):
        delta[v] = control.rm.score_tokens(c.pairs.tokens).delta.double().numpy()
        key = content_hash(key, control.identity)
    sd = {v: float(values.std(ddof=1)) for v, values in delta.items()}
    for v, model in c.models.items():
        if not sd[v] > 0:
            raise InputError(
                f"The rewards of {model.name} do not differ on the fresh pairs; name a PM that tells them apart."
            )
    requests = measure.ablation_requests(c, seen["firing"], prompts, seed)
    places = sorted({c.pairs.index[pair] for pair in requests["pair"]})
    with on_disk.display.stage("ablate") as progress:
        tables = on_disk.in_units("compare-ablations", key, places, progress, partial(measure.ablation_unit, c, requests))
    ablations = tables.get("ablations", pl.DataFrame(schema=measure.ABLATIONS))
    measured = measure.pair_effects(requests, ablations, sd)
    judged, swaps = judge(measured, seed), list[Swap]()
    if controls:
        judged = against_controls(judged, measured, controls, seed)
        counts = swap_counts(measured, controls, seed)
        swaps = [Swap(model.name, **count) for model, count in zip([c.b, *c.controls], counts, strict=True)]
    on_disk.drop_parts("compare-ablations", key)
    agreement = float((np.sign(delta["a"]) == np.sign(delta["b"])).mean())
    alike = [correlation(delta["a"], delta[v]) for v in controls]
    return RewardComparison(sd["a"], sd["b"], correlation(delta["a"], delta["b"]), agreement, alike), judged, swaps

"""Two PMs on the same fresh pairs: are A's features there in B, and what became of the concepts that A and B reward?"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from rmscope.errors import InputError
from rmscope.io import content_hash, write_json, write_table
from rmscope.run.folder import RunFolder
from rmscope.run.run import Run
from rmscope.statistics import Array, correlation, share
from rmscope.studies.compare.activations import KEY, MATCHES, compare_site, count_features, matches, read_unit
from rmscope.studies.compare.classify import CLASSES, against_control, class_counts, judge
from rmscope.studies.compare.concepts import concepts
from rmscope.studies.compare.effects import ablation_requests, ablation_unit, pair_effects
from rmscope.studies.compare.held_out import HeldOut, fresh_pairs, hold_out
from rmscope.studies.compare.models import (
    ComparedModel,
    Dictionary,
    check_match,
    dictionaries,
    open_control,
    open_other,
)
from rmscope.studies.compare.result import (
    ClassCount,
    CompareResult,
    FeatureComparison,
    RewardComparison,
    SiteComparison,
)
from rmscope.studies.compare.settings import CompareConfig

VERSION = 1
"""Raised when the tables of the units hold something else."""
LISTED: dict[str, Any] = {**KEY, "feature": pl.Int32, "tokens": pl.List(pl.String)}


def analyse(run: Run, config: CompareConfig, other: Run | None = None) -> CompareResult:
    """Compares the PM of a run, A, with another PM, B; ``other`` is B's run where it is open already.

    1. B and the control are opened.
    2. The PMs meet on fresh pairs: those of the runs' measure splits.
    3. The figures are measured (:func:`compare_models`).
    4. ``compare-OTHER`` is written as JSON, table and page.

    Raises:
        InputError: a run is not finished, the PMs share no text, width or site, or a control has no scalar head.
    """
    started = time.time()
    a = ComparedModel.of_run(run)
    b, second = open_other(run, config.other) if other is None else (ComparedModel.of_run(other), other)
    control = open_control(run, config.control, b) if config.control is not None else None
    if control is not None:
        check_match(b, control)

    runs = [run, *([second] if second is not None else [])]
    pairs = fresh_pairs([r.pair_set for r in runs], config.pairs)
    held_out = hold_out(a, [b, *([control] if control is not None else [])], pairs)

    result = compare_models(a, b, held_out, run.on_disk, config.prompts, run.config.seed, control)

    folder = config.out or run.folder / "evidence"
    name = "compare-" + re.sub(r"[^A-Za-z0-9._-]+", "-", Path(config.other).name or config.other)
    update = {
        "data": [r.config.data for r in runs],
        "seconds": round(time.time() - started, 1),
        "path": folder / f"{name}.html",
    }
    result = result.model_copy(update=update)
    write_table(folder / f"{name}.parquet", result.table)
    write_json(folder / f"{name}.json", result.as_json())
    result.page().save()
    return result


def compare_models(
    a: ComparedModel,
    b: ComparedModel,
    held_out: HeldOut,
    on_disk: RunFolder,
    prompts: int,
    seed: int,
    control: ComparedModel | None = None,
) -> CompareResult:
    """The figures of a comparison. Long work goes in units that outlive a kill.

    1. Both PMs read the fresh pairs; every SAE reads both streams.
    2. Each reported feature is ablated in both PMs on the same responses.
    3. Each feature gets a class.
    4. Features with like decoders become concepts.

    Of a base without a head only the first step is done. With a ``control``, another PM of A's kind, features are ablated
    in it too, and a difference *holds* where B differs from the control as it does from A (:mod:`.classify`).

    Args:
        prompts: a feature is ablated on at most this many fresh prompts.

    Raises:
        InputError: a PM gives every pair the same Δr.
    """
    read = dictionaries(a, b)
    listed = [(d.key, d.sae.identity(), d.reported) for d in read]
    key = content_hash(VERSION, a.identity, b.identity, listed, _texts(held_out))
    with on_disk.display.stage("read") as progress:
        seen = on_disk.in_units(
            "compare-read",
            key,
            range(len(held_out.ids)),
            progress,
            lambda unit, within: read_unit(a, b, held_out, unit, within),
        )
    counts = count_features(seen["counts"])
    table = _feature_table(a, b, read, counts)
    sites = _compare_sites(table, read, seen["sums"], counts, held_out)
    rewards: RewardComparison | None = None
    if not b.base:
        delta = {v: (seen["rewards"][f"chosen_{v}"] - seen["rewards"][f"rejected_{v}"]).to_numpy() for v in "ab"}
        models, ablation_key = {"a": a, "b": b}, content_hash(key, prompts, seed)
        if control is not None:
            delta["c"] = control.rm.score_tokens(held_out.tokens).delta.double().numpy()
            models["c"], ablation_key = control, content_hash(ablation_key, control.identity)
        sd = _spreads(delta, models)
        rewards = _compare_rewards(delta, sd)
        requests = ablation_requests(seen["firing"], read, held_out, prompts, seed)
        measured = pair_effects(requests, _ablations(models, read, held_out, requests, on_disk, ablation_key), sd)
        judged = judge(measured, seed)
        table = _with_effects(table, judged if control is None else against_control(judged, measured, seed))
        on_disk.drop_parts("compare-ablations", ablation_key)
    features = [FeatureComparison.of_row(row) for row in table.to_dicts()]
    classes = {} if b.base else class_counts([str(f.class_) for f in features])
    grouped = [] if b.base else concepts(features, read)
    if not b.base:
        number = {(c.site, m.of, m.feature): c.concept for c in grouped for m in c.members}
        features = [f.model_copy(update={"concept": number[f.site, f.of, f.feature]}) for f in features]
        table = table.with_columns(pl.Series("concept", [f.concept for f in features], dtype=pl.Int32))
    on_disk.drop_parts("compare-read", key)
    return CompareResult(
        a=a.name,
        b=b.name,
        base=b.base,
        b_has_run=bool(b.saes),
        control=control.name if control is not None else None,
        pairs=len(held_out.ids),
        prompts=len(set(held_out.prompts)),
        sites=sites,
        delta=rewards,
        classes=[ClassCount(class_=name, features=n, means=CLASSES[name]) for name, n in classes.items()],
        concepts=grouped,
        features=features,
        table=table,
    )


def _texts(held_out: HeldOut) -> str:
    texts = zip(held_out.ids, held_out.tokens, strict=True)
    return content_hash(*((i, t.chosen.tolist(), t.rejected.tolist()) for i, t in texts))


def _feature_table(a: ComparedModel, b: ComparedModel, read: Sequence[Dictionary], counts: pl.DataFrame) -> pl.DataFrame:
    """One row per reported feature: its tokens, its firings in both PMs, the nearest feature of the other PM's SAE."""
    own, other = {"a": a, "b": b}, {"a": b, "b": a}
    rows = [
        {"of": d.of, "site": d.site, "feature": j, "tokens": [text for text, _ in own[d.of].top_tokens(d.site, j)]}
        for d in read
        for j in d.reported
    ]
    nearest = [matches(d, other[d.of].saes[d.site]) for d in read if d.site in other[d.of].saes and d.reported]
    table = pl.DataFrame(rows, schema=LISTED)
    for columns in (counts, pl.concat([pl.DataFrame(schema=MATCHES), *nearest])):
        table = table.join(columns, on=["of", "site", "feature"], how="left", maintain_order="left")
    return table


def _compare_sites(
    table: pl.DataFrame, read: Sequence[Dictionary], sums: pl.DataFrame, counts: pl.DataFrame, held_out: HeldOut
) -> list[SiteComparison]:
    """One row per SAE, with the share of its reported features that the other PM's own SAE holds, if there is one."""
    rows = []
    for d in read:
        again = table.filter((pl.col("of") == d.of) & (pl.col("site") == d.site))["found_again"].drop_nulls()
        found_again = share(int(again.sum()), len(again)) if len(again) else None
        rows.append(compare_site(d, sums, counts, held_out.prompt_of, found_again))
    return rows


def _spreads(delta: Mapping[str, Array], models: Mapping[str, ComparedModel]) -> dict[str, float]:
    """SD(Δr) of each PM. InputError where one is 0."""
    sd = {v: float(values.std(ddof=1)) for v, values in delta.items()}
    for v, spread in sd.items():
        if not spread > 0:
            raise InputError(
                f"The rewards of {models[v].name} do not differ on the fresh pairs; name a PM that tells them apart."
            )
    return sd


def _compare_rewards(delta: Mapping[str, Array], sd: Mapping[str, float]) -> RewardComparison:
    return RewardComparison(
        sd_a=sd["a"],
        sd_b=sd["b"],
        correlation=correlation(delta["a"], delta["b"]),
        agreement=float((np.sign(delta["a"]) == np.sign(delta["b"])).mean()),
        control=correlation(delta["a"], delta["c"]) if "c" in delta else None,
    )


def _ablations(
    models: Mapping[str, ComparedModel],
    read: Sequence[Dictionary],
    held_out: HeldOut,
    requests: pl.DataFrame,
    on_disk: RunFolder,
    key: str,
) -> pl.DataFrame:
    wanted = sorted({held_out.index[pair] for pair in requests["pair"].unique()})
    with on_disk.display.stage("ablate") as progress:
        tables = on_disk.in_units(
            "compare-ablations",
            key,
            wanted,
            progress,
            lambda unit, within: ablation_unit(models, read, held_out, requests, unit, within),
        )
    return (tables or ablation_unit(models, read, held_out, requests, []))["ablations"]


def _with_effects(table: pl.DataFrame, judged: pl.DataFrame) -> pl.DataFrame:
    """A feature that fires on no fresh response has no effects and is undecided."""
    joined = table.join(judged, on=["of", "site", "feature"], how="left", maintain_order="left")
    return joined.with_columns(pl.col("prompts").fill_null(0), pl.col("class").fill_null("undecided"))

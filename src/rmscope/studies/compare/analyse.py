"""Two PMs on the same fresh texts, in three parts: reading (``reading.py``: are A's features there in B?), ablation
(``effects.py``, ``classing.py``: what became of what A and B reward?) and concepts (``concepts.py``).

Long work goes in units that outlive a kill. Of a base without a head only the first part is measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from rmscope.errors import InputError
from rmscope.io import content_hash
from rmscope.planted.recall_metrics import share
from rmscope.run.folder import RunFolder
from rmscope.statistics import correlation
from rmscope.studies.compare.activations import KEY, MATCHES, count_features, matches, read_unit, site_row
from rmscope.studies.compare.classify import CHANGED, against_control, class_counts, judge
from rmscope.studies.compare.concepts import concept_class, concepts
from rmscope.studies.compare.effects import ablation_unit, paired, requested
from rmscope.studies.compare.models import Dictionary, HeldOut, Version, dictionaries

LISTED: dict[str, Any] = {**KEY, "feature": pl.Int32, "tokens": pl.List(pl.String)}
VERSION = 1
"""Bumped when the units' tables hold something else."""


def compare(
    a: Version, b: Version, fresh: HeldOut, on_disk: RunFolder, prompts: int, seed: int, control: Version | None = None
) -> tuple[dict[str, Any], pl.DataFrame]:
    """The figures of a comparison (JSON-able), and a row a reported feature of A and of B.

    ``prompts`` is the most fresh prompts that a feature is ablated on. With a ``control``, another PM of A's kind, features
    are ablated in it too, and a difference *holds* where B differs from it as from A (``classing.py``). With a base there
    are no effects, classes and concepts, and ``delta`` is None.
    """
    read = dictionaries(a, b)
    key = content_hash(VERSION, a.identity, b.identity, [(d.key, d.sae.identity(), d.reported) for d in read], _texts(fresh))
    with on_disk.shown.stage("read") as progress:
        seen = on_disk.in_units(
            "compare-read", key, range(len(fresh.ids)), progress, lambda unit, within: read_unit(a, b, fresh, unit, within)
        )
    counts = count_features(seen["counts"])
    table = _listed(a, b, read, counts)
    found: dict[str, Any] = {
        "a": a.name, "b": b.name, "base": b.base, "b_has_run": bool(b.saes), "control": control and control.name,
        "pairs": len(fresh.ids), "prompts": len(set(fresh.prompts)),
        "sites": _sites(table, read, seen["sums"], counts, fresh), "delta": None, "classes": [], "concepts": [],
    }  # fmt: skip
    if not b.base:
        delta = {v: (seen["rewards"][f"chosen_{v}"] - seen["rewards"][f"rejected_{v}"]).to_numpy() for v in "ab"}
        versions, ablation_key = {"a": a, "b": b}, content_hash(key, prompts, seed)
        if control is not None:
            delta["c"] = control.rm.score_tokens(fresh.tokens).delta.double().numpy()
            versions["c"], ablation_key = control, content_hash(ablation_key, control.identity)
        sd = {v: float(values.std(ddof=1)) for v, values in delta.items()}
        for v, spread in sd.items():
            if not spread > 0:
                raise InputError(
                    f"The rewards of {versions[v].name} do not differ on the fresh pairs; name a PM that tells them apart."
                )
        asked = requested(seen["firing"], read, fresh, prompts, seed)
        measured = paired(asked, _ablated(versions, read, fresh, asked, on_disk, ablation_key), sd)
        judged = judge(measured, seed)
        table = _with_effects(table, judged if control is None else against_control(judged, measured, seed))
        found |= {
            "delta": {"sd_a": sd["a"], "sd_b": sd["b"], "correlation": correlation(delta["a"], delta["b"]),
                      "agreement": float((np.sign(delta["a"]) == np.sign(delta["b"])).mean()),
                      "control": correlation(delta["a"], delta["c"]) if control else None},
            "classes": class_counts(table["class"].to_list()),
        }  # fmt: skip
        table, found["concepts"] = _concepts(table, read)
        on_disk.drop_parts("compare-ablations", ablation_key)
    on_disk.drop_parts("compare-read", key)
    return found | {"features": table.to_dicts()}, table


def _texts(fresh: HeldOut) -> str:
    return content_hash(*((i, t.chosen.tolist(), t.rejected.tolist()) for i, t in zip(fresh.ids, fresh.tokens, strict=True)))


def _listed(a: Version, b: Version, read: Sequence[Dictionary], counts: pl.DataFrame) -> pl.DataFrame:
    """A row a reported feature, by site: tokens that it fires on, its firings in both PMs, its like in the other's SAE."""
    own, other = {"a": a, "b": b}, {"a": b, "b": a}
    rows = [
        {"of": d.of, "site": d.site, "feature": j, "tokens": [text for text, _ in own[d.of].tokens(d.site, j)]}
        for d in read
        for j in d.reported
    ]
    table = pl.DataFrame(rows, schema=LISTED).join(counts, on=["of", "site", "feature"], how="left", maintain_order="left")
    like = [matches(d, other[d.of].saes[d.site]) for d in read if d.site in other[d.of].saes and d.reported]
    return table.join(pl.concat([pl.DataFrame(schema=MATCHES), *like]), on=["of", "site", "feature"], how="left",
                      maintain_order="left")  # fmt: skip


def _sites(
    table: pl.DataFrame, read: Sequence[Dictionary], sums: pl.DataFrame, counts: pl.DataFrame, fresh: HeldOut
) -> list[dict[str, Any]]:
    """A row an SAE; ``found_again``: the share of its reported features that the other PM's own SAE holds, if it has one."""
    rows = []
    for d in read:
        again = table.filter((pl.col("of") == d.of) & (pl.col("site") == d.site))["found_again"].drop_nulls()
        found = share(int(again.sum()), len(again)) if len(again) else None
        rows.append(site_row(d, sums, counts, fresh.prompt_of) | {"found_again": found})
    return rows


def _ablated(
    versions: Mapping[str, Version],
    read: Sequence[Dictionary],
    fresh: HeldOut,
    asked: pl.DataFrame,
    on_disk: RunFolder,
    key: str,
) -> pl.DataFrame:
    wanted = sorted({fresh.index[pair] for pair in asked["pair"].unique()})
    with on_disk.shown.stage("ablate") as progress:
        made = on_disk.in_units(
            "compare-ablations", key, wanted, progress,
            lambda unit, within: ablation_unit(versions, read, fresh, asked, unit, within),
        )  # fmt: skip
    return (made or ablation_unit(versions, read, fresh, asked, []))["ablations"]


def _with_effects(table: pl.DataFrame, judged: pl.DataFrame) -> pl.DataFrame:
    """A feature that fires on no fresh response has no effects and is undecided."""
    joined = table.join(judged, on=["of", "site", "feature"], how="left", maintain_order="left")
    return joined.with_columns(pl.col("prompts").fill_null(0), pl.col("class").fill_null("undecided"))


def _concepts(table: pl.DataFrame, read: Sequence[Dictionary]) -> tuple[pl.DataFrame, list[dict[str, Any]]]:
    """The table with each feature's concept (its number), and a row a concept: its leader's figures, class, members."""
    groups = concepts(table.to_dicts(), read)
    number = {(m["of"], m["site"], m["feature"]): i for i, members in enumerate(groups) for m in members}
    rows = [
        {
            **members[0], "concept": i, "class": concept_class(members),
            "members": [{name: m[name] for name in ("of", "feature", "class")} for m in members],
        }
        for i, members in enumerate(groups)
    ]  # fmt: skip
    rows = [row | {"changed": row["class"] in CHANGED} for row in rows]
    rows.sort(key=lambda row: row.get("holds") is False)  # what does not hold against a control comes last
    keys = table.select("of", "site", "feature").rows()
    return table.with_columns(pl.Series("concept", [number[key] for key in keys], dtype=pl.Int32)), rows

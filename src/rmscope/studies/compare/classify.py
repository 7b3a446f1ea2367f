"""What became of a feature, and of a concept, between A and B: the one place that defines it.

The data are ablation effects per prompt, a in A and b in B, each in SD(Δr) of its PM. Three means are tested against the
bound of .05 SD(Δr): a, b and the paired difference b - a. The test is by sign flips per prompt, the same flips for all
features, in both directions. Benjamini-Hochberg q runs over all features for each of the three. Intervals are 95 %,
bootstrap by prompt. An effect is *there* where it is beyond the bound (q < .05), *absent* where its interval lies within the
bound; in between it is neither. The features were chosen on other prompts, so the choice does not flatter their effects.

*Concepts* are the features of both lists at a site, joined where their decoders are alike (cosine of at least .7). Of the
features whose class is decided, the one with the largest effect in A or in B leads, and every feature like it joins. The
rest is grouped in the same way. A concept has its leader's figures and class. But where some of its features lost effect
and others gained it, the concept itself may be as it was: its features *moved*, and that is no difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
import torch

from rmscope.ranking.candidates import ELIGIBLE_PROMPTS
from rmscope.ranking.confirm import BOUND, Q
from rmscope.ranking.similarity import COSINE
from rmscope.statistics import benjamini_hochberg, beyond_p, flip_matrix, interval
from rmscope.studies.compare.models import Dictionary
from rmscope.studies.compare.result import SWAP_COUNTS, Chance, Concept, FeatureClass, FeatureComparison, Member

CLASSES: dict[FeatureClass, str] = {
    "appeared": "absent in A, there in B, and the difference is beyond the bound",
    "vanished": "there in A, absent in B, and the difference is beyond the bound",
    "changed sign": "there in both with opposite signs, and the difference is beyond the bound",
    "strengthened": "the difference is beyond the bound, none of the above, and |b| > |a|",
    "weakened": "the difference is beyond the bound, none of the above, and |b| < |a|",
    "kept": "there in both with the same sign, and no difference beyond the bound is shown",
    "undecided": f"none of these, or the feature fires on fewer than {ELIGIBLE_PROMPTS} fresh prompts",
}
"""The first definition that holds, in this order. A feature of too few prompts is always undecided."""
CHANGED = ("appeared", "vanished", "changed sign", "strengthened", "weakened")
CHANCE = {
    1: Chance((0.23, 0.40), (0.23, 0.58)),
    2: Chance((0.08, 0.15), (0.09, 0.25)),
    3: Chance((0.03, 0.11), (0.04, 0.20)),
}
"""By the number of controls: the share of differences that hold where B is of A's kind too, and that of changes of sign. The
ranges are over simulations of independent features, with spreads, tails and noise of several sizes, as
``benchmarks/holds.py`` prints them."""
GAINED, LOST = {"appeared", "strengthened"}, {"vanished", "weakened"}
MEANS = ("a", "b", "difference")
SCHEMA = {
    "of": pl.String, "site": pl.String, "feature": pl.Int32, "prompts": pl.Int32,
    **{f"{name}{part}": pl.Float64 for name in MEANS for part in ("", "_low", "_high", "_q")},
    "class": pl.String,
}  # fmt: skip


def judge(measured: pl.DataFrame, seed: int) -> pl.DataFrame:
    """Tests and classifies every feature in the rows of :func:`~rmscope.studies.compare.measure.pair_effects`.

    One row per feature (of, site, feature): prompts; of a, b and difference the mean, its interval (``_low``, ``_high``)
    and q (``_q``); class.
    """
    prompts = sorted(measured["prompt"].unique())
    place, signs = {p: i for i, p in enumerate(prompts)}, flip_matrix(len(prompts), seed)
    rows: list[dict[str, Any]] = []
    for key, part in measured.group_by("of", "site", "feature", maintain_order=True):
        row: dict[str, Any] = dict(zip(SCHEMA, (*key, part.height), strict=False))
        a, b = part["a"].to_numpy(), part["b"].to_numpy()
        flips = signs[:, [place[p] for p in part["prompt"]]]
        for name, values in zip(MEANS, (a, b, b - a), strict=True):
            mean = interval(values)
            row |= {name: mean.value, f"{name}_low": mean.low, f"{name}_high": mean.high}
            row[f"{name}_q"] = beyond_p(values, BOUND, flips)  # p until the correction
        rows.append(row)
    for name in MEANS:
        for row, q in zip(rows, benjamini_hochberg(np.array([row[f"{name}_q"] for row in rows])), strict=True):
            row[f"{name}_q"] = float(q)
    return pl.DataFrame([row | {"class": class_of(row)} for row in rows], schema=SCHEMA)


def against_controls(judged: pl.DataFrame, measured: pl.DataFrame, controls: Sequence[str], seed: int) -> pl.DataFrame:
    """``judged`` with each control's mean, ``_low`` and ``_high``, those of the control nearest to B (``control``),
    ``holds`` and ``control_p``.

    ``measured`` has a column of effects for each of ``controls``. A difference between A and B holds where B also differs
    from every control, beyond the bound and in the same direction, and where B is farther from the nearest of A and the
    controls than any two of them are from each other (paired by prompt, lower end of the interval above 0). ``holds`` is
    null where A and B do not differ. If B were of A's kind some would still hold (:func:`chance_of`). With several controls
    ``control_p`` is the share of B and the controls that differ from A by at least as much as B does.
    """
    parts = [part for _, part in measured.group_by("of", "site", "feature", maintain_order=True)]
    farther = pl.Series([_farther(part, controls) for part in parts], dtype=pl.Boolean)
    holds, ends, columns = farther, ("", "_low", "_high"), list[pl.Series]()
    for c in controls:
        other = judge(measured.with_columns(pl.col(c).alias("a")), seed)
        holds &= other["class"].is_in(CHANGED) & (other["difference"].sign() == judged["difference"].sign())
        columns += [other[f"a{end}"].alias(f"{c}{end}") for end in ends]
    table = judged.with_columns(*columns, pl.when(pl.col("class").is_in(CHANGED)).then(holds).alias("holds"))
    apart = np.abs(table.select(controls).to_numpy() - table["b"].to_numpy()[:, None]).argmin(1)
    nearest = [[table[f"{controls[k]}{end}"][i] for i, k in enumerate(apart)] for end in ends]
    moved = np.abs(table.select("b", *controls).to_numpy() - table["a"].to_numpy()[:, None])
    p = (moved >= moved[:, :1]).mean(1) if len(controls) > 1 else [None] * table.height
    named = [pl.Series(f"control{end}", values, dtype=pl.Float64) for end, values in zip(ends, nearest, strict=True)]
    return table.with_columns(*named, pl.Series("control_p", p, dtype=pl.Float64))


def _farther(part: pl.DataFrame, controls: Sequence[str]) -> bool:
    """Whether B is farther from the nearest of A and the controls than any two of these are from each other."""
    kind, b = sorted((part[v].to_numpy() for v in ("a", *controls)), key=lambda v: float(v.mean())), part["b"].to_numpy()
    near, far = (kind[-1], kind[0]) if b.mean() - kind[-1].mean() >= kind[0].mean() - b.mean() else (kind[0], kind[-1])
    low = interval(np.sign(b.mean() - near.mean()) * (b - near) - np.sign(near.mean() - far.mean()) * (near - far)).low
    return low is not None and low > 0


def chance_of(controls: int) -> Chance:
    """The chance level of ``holds`` with so many controls. With more than :data:`CHANCE` has it is at most the last
    one's."""
    if controls in CHANCE:
        return CHANCE[controls]
    last = CHANCE[max(CHANCE)]
    return Chance((0.0, last.holds[1]), (0.0, last.signs[1]))


def swap_counts(measured: pl.DataFrame, controls: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """B and each control in B's place, held against A and all the others: how many of A's features differ from A, change
    sign, and hold. ``p``: by count, the share of all of them that have at least as many.

    If B were of A's kind, each of B and the controls would be as likely to have the most. Only features that were chosen in
    A count: those of B's run were chosen for their effect in B.
    """
    own, rows = measured.filter(pl.col("of") == "a"), list[dict[str, Any]]()
    for placed in ("b", *controls):
        swapped = own.rename({"b": placed, placed: "b"}) if placed != "b" else own
        table = against_controls(judge(swapped, seed), swapped, controls, seed)
        differ, sign = table["class"].is_in(CHANGED), table["class"] == "changed sign"
        holds = table["holds"].fill_null(value=False)
        counts = (differ.sum(), sign.sum(), holds.sum(), (holds & sign).sum())
        rows.append({"features": table.height} | dict(zip(SWAP_COUNTS, map(int, counts), strict=True)))
    if len(controls) > 1:
        for row in rows:
            row["p"] = {c: float(np.mean([other[c] >= row[c] for other in rows])) for c in SWAP_COUNTS}
    return rows


def class_of(row: Mapping[str, Any]) -> FeatureClass:
    """The class of a feature, from its row of :func:`judge`."""
    there = {v: row[f"{v}_q"] < Q for v in "ab"}
    absent = {v: row[f"{v}_low"] >= -BOUND and row[f"{v}_high"] <= BOUND for v in "ab"}
    same_sign = row["a"] * row["b"] > 0
    if row["prompts"] < ELIGIBLE_PROMPTS:
        return "undecided"
    if row["difference_q"] >= Q:
        return "kept" if there["a"] and there["b"] and same_sign else "undecided"
    if there["b"] and absent["a"]:
        return "appeared"
    if there["a"] and absent["b"]:
        return "vanished"
    if there["a"] and there["b"] and not same_sign:
        return "changed sign"
    return "strengthened" if abs(row["b"]) > abs(row["a"]) else "weakened"


def concepts(features: Sequence[FeatureComparison], dictionaries: Sequence[Dictionary]) -> list[Concept]:
    """Classified features as concepts, the largest effects first; those that do not hold against a control come last. Each
    feature gets the number of its concept."""
    listed = []
    for number, group in enumerate(groups(features, dictionaries)):
        for feature in group:
            feature.concept = number
        classes = {m.class_ for m in group}
        class_ = "moved" if classes & GAINED and classes & LOST else group[0].class_
        members = [Member(m.of, m.feature, m.class_) for m in group]
        listed.append(Concept(**dict(group[0]) | {"class_": class_, "changed": class_ in CHANGED, "members": members}))
    return sorted(listed, key=lambda c: c.holds is False)


def groups(features: Sequence[FeatureComparison], dictionaries: Sequence[Dictionary]) -> list[list[FeatureComparison]]:
    """The features in groups, each led by its first; the largest effects first."""
    saes = {(d.of, d.site): d.sae for d in dictionaries}
    ranked = sorted(features, key=_rank)
    directions = [torch.nn.functional.normalize(saes[f.of, f.site].W_dec[f.feature], dim=0) for f in ranked]
    led: dict[int, list[FeatureComparison]] = {}
    for i, feature in enumerate(ranked):
        similar = (k for k in led if ranked[k].site == feature.site and float(directions[k] @ directions[i]) >= COSINE)
        led.setdefault(next(similar, i), []).append(feature)
    return list(led.values())


def _rank(feature: FeatureComparison) -> tuple[bool, float, str, str, int]:
    size = max((abs(f.value or 0.0) for f in (feature.a, feature.b) if f is not None), default=0.0)
    return feature.class_ == "undecided", -size, feature.of, feature.site, feature.feature

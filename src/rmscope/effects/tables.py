"""Effect tables: estimates, firings, exact ablations and ledgers of many pairs as frames, one unit of pairs at a time.

Columns of :data:`SCHEMA`: pair, side, feature, effect, kind. Estimates also have ``mass`` = Σ_t f_tj |d_j|.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import polars as pl
import torch
from torch import Tensor

from rmscope.effects.gradients import Method, estimate, on_span, sum_by_feature
from rmscope.effects.ledger import PARTS, SILENT, SideParts, estimate_along_path
from rmscope.effects.requests import Groups, ablations
from rmscope.io import Progress, silent
from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import SIDES
from rmscope.sae.base import Sae

Wanted = dict[int, dict[str, dict[str, list[int] | None]]]
"""pair -> side -> site -> features to ablate (None: all that fire)."""
FeatureValues = tuple[int, str, Tensor, dict[str, Tensor]]
"""A response's pair, side and features, and the table's columns with one value per feature."""

LEDGER = {"pair": pl.String, **dict.fromkeys(("delta_r", *PARTS), pl.Float64), "nodes": pl.Int32, "closed": pl.Boolean}
SCHEMA = {"pair": pl.String, "side": pl.String, "feature": pl.Int32, "effect": pl.Float32, "kind": pl.String}


def _frame(ids: Sequence[str], found: Sequence[FeatureValues], kind: str, extra: Sequence[str] = ()) -> pl.DataFrame:
    """One row per response and feature, in file order; ``extra`` names the columns beside those of :data:`SCHEMA`."""
    schema = SCHEMA | dict.fromkeys(extra, pl.Float32)
    parts = [
        pl.DataFrame({"feature": feature.numpy(), **{name: column.numpy() for name, column in values.items()}}).with_columns(
            pl.lit(ids[pair]).alias("pair"), pl.lit(side).alias("side"), pl.lit(kind).alias("kind")
        )
        for pair, side, feature, values in sorted(found, key=lambda f: (f[0], SIDES.index(f[1])))
    ]
    if not parts:
        return pl.DataFrame(schema=schema)
    return pl.concat(parts).select(pl.col(name).cast(dtype) for name, dtype in schema.items())


def estimate_table(
    rm: RewardModel,
    saes: Mapping[str, Sae],
    tokens: Sequence[PairTokens],
    ids: Sequence[str],
    unit: Sequence[int],
    progress: Progress = silent,
    method: Method | Literal["ig"] = "atp",
) -> dict[str, pl.DataFrame]:
    """Per site, the estimated ablation effects of all active features of the pairs in ``unit`` (kind ablation_estimate)."""
    rows: dict[str, list[FeatureValues]] = {site: [] for site in saes}
    if method == "ig":
        estimates = estimate_along_path(rm, saes, tokens, unit, progress)
    else:
        estimates = estimate(rm, saes, tokens, unit, progress, method)
    for site, e in estimates:
        rows[site].append((e.pair, e.side, e.feature, {"effect": e.effect, "mass": e.mass}))
    return {site: _frame(ids, part, "ablation_estimate", ["mass"]) for site, part in rows.items()}


def firing_table(
    rm: RewardModel, saes: Mapping[str, Sae], tokens: Sequence[PairTokens], ids: Sequence[str], unit: Sequence[int]
) -> dict[str, pl.DataFrame]:
    """Per site, the features that fire in each response, from a forward pass alone (kind firing).

    ``effect`` is Σ_t f_tj, and ``ending`` the part of it on the response's ending.
    """
    rows: dict[str, list[FeatureValues]] = {site: [] for site in saes}
    for batch in rm.unit_batches(tokens, unit):
        streams = rm.streams(batch, list(saes))
        for text in batch.texts:
            end = rm.ending(tokens[text.pair].side(text.side)[: text.read + 1]) - text.divergence
            for site, sae in saes.items():
                active = sae.active(on_span(streams[site], text))
                feature, total = sum_by_feature(active, active.value)
                _, last = sum_by_feature(active, active.value * (active.token >= end))
                rows[site].append((text.pair, text.side, feature, {"effect": total, "ending": last}))
    return {site: _frame(ids, part, "firing", ["ending"]) for site, part in rows.items()}


def ablation_table(
    rm: RewardModel,
    saes: Mapping[str, Sae],
    tokens: Sequence[PairTokens],
    ids: Sequence[str],
    wanted: Wanted,
    progress: Progress = silent,
    endings: bool = False,
    groups: Mapping[str, Groups] | None = None,
) -> dict[str, pl.DataFrame]:
    """Per site, exact ablation effects of the wanted features where they fire (kind ablation).

    With ``endings`` there is a column ``ending``: the effect of ablating them from the response's ending alone. ``groups``
    names sets of features, such as concepts: what is wanted under that name are numbers of its sets, which are ablated
    together (kind joint_ablation).
    """
    groups = groups or {}
    rows: dict[str, list[FeatureValues]] = {name: [] for name in (*saes, *groups)}
    total = sum(len(f or ()) for sides in wanted.values() for names in sides.values() for f in names.values())
    done = 0
    for name, a in ablations(rm, saes, tokens, wanted, endings, groups):
        rows[name].append((a.pair, a.side, a.feature, {"effect": a.effect, "ending": a.ending}))
        done += a.feature.numel()
        progress(min(done, total) if total else done, max(total, done), "features ablated")
    kinds = {name: "joint_ablation" if name in groups else "ablation" for name in rows}
    return {name: _frame(ids, part, kinds[name], ["ending"] if endings else []) for name, part in rows.items()}


def plan(requests: Mapping[str, pl.DataFrame], index: Mapping[str, int]) -> Wanted:
    """``wanted`` for :func:`ablation_table` from per-site frames with the columns pair, side, feature."""
    wanted: Wanted = {}
    for site, table in requests.items():
        rows = table.select("pair", "side", "feature").unique().sort("pair", "side", "feature")
        for pair, side, feature in rows.iter_rows():
            wanted.setdefault(index[pair], {}).setdefault(side, {}).setdefault(site, []).append(feature)  # type: ignore[union-attr]
    return {pair: wanted[pair] for pair in sorted(wanted)}


def with_order(table: pl.DataFrame, prompts: Mapping[str, str], seed: int) -> pl.DataFrame:
    """Adds the prompt of each row, and ``order``: the place of its response in a random order of all responses."""
    keys = table.select("pair", "side").unique().sort("pair", "side")
    order = pl.Series("order", np.random.default_rng(seed).permutation(keys.height))
    prompt = pl.col("pair").replace_strict(prompts, return_dtype=pl.String).alias("prompt")
    return table.join(keys.with_columns(order, prompt), on=["pair", "side"], how="left").sort("order", "feature")


def ledger_tables(
    rows: Sequence[tuple[int, dict[str, float], dict[str, SideParts]]], ids: Sequence[str]
) -> dict[str, pl.DataFrame]:
    """The ledger (one row per pair) and its contributions (kind contribution; feature -1 is the sum of all silent ones)."""
    ledger = pl.DataFrame([{"pair": ids[pair], **parts} for pair, parts, _ in rows], schema=LEDGER)
    found: list[FeatureValues] = []
    for pair, _, sides in rows:
        for side, p in sides.items():
            effect = torch.cat([torch.tensor([p.silent]), p.effect])
            found.append((pair, side, torch.cat([torch.tensor([SILENT]), p.feature]), {"effect": effect}))
    return {"ledger": ledger, "contribution": _frame(ids, found, "contribution")}

"""Effect tables: the estimates and exact ablations of many pairs as frames, unit by unit, so that a run can go on.

Columns: pair, side, feature, effect, kind, as DESIGN.md lays them out, and here ``mass`` = Σ_t f_tj |d_j| with estimates.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
import polars as pl
import torch

from rmscope.effects.ablation import Ablations, ablations
from rmscope.effects.gradients import Estimates, Method, estimate, sum_by_feature
from rmscope.effects.ledger import SILENT, SideParts, estimate_along_path
from rmscope.io import Progress, silent
from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import SIDES
from rmscope.sae.base import Sae

Wanted = dict[int, dict[str, dict[str, list[int] | None]]]
"""pair -> side -> site -> features to ablate (None: all that fire)."""

LEDGER = {
    "pair": pl.String, "delta_r": pl.Float64, "features": pl.Float64, "error": pl.Float64, "remainder": pl.Float64,
    "gap": pl.Float64, "nodes": pl.Int32,
}  # fmt: skip
SCHEMA = {"pair": pl.String, "side": pl.String, "feature": pl.Int32, "effect": pl.Float32, "kind": pl.String}


def _frame(
    ids: Sequence[str],
    rows: Iterable[tuple[int, str, torch.Tensor, dict[str, torch.Tensor]]],
    kind: str,
    extra: Sequence[str] = (),
) -> pl.DataFrame:
    """Rows as a table; ``extra`` names the values beside the effect, so that an empty table has their columns too."""
    parts = [
        pl.DataFrame(
            {"feature": feature.numpy().astype(np.int32), **{k: v.numpy() for k, v in values.items()}}
        ).with_columns(pl.lit(ids[pair]).alias("pair"), pl.lit(side).alias("side"), pl.lit(kind).alias("kind"))
        for pair, side, feature, values in rows
    ]
    if not parts:
        return pl.DataFrame(schema=SCHEMA | dict.fromkeys(extra, pl.Float32))
    table = pl.concat(parts)
    return table.select([pl.col(c).cast(t) for c, t in SCHEMA.items()] + [pl.col(c).cast(pl.Float32) for c in extra])


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
    found: dict[str, list[Estimates]] = {site: [] for site in saes}
    if method == "ig":
        estimates = estimate_along_path(rm, saes, tokens, unit, progress)
    else:
        estimates = estimate(rm, saes, tokens, unit, progress, method)
    for site, one in estimates:
        found[site].append(one)
    return {
        site: _frame(
            ids,
            ((e.pair, e.side, e.feature, {"effect": e.effect, "mass": e.mass}) for e in _sorted(list_)),
            "ablation_estimate",
            ["mass"],
        )
        for site, list_ in found.items()
    }


def firing_table(
    rm: RewardModel, saes: Mapping[str, Sae], tokens: Sequence[PairTokens], ids: Sequence[str], unit: Sequence[int]
) -> dict[str, pl.DataFrame]:
    """Per site, which features fire in which response (kind firing, effect = Σ_t f_tj, ``ending`` the part of it that lies
    on the response's ending): a forward pass, no gradient."""
    found: dict[str, list[tuple[int, str, torch.Tensor, dict[str, torch.Tensor]]]] = {site: [] for site in saes}
    for batch in rm.unit_batches(tokens, unit):
        streams = rm.streams(batch, list(saes))
        for text in batch.texts:
            for site, sae in saes.items():
                x = streams[site][text.row, text.span.to(streams[site].device)].float().cpu()
                active = sae.active(x)
                feature, total = sum_by_feature(active, active.value)
                end = rm.ending(tokens[text.pair].side(text.side)[: text.read + 1]) - text.divergence
                _, last = sum_by_feature(active, active.value * (active.token >= end))
                found[site].append((text.pair, text.side, feature, {"effect": total, "ending": last}))
    return {
        site: _frame(ids, sorted(rows, key=lambda r: (r[0], r[1])), "firing", ["ending"]) for site, rows in found.items()
    }


def ablation_table(
    rm: RewardModel,
    saes: Mapping[str, Sae],
    tokens: Sequence[PairTokens],
    ids: Sequence[str],
    wanted: Wanted,
    progress: Progress = silent,
    endings: bool = False,
) -> dict[str, pl.DataFrame]:
    """Per site, exact ablation effects of the wanted features where they fire (kind ablation).

    With ``endings`` there is a column ``ending``: the effect of ablating them from the response's ending alone.
    """
    found: dict[str, list[Ablations]] = {site: [] for site in saes}
    total = sum(len(f or ()) for sides in wanted.values() for sites in sides.values() for f in sites.values())
    done = 0
    for site, one in ablations(rm, saes, tokens, wanted, endings):
        found[site].append(one)
        done += one.feature.numel()
        progress(min(done, total) if total else done, max(total, done), "features ablated")
    return {
        site: _frame(
            ids,
            (
                (r.pair, r.side, r.feature, {"effect": r.effect} | ({"ending": r.ending} if endings else {}))
                for r in _sorted(list_)
            ),
            "ablation",
            ["ending"] * endings,
        )
        for site, list_ in found.items()
    }


def _sorted(list_: list) -> list:
    """In file order, whatever order the batches had."""
    return sorted(list_, key=lambda e: (e.pair, SIDES.index(e.side)))


def plan(requests: Mapping[str, pl.DataFrame], index: Mapping[str, int]) -> Wanted:
    """``wanted`` for :func:`ablation_table` from per-site frames with the columns pair, side, feature."""
    wanted: Wanted = {}
    for site, table in requests.items():
        rows = table.select("pair", "side", "feature").unique().sort("pair", "side", "feature")
        for pair, side, feature in rows.iter_rows():
            wanted.setdefault(index[pair], {}).setdefault(side, {}).setdefault(site, []).append(feature)  # type: ignore[union-attr]
    return {pair: wanted[pair] for pair in sorted(wanted)}


def with_order(table: pl.DataFrame, prompts: Mapping[str, str], seed: int) -> pl.DataFrame:
    """Adds the prompt of each row and ``order``, one random order of all responses."""
    keys = table.select("pair", "side").unique().sort("pair", "side")
    order = np.random.default_rng(seed).permutation(keys.height)
    keys = keys.with_columns(
        pl.Series("order", order), pl.col("pair").replace_strict(prompts, return_dtype=pl.String).alias("prompt")
    )
    return table.join(keys, on=["pair", "side"], how="left").sort("order", "feature")


def ledger_tables(
    rows: Sequence[tuple[int, dict[str, float], dict[str, SideParts]]], ids: Sequence[str]
) -> dict[str, pl.DataFrame]:
    """The ledger (a row a pair) and its contributions (kind contribution; feature -1 is the sum of all silent ones)."""
    ledger = pl.DataFrame([{"pair": ids[pair], **parts} for pair, parts, _ in rows], schema=LEDGER)
    sides = [(pair, side, both[side]) for pair, _, both in rows for side in SIDES]
    contribution = _frame(
        ids,
        (
            (
                pair,
                side,
                torch.cat([torch.tensor([SILENT]), part.feature]),
                {"effect": torch.cat([torch.tensor([part.silent]), part.effect])},
            )
            for pair, side, part in sides
        ),
        "contribution",
    )
    return {"ledger": ledger, "contribution": contribution}

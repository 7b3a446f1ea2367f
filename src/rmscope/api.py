"""The effects rooms as plain functions of a PM, an SAE and pairs: what a notebook calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import polars as pl
import torch
import yaml

from rmscope.effects import tables
from rmscope.effects.ledger import NODES, baseline, ledger_rows
from rmscope.effects.ranking import confirm, first_responses, freeze
from rmscope.errors import InputError
from rmscope.files import Progress, silent
from rmscope.model.packing import units
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import SIDES, Pair
from rmscope.sae.base import Sae


def _site(rm: RewardModel, sae: Sae, site: str | None) -> str:
    """Where the SAE belongs; InputError where it does not say so, or where it does not fit the PM."""
    at = site or sae.site
    if not at:
        raise InputError("The SAE does not say which site it was trained on; pass site='resid_post.6' or the like.")
    rm.site_index(at)
    sae.must_fit(rm.d_model, rm.name)
    return at


def attribute(
    rm: RewardModel,
    sae: Sae,
    pairs: Sequence[Pair],
    method: Literal["atp", "ig"] = "atp",
    site: str | None = None,
    progress: Progress = silent,
) -> pl.DataFrame:
    """Effects of all active features, a row each: pair, side, feature, effect, kind.

    ``atp`` estimates removal effects at the clean point (kind removal_estimate, with ``mass`` = Σ_t f_tj |d_j|);
    ``ig`` gives contributions from a zero baseline (kind contribution; feature -1 stands for all silent ones).
    """
    at = _site(rm, sae, site)
    tokens, ids = rm.tokenize_all(pairs), [p.id for p in pairs]
    if method == "ig":
        return _ledger(rm, sae, at, pairs, baseline(sae, "zero"), progress)["contribution"]
    if method != "atp":
        raise InputError(f"method={method!r} is not known; use 'atp' or 'ig'.")
    parts = []
    for unit in units(len(pairs)):
        parts.append(tables.estimate_table(rm, {at: sae}, tokens, ids, unit)[at])
        progress(unit.stop, len(pairs), "pairs attributed")
    return pl.concat(parts)


def remove(
    rm: RewardModel,
    sae: Sae,
    pairs: Sequence[Pair],
    features: Sequence[int] | Literal["active"] = "active",
    site: str | None = None,
    progress: Progress = silent,
) -> pl.DataFrame:
    """Exact removal effects, a row each where the feature fires: pair, side, feature, effect, kind (removal)."""
    at = _site(rm, sae, site)
    chosen = None if isinstance(features, str) else list(features)
    wanted: tables.Wanted = {i: {side: {at: chosen} for side in SIDES} for i in range(len(pairs))}
    return tables.removal_table(rm, {at: sae}, rm.tokenize_all(pairs), [p.id for p in pairs], wanted, progress)[at]


def ledger(
    rm: RewardModel,
    sae: Sae,
    pairs: Sequence[Pair],
    start: Literal["mean", "zero"] = "mean",
    site: str | None = None,
    nodes: int = NODES,
    progress: Progress = silent,
) -> pl.DataFrame:
    """A row a pair: pair, delta_r, features, error, remainder, gap; the four parts sum to delta_r.

    The ``mean`` baseline is taken over the spans of the given pairs.
    """
    at = _site(rm, sae, site)
    if start == "zero":
        return _ledger(rm, sae, at, pairs, baseline(sae, "zero"), progress, nodes)["ledger"]
    total_f, total_x, n = torch.zeros(sae.m), torch.zeros(sae.d), 0
    for batch in rm.batches(rm.tokenize_all(pairs)):
        stream = rm.streams(batch, [at])[at]
        for text in batch.texts:
            x = stream[text.row, text.span.to(stream.device)].float().cpu()
            active = sae.active(x)
            total_f.index_add_(0, active.feature, active.value)
            total_x += x.sum(0)
            n += x.shape[0]
    return _ledger(rm, sae, at, pairs, baseline(sae, "mean", total_f / n, total_x / n), progress, nodes)["ledger"]


def _ledger(
    rm: RewardModel,
    sae: Sae,
    site: str,
    pairs: Sequence[Pair],
    start: Any,
    progress: Progress,
    nodes: int = NODES,
) -> dict[str, pl.DataFrame]:
    tokens, ids = rm.tokenize_all(pairs), [p.id for p in pairs]
    rows = [row for unit in units(len(pairs)) for row in ledger_rows(rm, sae, site, tokens, unit, start, nodes, progress)]
    return tables.ledger_tables(sorted(rows, key=lambda r: r[0]), ids)


def rank(effects: pl.DataFrame, pairs: Sequence[Pair], sd: float, frozen: int = 200, seed: int = 0) -> pl.DataFrame:
    """Ranks features from one effect table that covers the fit and the confirm split of ``pairs``.

    The list and its signs are frozen on the fit split, and tested on the confirm split against .05 ``sd`` (SD(Δr)).
    From estimates the ranking holds for estimates: claim only what was removed exactly.
    """
    from rmscope.pairs.pair import split_of

    prompts = {p.id: str(p.meta.get("group", p.first_human_turn())) for p in pairs}
    length = {p.id: len(p.chosen.split()) - len(p.rejected.split()) for p in pairs}
    split = {p.id: split_of(p) for p in pairs}
    table = tables.with_order(effects.filter(pl.col("feature") >= 0), prompts, seed).with_columns(
        pl.col("pair").replace_strict(split, return_dtype=pl.String).alias("split"),
        pl.col("pair").replace_strict(length, return_dtype=pl.Int64).alias("length_difference"),
    )
    fit, confirming = table.filter(pl.col("split") == "fit"), table.filter(pl.col("split") == "confirm")
    features = fit["feature"].unique().to_list()
    list_ = freeze(first_responses(fit, features, fit.height), features, frozen)
    firing = {int(f): int(n) for f, n in confirming.group_by("feature").agg(pl.col("prompt").n_unique()).iter_rows()}
    ranked = confirm({"all": list_}, {"all": confirming}, {"all": firing}, sd, seed)["all"]
    return ranked.drop("length_bound")


@dataclass(frozen=True)
class OpenRun:
    """A run folder's tables as frames."""

    folder: Path

    @cached_property
    def record(self) -> dict[str, Any]:
        return dict(yaml.safe_load((self.folder / "run.yaml").read_text("utf-8")))

    @cached_property
    def scores(self) -> pl.DataFrame:
        return pl.read_parquet(self.folder / "scores.parquet")

    @property
    def sites(self) -> list[str]:
        return sorted(p.stem for p in (self.folder / "features").glob("*.parquet"))

    def features(self, site: str) -> pl.DataFrame:
        return pl.read_parquet(self.folder / "features" / f"{site}.parquet")

    def ledger(self, site: str) -> pl.DataFrame:
        return pl.read_parquet(self.folder / "ledger" / f"{site}.parquet")

    def effects(self, site: str, kind: Literal["estimated", "exact", "contribution"] = "exact") -> pl.DataFrame:
        return pl.read_parquet(self.folder / "effects" / site / f"{kind}.parquet")

    def sae(self, site: str) -> Sae:
        return Sae.load(self.folder / "saes" / site)


def open_run(folder: str | Path) -> OpenRun:
    """Opens a run folder. InputError where the folder holds no run."""
    path = Path(folder)
    if not (path / "run.yaml").is_file():
        raise InputError(f"{path} is no run folder (it holds no run.yaml); make one with rmscope run.")
    return OpenRun(path)

"""The single steps on effects, as commands: attribute, ablate, ledger, rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from rmscope.api import effects as api
from rmscope.cli import step_settings as settings
from rmscope.cli.figures import Frame
from rmscope.cli.steps import read_pairs
from rmscope.cli.summaries import Ranking
from rmscope.effects import tables
from rmscope.effects.interactions import PROMPTS, TOP, groups_of, interactions
from rmscope.effects.ledger import FEWEST, length_groups, pair_features, share_rows, shares_by
from rmscope.errors import InputError
from rmscope.io import Display, write_table
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import SIDES, Pair
from rmscope.report.result import Result, Rows
from rmscope.run.inputs import load_pm
from rmscope.run.run import Run
from rmscope.sae import Sae


def attribute(config: settings.AttributeConfig, display: Display) -> Frame:
    """Estimated effects; those of a run come with their measured quality."""
    quality = None
    if config.run is not None:
        job = Run.open(config.run, display)
        site = job.check_site(config.site or job.sites[0])
        rm, sae, pairs = job.rm, job.saes[site], [job.pairs[i] for i in job.of_split("measure")[: config.limit]]
        if config.method == job.config.estimate:
            quality = next(s.quality for s in job.evidence.sites if s.site == site)
    elif config.model and config.data and config.sae:
        rm, sae, pairs = _brought(config.model, config.data, config.sae, config)
        site = config.site or sae.site
    else:
        raise InputError("attribute needs a run folder, or --model, --data and --sae; name one or the other.")
    with display.stage("attribute") as progress:
        table = api.attribute(rm, sae, pairs, config.method, site, progress)
    if config.out is not None:
        write_table(config.out, table)
    means = table.group_by("feature").agg(pl.col("effect").mean(), pl.len().alias("responses"))
    means = means.sort(pl.col("effect").abs(), "feature", descending=[True, False])
    note = "These are estimates of unknown quality; claim only what rmscope ablate confirms."
    if quality is not None:
        note = (
            f"Their quality here: Spearman with exact effects {quality['spearman_median']:.3f} within a response (median)."
        )
    return Frame(
        title=f"{table.height} effects ({config.method}), the largest means where a feature fires",
        note="" if config.method == "ig" else note,
        figures={"method": config.method, "quality": quality},
        rows=means.to_dicts(),
        name="features",
    )


def _brought(model: str, data: str, path: Path, how: settings.AttributeConfig) -> tuple[RewardModel, Sae, list[Pair]]:
    pairs = read_pairs(data, how)
    rm, sae = load_pm(model, how), Sae.load(path)
    if sae.d != rm.d_model:
        raise InputError(
            f"The SAE at {path} reads {sae.d} dimensions, the PM's stream has {rm.d_model}; name one trained on it."
        )
    return rm, sae, [p for p, t in zip(pairs, rm.tokenize_all(pairs), strict=True) if rm.fits(t)]


def ablate(job: Run, config: settings.AblateConfig) -> Frame:
    """Exact effects of features on pairs of the measure split."""
    site = job.check_site(config.site)
    features = _named_features(config.features, job, site)
    wanted: Any = {p: {side: {site: features} for side in SIDES} for p in job.of_split("measure")[: config.limit]}
    with job.display.stage("ablate") as progress:
        table = tables.ablation_table(job.rm, {site: job.saes[site]}, job.tokens, job.ids, wanted, progress)[site]
    if config.out is not None:
        write_table(config.out, table)
    slow = (
        "" if job.rm.capabilities.resume else " This PM cannot be resumed at a site: each ablation was a whole forward pass."
    )
    top = table.sort(table["effect"].abs(), descending=True)
    title = f"{table.height} exact effects at {site}, the largest"
    return Frame(title=title, note=f"{table.height} exact effects.{slow}", rows=top.to_dicts(), name="")


def _named_features(text: str, job: Run, site: str) -> list[int] | None:
    if text == "active":
        return None
    if text.startswith("top:") and text[4:].isdigit():
        return job.features(site)["feature"].head(int(text[4:])).to_list()
    if all(part.strip().isdigit() for part in text.split(",")):
        return [int(part) for part in text.split(",")]
    raise InputError(f"--features {text} is not known; write active, top:K, or a list such as 12,405,77.")


class LedgerResult(Result):
    """Shares of Δr over a run's pairs, or one pair's ledger."""

    site: str
    pairs: int
    shares: list[dict[str, Any]] = []
    by_length: list[dict[str, Any]] = []
    by_source: list[dict[str, Any]] = []
    ledger: dict[str, Any] = {}
    features: list[dict[str, Any]] = []

    def summary(self) -> str:
        if self.ledger:
            return f"{self.ledger['pair']} at {self.site}: Δr {self.ledger['delta_r']:+.3f}"
        told = ", ".join(f"{row['part']} {row['value']:.0%}" for row in self.shares)
        return f"Δr at {self.site} over {self.pairs} pairs: {told}"

    def tables(self) -> dict[str, Rows]:
        if self.ledger:
            return {
                f"{self.ledger['pair']} at {self.site}": [self.ledger],
                "the largest contributions (effect on the side's own reward)": self.features,
            }
        return {"share of Δr": self.shares, "by length": self.by_length, "by source": self.by_source}

    def as_json(self) -> Any:
        return {name: value for name, value in self.model_dump(mode="json").items() if value or not self.ledger}


def ledger(job: Run, config: settings.LedgerConfig) -> LedgerResult:
    """The ledgers of a site."""
    site, table = job.check_site(config.site), job.ledger(config.site)
    if table.is_empty():
        raise InputError(
            f"The run in {job.folder} has no ledgers (ledger_pairs: 0); rmscope run {job.folder} --ledger-pairs 24 makes 24."
        )
    if config.pair is not None:
        return _pair_ledger(job, site, table, config.pair, config.top)
    if table.height < FEWEST:
        raise InputError(
            f"Ledgers of {table.height} pairs give no shares; name a --pair, or run again with more ledger_pairs."
        )
    prompts = [job.prompts[p] for p in table["pair"]]
    lengths = table.select("pair").join(job.scores, on="pair", how="left", maintain_order="left")
    difference = np.asarray((lengths["n_chosen"] - lengths["n_rejected"]).to_list())
    sources = [str(job.pairs[job.pair_set.index[p]].meta.get("source", "all")) for p in table["pair"]]
    return LedgerResult(
        site=site,
        pairs=table.height,
        shares=share_rows(table, prompts),
        by_length=shares_by(table, length_groups(difference), prompts),
        by_source=shares_by(table, sources, prompts),
    )


def _pair_ledger(job: Run, site: str, table: pl.DataFrame, pair: str, top: int) -> LedgerResult:
    if pair not in set(table["pair"]):
        others = f"{table['pair'][0]} and {table.height - 1} more"
        raise InputError(f"The ledger of {job.folder} at {site} has no pair {pair}; it has {others}.")
    contribution = job.effects(site, "contribution").filter(pl.col("pair") == pair)
    tokens = job.tokens[job.pair_set.index[pair]]
    features = pair_features(job.rm, job.saes[site], site, tokens, contribution, top)
    parts = table.filter(pl.col("pair") == pair).to_dicts()[0]
    return LedgerResult(site=site, pairs=1, ledger=parts, features=features.to_dicts())


def rank(job: Run, config: settings.RankConfig) -> Ranking:
    """The ranking of some sites; with ``interactions`` features are also ablated together."""
    sites = [job.check_site(config.site)] if config.site else job.sites
    ranking = Ranking.of(job, sites, config.by, config.top)
    if config.interactions:
        pairs = job.pair_set.one_per_prompt(job.of_split("measure"), PROMPTS)
        tokens, prompts = [job.tokens[i] for i in pairs], [job.pairs[i].prompt_key for i in pairs]
        for row in ranking.sites:
            ranked = job.features(row.site).sort("rank")
            top = ranked["feature"].head(TOP).to_list()
            with job.display.stage("rank") as progress:
                both = interactions(
                    job.rm, job.saes[row.site], row.site, tokens, prompts, top, groups_of(ranked), progress=progress
                )
            for name, table in zip(("interactions", "groups"), both, strict=True):
                write_table(job.folder / "effects" / row.site / f"{name}.parquet", table)
                setattr(row, name, table.to_dicts())
    return ranking

"""The single steps, as commands: each takes its settings and gives a result."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from pydantic import Field, ValidationError

from rmscope import api
from rmscope.activations.harvest import harvest as write_streams
from rmscope.activations.store import ActivationStore
from rmscope.activations.stream import stream
from rmscope.cli import step_settings as settings
from rmscope.cli.summaries import Ranking, RunSummary
from rmscope.effects import tables
from rmscope.effects.interactions import PROMPTS, TOP, groups_of, interactions
from rmscope.effects.ledger_summary import FEWEST, length_groups, pair_features, share_rows, shares_by
from rmscope.errors import InputError
from rmscope.evaluation.reward_aware import RewardAwareConfig, fine_tune
from rmscope.io import Display, write_table
from rmscope.model.doctor import examine
from rmscope.model.reward_model import RewardModel
from rmscope.model.training.held_out import measure_accuracy
from rmscope.model.training.loop import train_pm as train_by_our_loop
from rmscope.model.training.recipe import TrlRecipe, read_recipe
from rmscope.pairs.pair import SIDES, Pair, split_of
from rmscope.pairs.readers import ReadReport, load_pairs
from rmscope.report.result import Result, Rows
from rmscope.run.collect import score_evidence
from rmscope.run.inputs import load_pm
from rmscope.run.run import Run
from rmscope.run.settings import DEMO, RunConfig
from rmscope.sae import Sae, SaeConfig, train_saes
from rmscope.settings import ReadSettings, read_settings

OTHER = {"float32": "bfloat16", "bfloat16": "float32", "float16": "float32"}
"""The precision that doctor compares with the one asked for."""
SWEPT = ("k", "l1", "l0")


class Figures(Result):
    """Named figures, told as a table of two columns."""

    title: str = Field(exclude=True)
    figures: dict[str, Any]

    def summary(self) -> str:
        return self.title

    def tables(self) -> dict[str, Rows]:
        return {self.title: [{"figure": name.replace("_", " "), "value": value} for name, value in self.figures.items()]}

    def as_json(self) -> Any:
        return self.model_dump(mode="json")["figures"]


class Frame(Result):
    """A table of effects or the like, of which the terminal shows the first rows."""

    title: str = Field(exclude=True)
    note: str = Field("", exclude=True)
    figures: dict[str, Any] = {}
    rows: list[dict[str, Any]]
    shown: int = Field(20, exclude=True)
    name: str = Field("rows", exclude=True)
    """What the rows are called in JSON; empty where they are all of it."""

    def summary(self) -> str:
        return self.note or self.title

    def tables(self) -> dict[str, Rows]:
        return {self.title: self.rows[: self.shown]}

    def as_json(self) -> Any:
        return {**self.figures, self.name: self.rows} if self.name else self.rows


# Start here


def demo(config: settings.DemoConfig, display: Display) -> RunSummary:
    """The run on the embedded PM with six planted biases."""
    given = config.model_dump(exclude_unset=True)
    return RunSummary.of(Run.create(read_settings(RunConfig, None, {**DEMO, "out": config.out, **given}), display).go())


def run(config: settings.RunCommandConfig, display: Display) -> Result:
    """The whole pipeline, or what it would take."""
    own = RunConfig(**config.model_dump(exclude={"dry_run"}, exclude_unset=True))
    job = Run.create(own, display)
    if config.dry_run:
        return Figures(title="what would be done", figures=job.plan())
    return RunSummary.of(job.go())


def report(job: Run, _config: settings.ReportConfig) -> RunSummary:
    """The page of a finished run."""
    job.report()
    return RunSummary.of(job)


class Examination(Result):
    """The checks of a PM."""

    model: str
    identity: str
    noise_floor: float
    checks: list[dict[str, str]]

    def summary(self) -> str:
        counts = {s: sum(c["status"] == s for c in self.checks) for s in ("ok", "warn", "fail")}
        return f"{self.model}: {counts['ok']} ok, {counts['warn']} warn, {counts['fail']} fail"

    def tables(self) -> dict[str, Rows]:
        return {self.model: self.checks}

    @property
    def exit_code(self) -> int:
        return int(any(c["status"] == "fail" for c in self.checks))


def doctor(config: settings.DoctorConfig, display: Display) -> Examination:
    """The preflight and the further checks."""
    pairs = read_pairs(config.data, config)
    rm = load_pm(config.model, config)
    other = load_pm(config.model, config.model_copy(update={"dtype": OTHER[config.dtype]}))
    with display.stage("doctor") as progress:
        result = examine(rm, pairs, other, progress)
    return Examination(model=config.model, identity=rm.identity, noise_floor=result.noise_floor, checks=result.rows())


# From pairs to SAEs


def read_pairs(data: str, how: ReadSettings, report: ReadReport | None = None) -> list[Pair]:
    """The pairs of a source, as the settings say."""
    return load_pairs(
        data,
        split=how.split,
        limit=how.limit,
        columns=how.columns,
        form=how.format,
        on_bad_row=how.on_bad_row,
        report=report,
    )


def score(config: settings.ScoreConfig, display: Display) -> Figures:
    """Rewards, and how well they order the pairs."""
    report = ReadReport()
    pairs = read_pairs(config.data, config, report)
    rm = load_pm(config.model, config)
    tokens = rm.tokenize_all(pairs)
    fitting = [i for i, t in enumerate(tokens) if rm.fits(t)]
    with display.stage("score") as progress:
        scores = rm.score_tokens([tokens[i] for i in fitting], progress)
    table = pl.DataFrame(
        {
            "pair": [pairs[i].id for i in fitting],
            "chosen": scores.chosen.numpy(),
            "rejected": scores.rejected.numpy(),
            "delta": scores.delta.numpy(),
            "n_chosen": [tokens[i].chosen.numel() for i in fitting],
            "n_rejected": [tokens[i].rejected.numel() for i in fitting],
        }
    )
    if config.out is not None:
        write_table(config.out, table)
    evidence = score_evidence(table, {p.id: p.prompt_key for p in pairs})
    figures = {name: getattr(evidence, name) for name in type(evidence).model_fields if name != "histogram"}
    figures |= {"format": report.format, "pairs": len(fitting), "too_long": len(pairs) - len(fitting)}
    return Figures(title=f"{config.model} on {config.data}", figures=figures)


def _fit_pairs(config: settings.FitSettings) -> tuple[RewardModel, list[Pair]]:
    """The PM, and those pairs of the fit split (or of all) that its context takes."""
    pairs = [p for p in read_pairs(config.data, config) if config.all_pairs or split_of(p) == "fit"]
    rm = load_pm(config.model, config)
    fitting = [p for p, t in zip(pairs, rm.tokenize_all(pairs), strict=True) if rm.fits(t)]
    if not fitting:
        raise InputError(
            f"None of the {len(pairs)} pairs of the fit split fits the PM's context of {rm.context} tokens; give shorter "
            "texts, or --all-pairs where the data are few."
        )
    return rm, fitting


def harvest(config: settings.HarvestConfig, display: Display) -> Figures:
    """Activations on disk."""
    rm, pairs = _fit_pairs(config)
    with display.stage("harvest") as progress:
        store = write_streams(rm, pairs, config.sites or rm.default_sites, config.out, progress)
    tokens = {site: store.tokens(site) for site in store.sites}
    return Figures(
        title=f"activations in {config.out}", figures={"out": str(config.out), "pairs": len(pairs), "tokens": tokens}
    )


def train(config: settings.TrainConfig, display: Display) -> Frame:
    """SAEs of every site and setting; with ``reward_aware`` they are then fine-tuned."""
    named = sweep(config.sae)
    has_pm = bool(config.model and config.data)
    if (config.store is None or config.reward_aware) and not has_pm:
        what = "--reward-aware" if config.reward_aware else "Training without a folder of activations"
        raise InputError(f"{what} needs the PM and pairs; give --model and --data.")
    source: Any = None
    if has_pm:
        rm, pairs = _fit_pairs(config)
        source = stream(rm, pairs, config.sites or rm.default_sites) if config.store is None else None
    source = source or ActivationStore.open(config.store)  # type: ignore[arg-type]
    with display.stage("train") as progress:
        device = rm.device.type if has_pm else "cpu"
        saes = train_saes(source, named, config.out, config.sites or source.sites, progress, device)
    folders = [config.out / site / name for site, name in saes]
    if config.reward_aware:
        tuning = RewardAwareConfig(steps=config.reward_aware, weight=config.weight)
        for (site, name), sae in saes.items():
            with display.stage("fine-tune") as progress:
                fine_tune(rm, sae, pairs, tuning, named[name], config.out / "reward-aware" / name, progress)
            folders.append(config.out / "reward-aware" / name / site)
    rows = [{"sae": str(f.relative_to(config.out)), **_last_figures(f)} for f in folders]
    title = f"SAEs in {config.out}, figures on the last batch"
    return Frame(title=title, figures={"out": str(config.out)}, rows=rows, name="saes", shown=len(rows))


def sweep(config: settings.SweepConfig) -> dict[str, SaeConfig]:
    """The settings of each SAE by name, such as ``k16``; one nameless without a sweep. InputError names the bad flag."""
    given = config.model_dump(exclude_unset=True)
    several = {name: given.pop(name) for name in SWEPT if given.get(name)}
    combinations = {}
    for values in product(*several.values()):
        chosen = dict(zip(several, values, strict=True))
        name = "_".join(f"{key}{value}" for key, value in chosen.items() if len(several[key]) > 1)
        try:
            combinations[name] = SaeConfig(**given, **chosen)
        except ValidationError as error:
            first = error.errors()[0]
            raise InputError(f"--{first['loc'][0]} {first['input']}: {first['msg'].lower()}.") from error
    return combinations


def _last_figures(folder: Path) -> dict[str, float]:
    last = pl.read_parquet(folder / "training.parquet").row(-1, named=True)
    return {name: last[name] for name in ("fvu", "l0", "dead", "damage") if last.get(name) is not None}


# Effects


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


# Training a PM


def train_pm(config: settings.TrainPmConfig, display: Display) -> Figures:
    """A PM by a recipe, with its accuracy on held-out pairs."""
    recipe = read_recipe(config.recipe)
    with display.stage("train") as progress:
        if isinstance(recipe, TrlRecipe):
            from rmscope.model.training.trl import train_trl  # TRL is an extra

            figures = dict(train_trl(recipe, config.out, progress))
        else:
            figures = dict(train_by_our_loop(recipe, config.out, progress))
    with display.stage("measure") as progress:
        figures |= measure_accuracy(config.out, recipe, progress).as_dict()
    return Figures(title=f"{recipe.name} in {config.out}", figures=figures)

"""The single steps, as commands: each takes its settings and gives a result."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import polars as pl
from pydantic import ValidationError

from rmscope.activations.harvest import harvest as write_streams
from rmscope.activations.harvest import stream
from rmscope.activations.store import ActivationStore
from rmscope.cli import step_settings as settings
from rmscope.cli.figures import Figures, Frame
from rmscope.cli.summaries import RunSummary
from rmscope.errors import InputError
from rmscope.evaluation.reward_aware import RewardAwareConfig, fine_tune
from rmscope.io import Display, write_table
from rmscope.model.doctor import examine
from rmscope.model.reward_model import RewardModel
from rmscope.model.training.loop import train_pm as train_by_our_loop
from rmscope.model.training.recipe import TrlRecipe, measure_accuracy, read_recipe
from rmscope.pairs.pair import Pair, split_of
from rmscope.pairs.readers import ReadReport, load_pairs
from rmscope.report.result import Result, Rows
from rmscope.run.collect import score_evidence
from rmscope.run.inputs import load_pm
from rmscope.run.run import Run
from rmscope.run.settings import DEMO, RunConfig
from rmscope.sae import SaeConfig, train_saes
from rmscope.settings import ReadSettings, read_settings

OTHER = {"float32": "bfloat16", "bfloat16": "float32", "float16": "float32"}
"""The precision that doctor compares with the one asked for."""
SWEPT = ("k", "l1", "l0")


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

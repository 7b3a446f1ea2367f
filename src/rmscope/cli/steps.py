"""The single steps, as commands: each takes its settings and gives a result."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from pydantic import ValidationError

from rmscope.activations.harvest import harvest as write_streams
from rmscope.activations.harvest import stream
from rmscope.activations.store import ActivationStore
from rmscope.api import effects as api
from rmscope.cli import step_settings as settings
from rmscope.cli.summaries import Examination, Figures, Frame, LedgerResult, Ranking, RunSummary, TextSummary
from rmscope.effects.interactions import PROMPTS, TOP, groups_of, interactions
from rmscope.effects.ledger import FEWEST, length_groups, pair_features, share_rows, shares_by
from rmscope.effects.splice import agreement, delta_r2
from rmscope.errors import InputError
from rmscope.evaluation.reward_aware import RewardAwareConfig, fine_tune
from rmscope.evaluation.text_baseline import fit_text_baseline
from rmscope.io import Display, check_replaceable, write_table, write_text
from rmscope.model.rendering import SETTINGS_FILE
from rmscope.model.reward_model import RewardModel
from rmscope.model.training.loop import train_pm as train_by_our_loop
from rmscope.model.training.recipe import TrlRecipe, measure_accuracy, read_recipe
from rmscope.pairs.pair import Pair
from rmscope.report.result import Result
from rmscope.run.collect import score_evidence
from rmscope.run.inputs import TIED, Inputs, load_pm, need_prompts
from rmscope.run.plan.plan import make_plan
from rmscope.run.plan.settings import PlanConfig
from rmscope.run.run import Run
from rmscope.run.settings import DEMO, RunConfig
from rmscope.run.stages import score_table
from rmscope.sae import Sae, SaeConfig, train_saes
from rmscope.settings import read_settings

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
    job = Run.create(RunConfig(**config.model_dump(exclude={"dry_run"}, exclude_unset=True)), display)
    if config.dry_run:
        return make_plan(PlanConfig(**job.config.model_dump(exclude_unset=True)), display)
    return RunSummary.of(job.go())


def report(job: Run, _config: settings.ReportConfig) -> RunSummary:
    """The page of a finished run."""
    summary = RunSummary.of(job)
    summary.report.save()
    return summary


def doctor(config: settings.DoctorConfig, display: Display) -> Examination:
    """The preflight and the further checks."""
    inputs = Inputs.of(config.model, config.data, config)
    pairs, rm = inputs.all_pairs, inputs.rm
    other = None
    try:
        other = load_pm(config.model, config.model_copy(update={"dtype": OTHER[config.dtype]}))
    except InputError as error:
        display.note(f"not compared with {OTHER[config.dtype]}: {error}")
    with display.stage("doctor") as progress:
        result = api.doctor(rm, pairs, other, progress)
    return Examination(model=config.model, identity=rm.identity, noise_floor=result.noise_floor, checks=result.rows())


# From pairs to SAEs


def score(config: settings.ScoreConfig, display: Display) -> Figures:
    """Rewards, and how well they order the pairs."""
    inputs = Inputs.of(config.model, config.data, config)
    scored = inputs.scored
    with display.stage("score") as progress:
        for note in inputs.notes:
            display.note(note)
        table = score_table(inputs.rm, scored, progress)
    if config.out is not None:
        write_table(config.out, table)
    evidence = score_evidence(table, scored.prompts)
    figures = {name: getattr(evidence, name) for name in type(evidence).model_fields if name != "histogram"}
    figures |= {"format": inputs.read_report.format, "pairs": table.height}
    figures["too_long"] = inputs.left_out[f"longer than {inputs.longest}"]
    figures |= {"ties": inputs.left_out[TIED], "changed_by_template": inputs.changed}
    return Figures(title=f"{config.model} on {config.data}", figures=figures)


def baseline(config: settings.BaselineConfig, display: Display) -> TextSummary:
    """What text statistics alone explain of Δr."""
    inputs = Inputs.of(config.model, config.data, config)
    scored = inputs.scored
    need_prompts(scored, config.data)
    with display.stage("score") as progress:
        delta = inputs.rm.score_tokens(scored.tokens, progress).delta.numpy().astype(float)
    fit, fresh = scored.of_split("fit"), [*scored.of_split("confirm"), *scored.of_split("measure")]
    found = fit_text_baseline([scored.pairs[i] for i in fit], delta[fit])
    hat, prompts = found.predict([scored.pairs[i] for i in fresh]), np.array([scored.pairs[i].prompt_key for i in fresh])
    if config.out is not None:
        write_text(config.out, found.model_dump_json(indent=1))
    return TextSummary(
        model=config.model,
        data=config.data,
        terms=found.terms,
        explained=delta_r2(delta[fresh], hat, prompts),
        agreement=agreement(delta[fresh], hat, prompts),
        pairs=len(fresh),
    )


def _fit_pairs(config: settings.FitSettings) -> tuple[RewardModel, list[Pair]]:
    """The PM, and those pairs of the fit split (or of all) that its context takes."""
    inputs = Inputs.of(config.model, config.data, config)
    scored = inputs.scored
    pairs = scored.pairs if config.all_pairs else [scored.pairs[i] for i in scored.of_split("fit")]
    if not pairs:
        raise InputError(
            f"None of the {len(inputs.all_pairs)} pairs of the fit split fits the PM's context of {inputs.rm.context} "
            "tokens; give shorter texts, or --all-pairs where the data are few."
        )
    return inputs.rm, pairs


def harvest(config: settings.HarvestConfig, display: Display) -> Figures:
    """Activations on disk."""
    rm, pairs = _fit_pairs(config)
    with display.stage("harvest") as progress:
        store = write_streams(rm, pairs, config.sites or rm.default_sites, config.out, progress)
    figures = {"out": str(config.out), "pairs": len(pairs), "tokens": {site: store.tokens(site) for site in store.sites}}
    return Figures(title=f"activations in {config.out}", figures=figures)


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
        job = Run.open(config.run, display, config.trust_remote_code)
        site = job.check_site(config.site or job.sites[0])
        rm, sae, pairs = job.rm, job.saes[site], [job.pairs[i] for i in job.of_split("measure")[: config.limit]]
        if config.method == job.config.estimate:
            quality = next(s.quality for s in job.evidence.sites if s.site == site)
    elif config.model and config.data and config.sae:
        inputs = Inputs.of(config.model, config.data, config)
        rm, sae, pairs = inputs.rm, Sae.load(config.sae), inputs.scored.pairs
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


def ablate(job: Run, config: settings.AblateConfig) -> Frame:
    """Exact effects of features on pairs of the measure split."""
    site = job.check_site(config.site)
    features = _named_features(config.features, job, site)
    pairs = [job.pairs[i] for i in job.of_split("measure")[: config.limit]]
    with job.display.stage("ablate") as progress:
        table = api.ablate(job.rm, job.saes[site], pairs, features, site, progress)
    if config.out is not None:
        write_table(config.out, table)
    note = f"{table.height} exact effects."
    if not job.rm.capabilities.resume:
        note += " This PM cannot be resumed at a token: each ablation ran the whole text."
    top = table.sort(table["effect"].abs(), descending=True)
    return Frame(title=f"{table.height} exact effects at {site}, the largest", note=note, rows=top.to_dicts(), name="")


def _named_features(text: str, job: Run, site: str) -> api.Features:
    if text == "active":
        return "active"
    if text.startswith("top:") and text[4:].isdecimal():
        return job.features(site)["feature"].head(int(text[4:])).to_list()
    if all(part.strip().isdecimal() for part in text.split(",")):
        return [int(part) for part in text.split(",")]
    raise InputError(f"--features {text} is not known; write active, top:K, or a list such as 12,405,77.")


def ledger(job: Run, config: settings.LedgerConfig) -> LedgerResult:
    """The ledgers of a site."""
    site, table = job.check_site(config.site), job.ledger(config.site)
    if table.is_empty():
        raise InputError(
            f"The run in {job.folder} has no ledgers (ledger_pairs: 0); rmscope run {job.folder} --ledger-pairs 24 makes 24."
            if job.config.ledger_pairs == 0
            else f"This run has no ledgers at {site}; it has them at {', '.join(job.ledger_sites)}."
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
    parts = table.filter(pl.col("pair") == pair).to_dicts()
    if not parts:
        others = f"{table['pair'][0]} and {table.height - 1} more"
        raise InputError(f"The ledger of {job.folder} at {site} has no pair {pair}; it has {others}.")
    contribution = job.effects(site, "contribution").filter(pl.col("pair") == pair)
    tokens = job.tokens[job.pair_set.index[pair]]
    features = pair_features(job.rm, job.saes[site], site, tokens, contribution, top)
    return LedgerResult(site=site, pairs=1, ledger=parts[0], features=features.to_dicts())


def rank(job: Run, config: settings.RankConfig) -> Ranking:
    """The ranking of some sites; with ``interactions`` features are also ablated together."""
    sites = [job.check_site(config.site)] if config.site else job.sites
    ranking = Ranking.of(job, sites, config.by, config.top)
    if config.interactions:
        pairs = job.pair_set.only(job.pair_set.one_per_prompt(job.of_split("measure"), PROMPTS))
        prompts = [p.prompt_key for p in pairs.pairs]
        for row in ranking.sites:
            ranked, sae = job.features(row.site).sort("rank"), job.saes[row.site]
            top = ranked["feature"].head(TOP).to_list()
            with job.display.stage("rank") as progress:
                both = interactions(job.rm, sae, row.site, pairs.tokens, prompts, top, groups_of(ranked), progress=progress)
            for name, table in zip(("interactions", "groups"), both, strict=True):
                write_table(job.folder / "effects" / row.site / f"{name}.parquet", table)
                setattr(row, name, table.to_dicts())
    return ranking


# Training a PM


def train_pm(config: settings.TrainPmConfig, display: Display) -> Figures:
    """A PM by a recipe, with its accuracy on held-out pairs."""
    recipe = read_recipe(config.recipe)
    check_replaceable(config.out, SETTINGS_FILE)
    with display.stage("train") as progress:
        if isinstance(recipe, TrlRecipe):
            from rmscope.model.training.trl import train_trl  # TRL is an extra

            figures = dict(train_trl(recipe, config.out, progress))
        else:
            figures = dict(train_by_our_loop(recipe, config.out, progress))
    with display.stage("measure") as progress:
        figures |= measure_accuracy(config.out, recipe, progress).as_dict()
    return Figures(title=f"{recipe.name} in {config.out}", figures=figures)

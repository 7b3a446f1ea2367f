"""experiment: a hypothesis as a controlled experiment; sufficiency: what features do when they are put in."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from rmscope.cli.base import (
    Adapter,
    Debug,
    Device,
    Dtype,
    Json,
    Output,
    Trust,
    app,
    emit,
    open_job,
    pm_options,
    print_rows,
    reported_features,
)
from rmscope.cli.terminal import Bars, console
from rmscope.errors import InputError

SD_PAIRS = 128
"""Without a run, SD(Δr) is taken over so many pairs of the data."""


@app.command()
def experiment(
    file: Annotated[str, typer.Argument(help="A YAML file, or a ready-made one: dont_know, repetition, thanks, ...")],
    run: Annotated[Path | None, typer.Option(help="A run folder: its PM, fresh prompts, and features to ablate.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Without a run, and without ablation: hub id, folder, or zoo:NAME.")
    ] = None,
    data: Annotated[str, typer.Option(help="Without a run: pairs that give SD(Δr), and prompts.")] = "demo:planted",
    out: Annotated[Path | None, typer.Option(help="Folder of the result; of a run, its evidence/experiments.")] = None,
    adapter: Adapter = None,
    output: Output = None,
    trust_remote_code: Trust = False,
    device: Device = "auto",
    dtype: Dtype = "float32",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """A hypothesis as a controlled experiment: conditions over many prompts, with and without features, and a verdict."""
    from rmscope.io import write_json, write_table, write_text
    from rmscope.studies.experiment.analyse import run_experiment
    from rmscope.studies.experiment.conditions import bases_of, read_experiment
    from rmscope.studies.experiment.page import render_experiment

    asked, started = read_experiment(file), time.time()
    study = _study(run, model, data, pm_options(dtype, device, adapter, output, trust_remote_code))
    saes, reported = (study.saes, reported_features(study)) if run is not None and asked.ablate else ({}, {})
    _check_sites(asked, run, saes)
    bases = bases_of(asked, [study.pairs[i] for i in study.of_split("measure")])
    sd = study.sd if run is not None else _sd(study)
    with Bars().stage("measure") as progress:
        found, table = run_experiment(study.rm, asked, bases, sd, saes, reported, study.config.seed, progress)
    found |= {"model": study.config.model, "data": study.config.data}
    if found["ablated"]:
        census = study.census[found["ablated"]["site"]]
        for row in found["ablated"]["features"]:
            row["tokens"] = census.top_tokens(row["feature"], lambda t: study.rm.tokenizer.decode([t]))
    found["seconds"] = round(time.time() - started, 1)
    folder = out or (run / "evidence" / "experiments" if run is not None else Path("experiments"))
    write_table(folder / f"{asked.name}.parquet", table)
    write_json(folder / f"{asked.name}.json", found)
    write_text(folder / f"{asked.name}.html", render_experiment(found))
    _print(found, folder / f"{asked.name}.html")
    emit(found, as_json)


def _study(run: Path | None, model: str | None, data: str, options: dict[str, Any]) -> Any:
    from rmscope.run.settings import read_config
    from rmscope.run.study import Study

    if run is not None:
        return open_job(run)
    if model is None:
        raise InputError("There is nothing to measure on; name a run folder with --run, or a PM with --model.")
    return Study(read_config(None, {"model": model, "data": data, "out": Path(), **options}))


def _sd(study: Any) -> float:
    with Bars().stage("score") as progress:
        return float(study.rm.score_tokens(study.tokens[:SD_PAIRS], progress).delta.std())


def _check_sites(asked: Any, run: Path | None, saes: dict[str, Any]) -> None:
    if run is None or asked.ablate is None or asked.ablate.site is None:
        return
    if asked.ablate.site not in saes:
        raise InputError(f"The run in {run} has no SAE at {asked.ablate.site}; it has {', '.join(saes)}.")
    if (m := saes[asked.ablate.site].m) <= max(asked.ablate.features, default=0):
        raise InputError(f"The SAE at {asked.ablate.site} has {m} features, from 0; mend ablate.features.")


def _print(found: dict[str, Any], page: Path) -> None:
    from rmscope.report.formatting import effect, q_value, share

    table = Table(title=found["hypothesis"], title_justify="left")
    for name in ("claim", "effect in SD(Δr), or share taken back", "p (Holm)", "verdict"):
        table.add_column(name)
    for c in found["claims"]:
        if "share" in c:
            shown = share(*c["share"].values())
        else:
            low, high = sorted(c["sign"] * c["effect"][end] / found["sd"] for end in ("low", "high"))
            shown = effect(c["sign"] * c["effect"]["value"] / found["sd"], low, high)
        table.add_row(c["claim"], " ".join(shown), q_value(c["p"]), " ".join(filter(None, (c["verdict"], c["why"]))))
    console.print(table)
    console.print(f"[bold]{found['verdict']}[/] ({found['test']}; {found['prompts']} prompts, {found['seconds']} s)")
    if found["by_features"]:
        console.print(f"that the ablated features carry it: {found['by_features']}")
    console.print(str(page), soft_wrap=True)


@app.command()
def sufficiency(
    folder: Annotated[Path, typer.Argument(help="A run folder.")],
    site: Annotated[str | None, typer.Option(help="One site, such as resid_post.7; left out, all of the run.")] = None,
    prompts: Annotated[int, typer.Option(min=8, help="Fresh prompts for steering and for texts put in.")] = 24,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """What each reported feature does when it is put in: steering, text that fires it; and whether text agrees with R_j."""
    from rmscope.io import write_json
    from rmscope.studies.sufficiency.contexts import pooled

    job = open_job(folder)
    if site is not None and site not in job.sites:
        raise InputError(f"The run in {folder} has no SAE at {site}; it has {', '.join(job.sites)}.")
    reported = {at: table for at, table in reported_features(job).items() if table.height and site in (None, at)}
    if not reported:
        raise InputError(f"The run in {folder} reports no feature at {site or 'any site'}; rank more, or take another run.")
    if not job.rm.capabilities.resume:
        raise InputError("This PM cannot be resumed at a site, which steering needs; sufficiency studies decoder PMs.")
    sites, contexts = [], {}
    for at, features in reported.items():
        found, contexts[at] = _at_site(job, at, features, prompts)
        sites.append(found)
    result: dict[str, Any] = {"sites": sites}
    if len(sites) > 1:
        result["agreement"] = pooled(contexts, job.config.seed)
        write_json(folder / "evidence" / "sufficiency" / "agreement.json", result["agreement"])
        print_rows("text against R_j, features of all sites", _figures(result["agreement"]))
    emit(result, as_json)


def _at_site(job: Any, site: str, features: Any, prompts: int) -> tuple[dict[str, Any], Any]:
    """A site's figures and its table of contexts, written to the run folder with the page."""
    from rmscope.io import write_json, write_table, write_text
    from rmscope.studies.experiment.conditions import bases_of_pairs
    from rmscope.studies.sufficiency.classify import Inputs
    from rmscope.studies.sufficiency.classify import sufficiency as measure
    from rmscope.studies.sufficiency.page import render_sufficiency

    started, fit, fresh = time.time(), job.of_split("fit"), [job.pairs[i] for i in job.of_split("measure")]
    stored, tokens = [job.pairs[i] for i in fit], [job.tokens[i] for i in fit]
    bases = bases_of_pairs(fresh)[:prompts]
    material = Inputs(job.rm, job.saes[site], site, features, job.store, stored, tokens, bases, fresh)
    found, tables = measure(material, Bars(), job.config.seed)
    for row in found["features"]:
        row["tokens"] = job.census[site].top_tokens(row["feature"], lambda t: job.rm.tokenizer.decode([t]))
    found |= {"model": job.config.model, "data": job.config.data, "sd": job.sd, "seconds": round(time.time() - started, 1)}
    at = job.folder / "evidence" / "sufficiency"
    for name, table in tables.items():
        write_table(at / f"{site}.{name}.parquet", table)
    write_json(at / f"{site}.json", found)
    write_text(at / f"{site}.html", render_sufficiency(found))
    counts = {f"{row['class']}: {row['why']}": row["features"] for row in found["counts"]}
    print_rows(f"{features.height} reported features at {site}", {**counts, **_figures(found["agreement"])})
    console.print(f"{found['seconds']} s: {at / f'{site}.html'}", soft_wrap=True)
    return found, tables["contexts"]


def _figures(agreement: dict[str, Any]) -> dict[str, Any]:
    names = ("pearson", "spearman", "same_sign")
    return {f"text against R_j, {name.replace('_', ' ')}": agreement[name] for name in names if agreement[name]}

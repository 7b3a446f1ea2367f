"""jailbreak: bad text that the PM prefers to good answers, from the verified features of a run, with proof."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from rmscope.cli.base import BadRow, Debug, Json, app, emit, open_job
from rmscope.cli.terminal import Bars, console
from rmscope.errors import InputError


@app.command()
def jailbreak(
    folder: Annotated[Path, typer.Argument(help="A run folder.")],
    site: Annotated[str | None, typer.Option(help="One site, such as resid_post.7; left out, all of the run's.")] = None,
    budget: Annotated[int, typer.Option(min=1, help="Tokens of all phrases together, at most.")] = 64,
    prompts: Annotated[int, typer.Option(min=2, help="Measured prompts, at most.")] = 120,
    data: Annotated[
        str | None, typer.Option(help="Measure on these pairs' prompts; left out, the run's measure split.")
    ] = None,
    on_bad_row: BadRow = "error",
    seed: Annotated[int, typer.Option(help="Fixes every draw.")] = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Completions that fool your own PM: phrases of its features, searched on some prompts, measured on others."""
    from rmscope.io import content_hash, write_json, write_table, write_text
    from rmscope.studies.jailbreak import analyse
    from rmscope.studies.jailbreak.page import render_jailbreak

    job = open_job(folder)
    subject = _subject(job, folder, site)
    fresh, left_out = _fresh(job, data, on_bad_row or "error")
    shown, key = Bars(), content_hash(analyse.VERSION, job.on_disk.record["stages"], list(subject.saes), budget, seed)
    made = _made(job, subject, key, budget, seed, shown)
    with shown.stage("targets") as progress:
        targets = _targets(job, *fresh, prompts, budget, seed, left_out, progress)
    key = content_hash(key, [(t.pair.id, t.bad) for t in targets])
    with shown.stage("measure") as progress:
        table = job.on_disk.in_units(
            "jailbreak",
            key,
            range(len(targets)),
            progress,
            lambda unit, within: {
                "rows": analyse.measure(
                    subject, made, [targets[i] for i in unit], max(0, analyse.OWN - unit[0]), budget, seed, within
                )
            },
        )["rows"]
    found = {
        "model": job.config.model, "data": data or f"{job.config.data}, measure split", "run": folder.name, "seed": seed,
        "budget": budget, "left_out": left_out.counts, **analyse.summary(table, made, job.sd),
        "examples": analyse.examples(table, targets, made),
    }  # fmt: skip
    write_table(folder / "evidence" / "jailbreak.parquet", table)
    write_json(folder / "evidence" / "jailbreak.json", found)
    write_text(folder / "evidence" / "jailbreak.html", render_jailbreak(found))
    job.on_disk.drop_parts("jailbreak", key)
    _print(found)
    console.print(f"The page: [bold]{folder / 'evidence' / 'jailbreak.html'}[/]")
    emit({name: value for name, value in found.items() if name != "examples"}, as_json)


def _subject(job: Any, folder: Path, site: str | None) -> Any:
    """The run as the lab sees it. InputError where nothing is ranked, or where nothing reported raises the reward."""
    import polars as pl

    from rmscope.studies.jailbreak import analyse

    sites = [site] if site else list(job.sites)
    for name in sites:
        if name not in job.sites:
            raise InputError(f"The run in {folder} has no SAE at {name}; it has {', '.join(job.sites)}.")
        if not (folder / "features" / f"{name}.parquet").is_file():
            raise InputError(
                f"The run in {folder} has no ranking at {name} yet; rmscope report {folder} makes what is missing."
            )
    if not job.rm.capabilities.resume:
        raise InputError(
            f"{job.config.model} cannot be resumed at a site, which this search and its proof need; use a decoder."
        )
    reported, up, means = {}, {}, {}
    fit = job.scores.filter(pl.col("split") == "fit").select("pair")
    for name in sites:
        ranked = pl.read_parquet(folder / "features" / f"{name}.parquet").sort("rank")
        kept = ranked.filter(pl.col("reported") & ~pl.col("flags").list.contains("ending"))
        reported[name] = kept["feature"].to_list()
        up[name] = kept.filter(pl.col("mean_effect") > 0)["feature"].to_list()
        effects = folder / "effects" / name
        exact = pl.read_parquet(effects / "exact.parquet").join(fit, on="pair", how="semi")
        means[name] = analyse.exact_means(exact, pl.read_parquet(effects / "estimated.parquet"))
    if not any(up.values()):
        raise InputError(
            f"No reported feature of {folder} raises the reward at {', '.join(sites)}, so there is nothing to make a "
            "jailbreak of; use another site or a run with more pairs."
        )
    split = job.of_split("fit")
    pairs, tokens = [job.pairs[i] for i in split], [job.tokens[i] for i in split]
    saes = {name: job.saes[name] for name in sites}
    return analyse.Inputs(job.rm, saes, job.store, pairs, tokens, reported, up, means, analyse.WITHOUT * job.sd)


def _fresh(job: Any, data: str | None, on_bad_row: str) -> tuple[tuple[list[Any], list[str]], Any]:
    """Pairs to measure on with what stands for their prompts, and the count of what is left out: prompts of the run."""
    from rmscope.pairs.readers import load_pairs
    from rmscope.studies.jailbreak.targets import Exclusions

    left_out = Exclusions()
    if data is None:
        pairs = [job.pairs[i] for i in job.of_split("measure")]
        return (pairs, [job.prompts[p.id] for p in pairs]), left_out
    seen, kept = set(job.prompts.values()), []
    for pair in load_pairs(data, on_bad_row=on_bad_row):  # type: ignore[arg-type]
        if pair.first_human_turn() in seen:
            left_out.add("its prompt stands in the run")
        else:
            kept.append(pair)
    return (kept, [str(p.meta.get("group", p.first_human_turn())) for p in kept]), left_out


def _targets(
    job: Any, pairs: list[Any], keys: list[str], most: int, budget: int, seed: int, left_out: Any, progress: Any
) -> list[Any]:
    from rmscope.studies.jailbreak.search import SCREEN
    from rmscope.studies.jailbreak.targets import make_targets

    targets = make_targets(job.rm, pairs, keys, most, budget, seed, left_out, progress)
    if len(targets) < SCREEN:
        why = "; ".join(f"{reason}: {n}" for reason, n in left_out.counts.items()) or "there are no more"
        raise InputError(
            f"Only {len(targets)} prompts have a bad text below their chosen answer, {SCREEN} are needed ({why}); "
            "give more pairs."
        )
    return targets


def _made(job: Any, subject: Any, key: str, budget: int, seed: int, shown: Bars) -> Any:
    """What the search makes on the confirm split; a search that is done with the same settings is read back."""
    from rmscope.io import write_json
    from rmscope.studies.jailbreak import analyse
    from rmscope.studies.jailbreak.targets import Exclusions

    path = job.folder / "evidence" / "jailbreak.made.json"
    if path.is_file() and (stored := json.loads(path.read_text("utf-8"))).get("key") == key:
        shown.note("search: done before")
        return analyse.PhraseLists.from_dict(stored)
    pairs = [job.pairs[i] for i in job.of_split("confirm")]
    with shown.stage("prompts") as progress:
        keys = [job.prompts[p.id] for p in pairs]
        targets = _targets(job, pairs, keys, analyse.SEARCHED, budget, seed, Exclusions(), progress)
    made = analyse.make(subject, targets, budget, seed, shown.stage)
    write_json(path, {"key": key, **made.as_dict()})
    return made


def _print(found: dict[str, Any]) -> None:
    table = Table(title=f"outranks the chosen answer, {found['prompts']} unseen prompts", title_justify="left")
    for name in ("text", "prompts", "tokens", "outranks", "by 1 SD(Δr)", "features ablated", "gain in reward"):
        table.add_column(name, justify="left" if name == "text" else "right")
    for arm in found["arms"]:
        without = _interval(arm["without"], True) if arm["without"] else ""
        figures = *(_interval(arm[n], True) for n in ("success", "by_sd")), without, _interval(arm["gain"], False)
        table.add_row(arm["arm"], str(arm["prompts"]), f"{arm['tokens']:.0f}", *figures)
    console.print(table)
    if found["named"] is None:
        console.print("No reported feature takes back any of the gain on the search's prompts: there is no proof to give.")
        return
    table = Table(title=f"carried by {found['named']['features']} at {found['named']['site']}", title_justify="left")
    for name in ("jailbreak", "over", "U", "mediated share", "largest matched set"):
        table.add_column(name, justify="left" if name in ("jailbreak", "over") else "right")
    for row in found["proof"]:
        share = _interval(row["share"], True) if row["share"] else "undefined"
        matched = _interval(row["matched"]["largest"], True) if row["matched"] else ""
        table.add_row(row["jailbreak"], row["control"], _interval(row["u"], False), share, matched)
    console.print(table)


def _interval(figure: dict[str, float], as_share: bool) -> str:
    values = (figure["value"], figure["low"], figure["high"])
    value, low, high = (f"{v:.0%}" if as_share else f"{v:+.2f}" for v in values)
    return f"{value} [{low}, {high}]"

"""compare: two PMs, or a PM and its base, on the same fresh prompts."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from rmscope.cli.base import Debug, Json, app, emit, open_job, reported_features
from rmscope.cli.terminal import console
from rmscope.errors import InputError

if TYPE_CHECKING:
    from rmscope.studies.compare.models import Version


@app.command()
def compare(
    folder: Annotated[Path, typer.Argument(help="A finished run folder: PM A, its SAEs and its reported features.")],
    other: Annotated[
        str, typer.Argument(help="B: another run folder, a PM, a patch of A's PM, or a base (zoo:smollm2, a folder).")
    ],
    prompts: Annotated[int, typer.Option(min=2, help="Fresh prompts on which a feature is ablated, at most.")] = 48,
    pairs: Annotated[int, typer.Option(min=2, help="Fresh pairs of a run that are read, at most.")] = 512,
    control: Annotated[
        str | None,
        typer.Option(help="Another PM of A's kind (say, another seed): a difference holds where B differs from it too."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the result; left out, the run's evidence.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Two PMs side by side: which features are there in both, and which rewarded concepts came, went or changed."""
    from rmscope.io import write_json, write_table, write_text
    from rmscope.studies.compare.analyse import compare as measure
    from rmscope.studies.compare.models import fresh_pairs, meet, must_match
    from rmscope.studies.compare.page import render_comparison

    started, job = time.time(), open_job(folder)
    a = _of_run(job)
    b, others = _other(job, other)
    beside = _control(job, control, b)
    for version in beside:
        must_match(b, version)
    fresh = meet(a, [b, *beside], fresh_pairs([job, *others], pairs))
    found, table = measure(a, b, fresh, job.on_disk, prompts, job.config.seed, *beside)
    found |= {"data": [j.config.data for j in (job, *others)], "seconds": round(time.time() - started, 1)}
    name = "compare-" + re.sub(r"[^A-Za-z0-9._-]+", "-", Path(other).name or other)
    target = out or folder / "evidence"
    write_table(target / f"{name}.parquet", table)
    write_json(target / f"{name}.json", found)
    write_text(target / f"{name}.html", render_comparison(found))
    _print(found, target / f"{name}.html")
    emit(found, as_json)


def _of_run(job: Any) -> Version:
    from rmscope.studies.compare.models import Version

    def top_tokens(site: str, feature: int) -> list[tuple[str, float]]:
        return list(job.census[site].top_tokens(feature, lambda t: job.rm.tokenizer.decode([t])))

    reported = {site: table.sort("rank")["feature"].to_list() for site, table in reported_features(job).items()}
    return Version(
        job.rm,
        f"{job.config.model} (run {job.folder.name})",
        job.rm.identity,
        saes=job.saes,
        reported=reported,
        tokens=top_tokens,
    )


def _other(job: Any, other: str) -> tuple[Version, list[Any]]:
    """B, and its run where it has one."""
    from rmscope.model.loading import is_base
    from rmscope.model.reward_model import RewardModel
    from rmscope.run.study import Study
    from rmscope.studies.compare.models import Version, open_base
    from rmscope.studies.edit.patch import is_patch, load_edited

    c = job.config
    if (Path(other) / "run.yaml").is_file():
        second = open_job(Path(other))
        return _of_run(second), [second]
    if is_base(other):
        return open_base(other, job.rm), []
    if is_patch(other):
        rm = load_edited(Study(c).rm, other)
    else:
        rm = RewardModel.load(other, c.dtype, c.device)
    return Version(rm, rm.name, rm.identity), []


def _control(job: Any, control: str | None, b: Version) -> list[Version]:
    """The control, if there is one; only its reward is looked at."""
    if control is None:
        return []
    if b.base:
        raise InputError(
            f"{b.name} has no scalar head, so no effect in it can be held against a control; leave --control out."
        )
    version, _ = _other(job, control)
    if version.base:
        raise InputError(f"The control {version.name} has no scalar head; name another PM of A's kind.")
    return [replace(version, saes={}, reported={})]


def _print(found: dict[str, Any], page: Path) -> None:
    from rmscope.report.formatting import effect, estimate, number, q_value, share

    table = Table(title=f"the same SAEs in A and in B, {found['prompts']} fresh prompts", title_justify="left")
    for column in ("SAE", "L0 A", "L0 B", "FVU A", "FVU B", "dead A", "dead B", "rates", "reported", "there in both"):
        table.add_column(column, justify="left" if column == "SAE" else "right", no_wrap=column == "SAE")
    for row in found["sites"]:
        l0, fvu = ([estimate(*row[v][name].values())[0] for v in "ab"] for name in ("l0", "fvu"))
        there = " ".join(share(*list(row["there"].values())[:3])) if row["reported"] else ""
        dead = [share(row[v]["dead"])[0] for v in "ab"]
        table.add_row(
            f"{row['of'].upper()} {row['site']}", *l0, *fvu, *dead, number(row["rates"]), str(row["reported"]), there
        )
    console.print(table)
    if found["base"]:
        console.print("B is a base without a head: what features do to the reward is not compared.")
    else:
        counts = ", ".join(f"{row['features']} {row['class']}" for row in found["classes"])
        table = Table(title=f"ablation effects in SD(Δr), {counts}", title_justify="left")
        beside = ["control"] if found["control"] else []
        for column in ("concept", "site", "A", "B", "B - A", "q", *beside, "class"):
            table.add_column(column, justify="left" if column in ("concept", "site", "class") else "right")
        for row in [row for row in found["concepts"] if row["changed"]][:20]:
            means = (effect(row[m], row[f"{m}_low"], row[f"{m}_high"]) for m in ("a", "b", "difference", *beside))
            cells = [f"{value} {between}" for value, between in means]
            kind = row["class"] + (", holds" if beside and row["holds"] else "")
            name = f"{row['of'].upper()} {row['feature']} {' '.join(map(repr, row['tokens'][:3]))}"
            table.add_row(name, row["site"], *cells[:3], q_value(row["difference_q"]), *cells[3:], kind)
        console.print(table)
    console.print(f"{found['seconds']} s: {page}", soft_wrap=True)

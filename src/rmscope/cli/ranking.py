"""rank: what drives reward and what drives preference, from a run folder; and what features do together."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rmscope.cli.base import Debug, Json, app, emit, open_job, print_table
from rmscope.cli.terminal import Bars, console
from rmscope.errors import InputError

if TYPE_CHECKING:
    import polars as pl

SHOWN = {
    "ablation": ("rank", "feature", "reported", "mean_effect", "ci_low", "ci_high", "q", "n", "strong_effect", "q_strong"),
    "preference": ("feature", "prefers", "mean_diff", "diff_low", "diff_high", "q_diff", "length_corr", "n"),
}


@app.command()
def rank(
    folder: Annotated[Path, typer.Argument(help="A run folder.")],
    site: Annotated[str | None, typer.Option(help="One site, such as resid_post.7; left out, all.")] = None,
    by: Annotated[str, typer.Option(help="ablation: what drives reward; preference: what parts chosen from rejected.")] = (
        "ablation"
    ),
    top: Annotated[int, typer.Option(help="Features a site to print.")] = 20,
    interactions: Annotated[
        bool, typer.Option("--interactions", help="Also ablate the best 30 in pairs, and the reported ones as a group.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """The frozen features of a run, ranked by mean effect or by what they do to the preference, with their flags."""
    from rmscope.api import open_run
    from rmscope.ranking.ranking import power_statement

    if by not in SHOWN:
        raise InputError(f"--by {by} is not known; write ablation or preference.")
    run = open_run(folder)
    sites = _sites(folder, run.sites, site)
    sd = float(run.scores["delta"].std())  # type: ignore[arg-type]
    result = []
    for name in sites:
        features = run.features(name)
        power = power_statement(features, sd)
        ordered = _ordered(features, by)
        print_table(f"{name}: {_count(ordered, by)}", _printed(ordered, by, top))
        console.print(power)
        result.append({"site": name, "by": by, "power": power, "features": ordered.to_dicts()})
    if interactions:
        for row, (pairs, groups) in zip(result, _interactions(folder, sites), strict=True):
            print_table(f"{row['site']}: ablated in pairs, the largest interactions", pairs.head(top))
            print_table(f"{row['site']}: ablated as a group", groups)
            row |= {"interactions": pairs.to_dicts(), "groups": groups.to_dicts()}
    emit(result, as_json)


def _sites(folder: Path, known: list[str], site: str | None) -> list[str]:
    if not known:
        raise InputError(f"The run in {folder} has no ranking yet; rmscope report {folder} makes what is missing.")
    if site is not None and site not in known:
        raise InputError(f"The run in {folder} has no ranking at {site}; it has {', '.join(known)}.")
    return known if site is None else [site]


def _ordered(features: pl.DataFrame, by: str) -> pl.DataFrame:
    import polars as pl

    if by == "ablation":
        return features.sort("rank")
    return features.sort("prefers", pl.col("mean_diff").abs(), "feature", descending=[True, True, False])


def _printed(ordered: pl.DataFrame, by: str, top: int) -> pl.DataFrame:
    import polars as pl

    columns = [name for name in SHOWN[by] if name in ordered.columns]  # a run of an earlier version has fewer
    return ordered.head(top).select(*columns, pl.col("flags").list.join(" "))


def _count(ordered: pl.DataFrame, by: str) -> str:
    """Flagged features get a count of their own in every claim."""
    import polars as pl

    verb, column = {"ablation": ("drive reward", "reported"), "preference": ("drive preference", "prefers")}[by]
    found = ordered.filter(pl.col(column))
    flagged = found.filter(pl.col("flags").list.len() > 0)
    counts = flagged["flags"].explode().value_counts(sort=True).iter_rows()
    why = f" ({', '.join(f'{name} {n}' for name, n in counts)})" if flagged.height else ""
    return (
        f"{found.height} of {ordered.height} frozen features {verb} (q < .05), "
        f"{found.height - flagged.height} without a flag, {flagged.height} with{why}"
    )


def _interactions(folder: Path, sites: list[str]) -> list[tuple[Any, Any]]:
    """Runs the joint ablations and keeps them in the run folder."""
    import polars as pl

    from rmscope.effects.interactions import PROMPTS, TOP, groups_of, interactions
    from rmscope.io import write_table

    job, found = open_job(folder), []
    pairs = job.one_a_prompt(job.of_split("measure"), PROMPTS)
    tokens, prompts = [job.tokens[i] for i in pairs], [job.prompts[job.ids[i]] for i in pairs]
    for site in sites:
        ranked = pl.read_parquet(folder / "features" / f"{site}.parquet").sort("rank")
        top = ranked["feature"].head(TOP).to_list()
        with Bars().stage("rank") as progress:
            both = interactions(job.rm, job.saes[site], site, tokens, prompts, top, groups_of(ranked), progress=progress)
        for name, table in zip(("interactions", "groups"), both, strict=True):
            write_table(folder / "effects" / site / f"{name}.parquet", table)
        found.append(both)
    return found

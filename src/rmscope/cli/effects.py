"""ablate: exact ablation effects from a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rmscope.cli.base import Debug, Json, app, emit, open_job, print_table
from rmscope.cli.terminal import Bars, console
from rmscope.errors import InputError


@app.command()
def ablate(
    folder: Annotated[Path, typer.Argument(help="A run folder.")],
    site: Annotated[str, typer.Option(help="The site, such as resid_post.7.")],
    features: Annotated[str, typer.Option(help="active, top:K, or a list such as 12,405,77.")] = "top:10",
    limit: Annotated[int, typer.Option(help="Pairs of the measure split.")] = 8,
    out: Annotated[Path | None, typer.Option(help="Write the table to this Parquet file.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Exact ablation effects of features on fresh pairs of a run (its measure split)."""
    from rmscope.effects.tables import ablation_table
    from rmscope.io import write_table
    from rmscope.pairs.pair import SIDES

    job = open_job(folder)
    if site not in job.sites:
        raise InputError(f"The run in {folder} has no SAE at {site}; it has {', '.join(job.sites)}.")
    chosen = _features(features, folder, site)
    if not job.rm.splits:
        console.print("This PM cannot be resumed at a site: ablations run whole forwards with a hook, which is slower.")
    wanted: Any = {p: {side: {site: chosen} for side in SIDES} for p in job.of_split("measure")[:limit]}
    with Bars().stage("ablate") as progress:
        table = ablation_table(job.rm, {site: job.saes[site]}, job.tokens, job.ids, wanted, progress)[site]
    if out is not None:
        write_table(out, table)
    top = table.sort(table["effect"].abs(), descending=True).head(20)
    print_table(f"{table.height} exact ablations at {site}, the largest", top)
    emit(table.to_dicts(), as_json)


def _features(text: str, folder: Path, site: str) -> list[int] | None:
    import polars as pl

    if text == "active":
        return None
    if text.startswith("top:") and text[4:].isdigit():
        table = pl.read_parquet(folder / "features" / f"{site}.parquet")
        return table["feature"].head(int(text[4:])).to_list()
    if all(part.strip().isdigit() for part in text.split(",")):
        return [int(part) for part in text.split(",")]
    raise InputError(f"--features {text} is not known; write active, top:K, or a list such as 12,405,77.")

"""ledger and attribute: what adds up to Δr, and estimates of ablation effects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

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
    print_table,
)
from rmscope.cli.terminal import Bars, console
from rmscope.errors import InputError


def _need(folder: Path, site: str, sites: list[str]) -> None:
    if site not in sites:
        raise InputError(f"The run in {folder} has no SAE at {site}; it has {', '.join(sites)}.")


@app.command()
def ledger(
    folder: Annotated[Path, typer.Argument(help="A run folder.")],
    site: Annotated[str, typer.Option(help="The site, such as resid_post.7.")],
    pair: Annotated[str | None, typer.Option(help="A pair's id: its own ledger, feature by feature.")] = None,
    top: Annotated[int, typer.Option(help="Features of each side that a pair's ledger lists.")] = 15,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Where reward differences come from: features, error, remainder, gap; over the run's pairs, or in one pair."""
    import polars as pl

    job = open_job(folder)
    _need(folder, site, job.sites)
    table = pl.read_parquet(folder / "ledger" / f"{site}.parquet")
    if table.is_empty():
        raise InputError(
            f"The run in {folder} has no ledgers (ledger_pairs: 0); run it again with more: the rest is read back."
        )
    if pair is None:
        return _aggregate(job, table, site, as_json)
    if pair not in set(table["pair"]):
        others = f"{table['pair'][0]} and {table.height - 1} more"
        raise InputError(f"The ledger of {folder} at {site} has no pair {pair}; it has {others}.")

    from rmscope.effects.ledger_summary import pair_features

    contribution = pl.read_parquet(folder / "effects" / site / "contribution.parquet").filter(pl.col("pair") == pair)
    features = pair_features(job.rm, job.saes[site], site, job.tokens[job.index[pair]], contribution, top)
    parts = table.filter(pl.col("pair") == pair).to_dicts()[0]
    print_rows(f"{pair} at {site}", parts)
    print_table("the largest contributions (effect on the side's own reward)", features)
    emit({"ledger": parts, "features": features.to_dicts()}, as_json)


def _aggregate(job: Any, table: Any, site: str, as_json: bool) -> None:
    import numpy as np
    import polars as pl

    from rmscope.effects.ledger_summary import FEWEST, length_groups, share_rows, shares_by

    if table.height < FEWEST:
        raise InputError(
            f"Ledgers of {table.height} pairs give no shares; name a --pair, or run again with more ledger_pairs."
        )
    prompts = [job.prompts[p] for p in table["pair"]]
    lengths = table.select("pair").join(job.scores, on="pair", how="left", maintain_order="left")
    difference = np.asarray((lengths["n_chosen"] - lengths["n_rejected"]).to_list())
    sources = [str(job.pairs[job.index[p]].meta.get("source", "all")) for p in table["pair"]]
    found = {
        "shares": share_rows(table, prompts),
        "by_length": shares_by(table, length_groups(difference), prompts),
        "by_source": shares_by(table, sources, prompts),
    }
    print_rows(f"share of Δr at {site}, {table.height} pairs", {row["part"]: row for row in found["shares"]})
    for name in ("by_length", "by_source"):
        print_table(name.replace("_", " "), pl.DataFrame(found[name]))
    emit({"site": site, "pairs": table.height, **found}, as_json)


@app.command()
def attribute(
    folder: Annotated[Path | None, typer.Argument(help="A run folder; or name --model, --data and --sae.")] = None,
    site: Annotated[str | None, typer.Option(help="The site; left out, the SAE's own.")] = None,
    method: Annotated[
        str, typer.Option(help="atp (clean point), midpoint (dearer, closer), or ig (contributions).")
    ] = "atp",
    model: Annotated[str | None, typer.Option(help="Hub id, folder, or zoo:hh / zoo:planted.")] = None,
    data: Annotated[str | None, typer.Option(help="Pairs: a file, a hub id, or demo:planted.")] = None,
    sae: Annotated[Path | None, typer.Option(help="An SAE's folder or file.")] = None,
    limit: Annotated[int, typer.Option(help="Pairs; of a run, from its measure split.")] = 64,
    out: Annotated[Path | None, typer.Option(help="Write the table to this Parquet file.")] = None,
    adapter: Adapter = None,
    output: Output = None,
    trust_remote_code: Trust = False,
    device: Device = "auto",
    dtype: Dtype = "float32",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Estimated ablation effects of every active feature, from gradients; a run's come with their trust score."""
    import polars as pl

    from rmscope.api import attribute as attribute_
    from rmscope.io import write_table

    trust = None
    if folder is not None:
        job = open_job(folder)
        site = site or job.sites[0]
        _need(folder, site, job.sites)
        rm, used, pairs = job.rm, job.saes[site], [job.pairs[i] for i in job.of_split("measure")[:limit]]
        if method == job.config.estimate and (path := folder / "effects" / site / "trust.json").is_file():
            trust = json.loads(path.read_text("utf-8"))
    elif model and data and sae:
        rm, used, pairs = _brought(model, data, sae, limit, pm_options(dtype, device, adapter, output, trust_remote_code))
    else:
        raise InputError("attribute needs a run folder, or --model, --data and --sae; name one or the other.")
    with Bars().stage("attribute") as progress:
        table = attribute_(rm, used, pairs, method, site, progress)  # type: ignore[arg-type]
    if out is not None:
        write_table(out, table)
    means = (
        table.group_by("feature").agg(pl.col("effect").mean(), pl.len().alias("responses"))
        .sort(pl.col("effect").abs(), "feature", descending=[True, False])
    )  # fmt: skip
    print_table(f"{table.height} effects ({method}), the largest means where a feature fires", means.head(20))
    if trust is not None:
        print_rows("how far these estimates can be trusted", trust)
    elif method != "ig":
        console.print("These are estimates without a trust score; claim only what rmscope ablate confirms.")
    emit({"method": method, "trust": trust, "features": means.to_dicts()}, as_json)


def _brought(model: str, data: str, sae: Path, limit: int, options: dict[str, Any]) -> tuple[Any, Any, list[Any]]:
    from rmscope.model.reward_model import RewardModel
    from rmscope.pairs.readers import load_pairs
    from rmscope.sae import Sae

    pairs = load_pairs(data, limit=limit)
    rm, used = RewardModel.load(model, **options), Sae.load(sae)
    if used.d != rm.d_model:
        raise InputError(
            f"The SAE at {sae} reads {used.d} dimensions, the PM's stream has {rm.d_model}; name one trained on it."
        )
    kept = [p for p, t in zip(pairs, rm.tokenize_all(pairs), strict=True) if rm.fits(t)]
    return rm, used, kept

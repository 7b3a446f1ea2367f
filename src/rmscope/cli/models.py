"""score, doctor and train-pm: a PM by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from rmscope.cli.base import (
    Adapter,
    BadRow,
    Columns,
    Data,
    Debug,
    Device,
    Dtype,
    Format,
    Json,
    Limit,
    Model,
    Output,
    Trust,
    app,
    columns_of,
    emit,
    pm_options,
    print_rows,
)
from rmscope.cli.terminal import Bars, console

PAIRS = 64
"""Pairs that doctor looks at."""
OTHER = {"float32": "bfloat16", "bfloat16": "float32", "float16": "float32"}
"""The precision that doctor sets beside the one asked for."""


@app.command()
def score(
    model: Model,
    data: Data,
    limit: Limit = None,
    out: Annotated[Path | None, typer.Option(help="Write a row a pair to this Parquet file.")] = None,
    on_bad_row: BadRow = None,
    columns: Columns = None,
    form: Format = None,
    adapter: Adapter = None,
    output: Output = None,
    trust_remote_code: Trust = False,
    device: Device = "auto",
    dtype: Dtype = "float32",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Rewards of both sides of every pair; accuracy with its interval beside the length-only baseline."""
    import polars as pl

    from rmscope.io import write_table
    from rmscope.model.reward_model import RewardModel
    from rmscope.pairs.readers import ReadReport, load_pairs
    from rmscope.run.evidence import score_data

    report = ReadReport()
    pairs = load_pairs(
        data,
        limit=limit,
        columns=columns_of(columns),
        form=form,
        on_bad_row=on_bad_row or "error",  # type: ignore[arg-type]
        report=report,
    )
    rm = RewardModel.load(model, **pm_options(dtype, device, adapter, output, trust_remote_code))
    tokens = rm.tokenize_all(pairs)
    kept = [i for i, t in enumerate(tokens) if rm.fits(t)]
    with Bars().stage("score") as progress:
        scores = rm.score_tokens([tokens[i] for i in kept], progress)
    table = pl.DataFrame(
        {
            "pair": [pairs[i].id for i in kept],
            "chosen": scores.chosen.numpy(),
            "rejected": scores.rejected.numpy(),
            "delta": scores.delta.numpy(),
            "n_chosen": [tokens[i].chosen.numel() for i in kept],
            "n_rejected": [tokens[i].rejected.numel() for i in kept],
        }
    )
    if out is not None:
        write_table(out, table)
    prompts = {p.id: str(p.meta.get("group", p.first_human_turn())) for p in pairs}
    figures = {k: v for k, v in score_data(table, prompts).items() if k != "histogram"}
    figures |= {"format": report.format, "pairs": len(kept), "too_long": len(pairs) - len(kept)}
    print_rows(f"{model} on {data}", figures)
    emit(figures, as_json)


@app.command()
def doctor(
    model: Annotated[str, typer.Argument(help="Hub id, folder, or zoo:hh / zoo:planted.")],
    data: Annotated[str, typer.Option(help="Pairs to check it on, best as it was trained on.")] = "demo:plain",
    columns: Columns = None,
    form: Format = None,
    adapter: Adapter = None,
    output: Output = None,
    trust_remote_code: Trust = False,
    device: Device = "auto",
    dtype: Dtype = "float32",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Preflight of a PM: a row a check with ok, warn or fail, and the mend."""
    from rmscope.model.doctor import examine
    from rmscope.model.reward_model import RewardModel
    from rmscope.pairs.readers import load_pairs

    pairs = load_pairs(data, limit=PAIRS, columns=columns_of(columns), form=form)
    options = pm_options(dtype, device, adapter, output, trust_remote_code)
    rm = RewardModel.load(model, **options)
    other = RewardModel.load(model, **{**options, "dtype": OTHER[dtype]})
    with Bars().stage("doctor") as progress:
        found = examine(rm, pairs, other, progress)
    table = Table(title=f"{model}: {len(rm.blocks)} blocks, d_model {rm.d_model}", title_justify="left")
    for name in ("check", "status", "detail", "mend"):
        table.add_column(name)
    colour = {"ok": "green", "warn": "yellow", "fail": "red"}
    for row in found.rows():
        table.add_row(row["check"], f"[{colour[row['status']]}]{row['status']}", escape(row["detail"]), escape(row["mend"]))
    console.print(table)
    emit(
        {"model": model, "identity": rm.identity, "noise_floor": found.noise_floor, "checks": found.rows()},
        as_json,
    )
    if any(row["status"] == "fail" for row in found.rows()):
        raise typer.Exit(1)


@app.command("train-pm")
def train_pm_command(
    config: Annotated[Path, typer.Argument(help="A recipe, such as configs/train-trl.yaml.")],
    out: Annotated[Path, typer.Option(help="Folder for the PM, its settings and its card.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Trains a PM by a recipe, with our own loop or TRL's; a killed training goes on from its checkpoint."""
    from rmscope.model.training.held_out import measure
    from rmscope.model.training.recipe import TrlRecipe, read_recipe

    recipe = read_recipe(config)
    with Bars().stage("train") as progress:
        if isinstance(recipe, TrlRecipe):
            from rmscope.model.training.trl import train_trl

            figures: dict[str, Any] = dict(train_trl(recipe, out, progress))
        else:
            from rmscope.model.training.loop import train_pm

            figures = dict(train_pm(recipe, out, progress))
    with Bars().stage("measure") as progress:
        figures |= measure(out, recipe, progress)
    print_rows(f"{recipe.name} in {out}", figures)
    emit(figures, as_json)

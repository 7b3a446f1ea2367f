"""gate: for the CI of a PM's owner."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from rmscope.cli.base import Debug, Device, Dtype, Json, Output, Trust, app, emit, pm_options, print_table
from rmscope.cli.terminal import Bars, console
from rmscope.errors import InputError


@app.command()
def gate(
    base: Annotated[str, typer.Argument(help="The PM as it was: hub id, folder, or zoo:NAME.")],
    new: Annotated[str, typer.Argument(help="The PM as it is to be, or a patch of BASE.")],
    concepts: Annotated[
        Path | None, typer.Option(help="YAML: rows of a name and texts; left out, the six cues of the zoo.")
    ] = None,
    bound: Annotated[float, typer.Option(help="How far a concept may move, in SD(Δr).")] = 0.25,
    data: Annotated[str | None, typer.Option(help="Pairs whose responses carry the concepts; left out, the demo's.")] = None,
    limit: Annotated[int | None, typer.Option(help="At most this many of them, from the start.")] = None,
    seed: Annotated[int, typer.Option(help="Fixes every draw.")] = 0,
    output: Output = None,
    trust_remote_code: Trust = False,
    device: Device = "auto",
    dtype: Dtype = "float32",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fails (exit code 1) where the reward of a named concept moved by more than a bound between two versions of a PM."""
    import polars as pl

    from rmscope.model.reward_model import RewardModel
    from rmscope.pairs.demo import plain_demo_pairs
    from rmscope.pairs.readers import load_pairs
    from rmscope.studies.edit.gate import LEVEL, measure, read_concepts, verdicts
    from rmscope.studies.edit.patch import is_patch, load_edited

    started, options = time.time(), pm_options(dtype, device, None, output, trust_remote_code)
    if not bound >= 0:
        raise InputError(f"--bound {bound} is no bound; give a number of SD(Δr), 0 or more.")
    named, pairs = read_concepts(concepts), load_pairs(data, limit=limit) if data else plain_demo_pairs()[:limit]

    def measured(name: str, patch: str | None) -> dict[str, Any]:
        rm = RewardModel.load(name, **options)
        if patch is not None:
            load_edited(rm, patch)
        with Bars().stage(patch or name) as progress:
            return measure(rm, named, pairs, seed, progress)

    before = measured(base, None)
    after = measured(base, new) if is_patch(new) else measured(new, None)
    rows = verdicts(before, after, bound, seed)
    shown = [{**row, "move": row["move"]["value"], "low": row["move"]["low"], "high": row["move"]["high"]} for row in rows]
    columns = ("concept", "prompts", "base", "new", "move", "low", "high", "holm", "moved")
    print_table("what each concept does to the reward, in SD(Δr)", pl.DataFrame(shown).select(columns))
    moved = [row["concept"] for row in rows if row["moved"]]
    if moved:
        console.print(f"{', '.join(moved)} moved by more than {bound:g} SD(Δr) (sign flips, Holm, p < {LEVEL}).")
    else:
        console.print(f"No concept is shown to have moved by more than {bound:g} SD(Δr).")
    result = {"base": base, "new": new, "bound": bound, "passed": not moved, "moved": moved, "concepts": rows}
    emit({**result, "seconds": round(time.time() - started, 1)}, as_json)
    if moved:
        raise typer.Exit(1)

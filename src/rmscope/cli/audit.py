"""audit: does rmscope find what was planted?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from rmscope.cli.base import Debug, Json, Seed, app, emit, print_rows
from rmscope.cli.terminal import Bars, console


@app.command()
def audit(
    plants: Annotated[Path, typer.Argument(help="A plants file, such as configs/audit/standard.yaml.")],
    pairs: Annotated[str, typer.Option(help="The text that cues are planted into: a pairs file, a hub id, or demo:plain.")],
    out: Annotated[Path, typer.Option(help="The folder of the audit.")],
    base: Annotated[str, typer.Option(help="What the PM is trained from: zoo:smollm2 or a folder.")] = "zoo:smollm2",
    limit: Annotated[int, typer.Option(help="At most this many pairs, from the start.")] = 800,
    max_tokens: Annotated[int, typer.Option(help="Pairs with a longer side are left out.")] = 110,
    copies: Annotated[int, typer.Option(help="How often each pair is planted anew.")] = 4,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Also shuffled labels, random weights, decoy cues: three times the work.")
    ] = False,
    recipe: Annotated[Path | None, typer.Option(help="A YAML file of changes to how the PM is trained.")] = None,
    settings: Annotated[Path | None, typer.Option("--run", help="A YAML file of changes to the run's settings.")] = None,
    seed: Seed = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Plants biases, trains a PM on them, runs the whole pipeline without telling it, and counts what it found."""
    from rmscope.studies.audit.analyse import AuditConfig
    from rmscope.studies.audit.analyse import audit as run_audit

    config = AuditConfig(
        plants=plants, pairs=pairs, out=out, base=base, limit=limit, max_tokens=max_tokens, copies=copies, seed=seed,
        calibrate=calibrate, recipe=recipe, run=settings,
    )  # fmt: skip
    result = run_audit(config, Bars())
    _show(result)
    emit(result, as_json)


def _show(result: dict[str, Any]) -> None:
    table = Table(title="planted biases", title_justify="left")
    for name in ("", "bias", "kind", "dose", "effect / SD(Δr)", "the PM", "found as", "rank", "F1", "mediated", "group"):
        table.add_column(name)
    for row in result["plants"]:
        status = "learned" if row["learned"] else "clean null" if row["null"] else "neither"
        good = not row["matched_by"] if row["null"] else row["found"]
        where = f"{row['hit']} {row['features']} at {row['site']}" if row["found"] else row["why"]
        if row["null"]:
            where = "reported all the same" if row["matched_by"] else "not reported"
        table.add_row(
            "[green]✓" if good else "[red]✗" if row["learned"] or row["null"] else "",
            row["name"],
            row["kind"],
            f"{row['dose']:.2f}",
            f"{row['ate_sd']:+.2f}",
            status,
            where,
            str(row["rank"] or ""),
            "" if row["f1"] is None else f"{row['f1']:.2f}",
            f"{row['mediated']['value']:.0%}" if row["mediated"] else "",
            f"{len(group['features'])}: {group['mediated']['value']:.0%}" if (group := row["group"]) else "",
        )
    console.print(table)
    figures = {k: v for k, v in result.items() if isinstance(v, dict) and "low" in v}
    shown = {k: v if v["value"] is not None else "nothing to count" for k, v in figures.items()}
    print_rows("the audit", {**shown, "seconds": result["seconds"], "peak GB": result["peak_gb"]})

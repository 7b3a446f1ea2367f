"""evaluate: SAEs side by side on held-out pairs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from rmscope.cli.base import Adapter, Debug, Device, Dtype, Json, Output, Trust, app, emit, open_job, pm_options
from rmscope.cli.terminal import Bars, console
from rmscope.errors import InputError


@app.command()
def evaluate(
    folder: Annotated[Path | None, typer.Argument(help="A run folder: its SAEs on its measure split.")] = None,
    model: Annotated[str | None, typer.Option(help="Without a run: hub id, folder, or zoo:hh / zoo:planted.")] = None,
    data: Annotated[str | None, typer.Option(help="Without a run: pairs that the SAEs have not seen.")] = None,
    sae: Annotated[list[Path] | None, typer.Option(help="An SAE, or a folder of SAEs; may be given several times.")] = None,
    site: Annotated[str | None, typer.Option(help="The site of SAEs that name none, such as resid_post.7.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most this many pairs, of different prompts while they last.")] = 128,
    curves: Annotated[
        bool, typer.Option("--curves", help="Of a run: also keep K and ablate K with their controls, for its report.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for evaluation.parquet and evaluation.html.")] = None,
    adapter: Adapter = None,
    output: Output = None,
    trust_remote_code: Trust = False,
    device: Device = "auto",
    dtype: Dtype = "float32",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """SAEs side by side: L0, FVU, cosine, dead share, and how much of the reward difference their splice keeps."""
    import numpy as np

    from rmscope.evaluation.reconstruction import as_table
    from rmscope.evaluation.reconstruction import evaluate as measure
    from rmscope.io import write_table, write_text
    from rmscope.studies.evaluate.page import render_evaluation

    if curves and folder is None:
        raise InputError("Curves need a run folder, whose fit split chooses the features; name one.")
    study = _study(folder, model, data, pm_options(dtype, device, adapter, output, trust_remote_code))
    saes = dict(study.saes) if folder is not None else {}
    for at, one in saes.items():
        one.site = at
    saes |= _opened(sae or [], site)
    if not saes:
        raise InputError("There is no SAE to evaluate; name a run folder, or --sae DIR (several times to compare).")
    for name, one in saes.items():
        study.rm.site_index(one.site)
        if one.d != study.rm.d_model:
            raise InputError(
                f"The SAE at {name} reads {one.d} dimensions, the PM's stream has {study.rm.d_model}; "
                "name an SAE that was trained on this PM."
            )
    pairs = study.of_split("measure") if folder is not None else range(len(study.pairs))
    kept = study.one_a_prompt(pairs, limit)
    prompts = [study.prompts[study.ids[i]] for i in kept]
    with Bars().stage("evaluate") as progress:
        found = measure(study.rm, saes, [study.tokens[i] for i in kept], prompts, progress)
    _print(found)
    if out is not None:
        write_table(out / "evaluation.parquet", as_table(found))
        c = study.config
        write_text(out / "evaluation.html", render_evaluation(found, c.model, c.data, len(np.unique(prompts))))
    if curves and folder is not None:
        _curves(study, folder, kept)
    emit([e.row() for e in found], as_json)


def _curves(run: Any, folder: Path, kept: Sequence[int]) -> None:
    """effects/SITE/explained.json of each site: lists from the fit split, figures from the given pairs."""
    from rmscope.evaluation.explained import FrozenSelection, SelectSplit, explain
    from rmscope.io import write_json

    fit = run.of_split("fit")
    prompts = [run.prompts[run.ids[i]] for i in kept]
    stored = [run.prompts[run.ids[i]] for i in fit]
    select = SelectSplit(run.store, [run.tokens[i] for i in fit], stored, range(len(fit)))
    for site in run.sites:
        with Bars().stage(site) as progress:
            lists = FrozenSelection(run.rm, site, run.saes[site], select, prompts, progress)
            found = explain(run.rm, site, lists, [run.tokens[i] for i in kept], prompts, progress)
        write_json(folder / "effects" / site / "explained.json", found)
    console.print(f"The curves stand in effects/; rmscope report {folder} shows them.")


def _study(folder: Path | None, model: str | None, data: str | None, options: dict[str, Any]) -> Any:
    from rmscope.run.settings import read_config
    from rmscope.run.study import Study

    if folder is not None:
        return open_job(folder)
    if model is None or data is None:
        raise InputError("There is nothing to measure on; name a run folder, or both --model and --data.")
    return Study(read_config(None, {"model": model, "data": data, "out": Path(), **options}))


def _opened(folders: Sequence[Path], site: str | None) -> dict[str, Any]:
    """SAEs by the path that names them; a folder of SAEs stands for those in its subfolders."""
    from rmscope.sae.base import Sae

    saes: dict[str, Sae] = {}
    for folder in folders:
        inside = [] if (folder / "cfg.json").exists() else sorted(p.parent for p in folder.glob("*/cfg.json"))
        for path in inside or [folder]:
            saes[str(path)] = one = Sae.load(path)
            one.site = one.site or site or ""
            if not one.site:
                raise InputError(f"The SAE at {path} does not say which site it was trained on; pass --site.")
    return saes


def _print(found: Sequence[Any]) -> None:
    table = Table(title=f"{len(found[0].delta)} pairs, {found[0].tokens} tokens; 95 % intervals", title_justify="left")
    for column in ("sae", "L0", "FVU", "cosine", "norm ratio", "dead", "recovered", "delta_r2", "scaled", "agreement"):
        table.add_column(column, justify="left" if column == "sae" else "right")
    for e in found:
        cells = [f"{f.value:.3f}\n[dim]{f.low:.3f} {f.high:.3f}" for f in e.figures.values()]
        label = f"{e.name}\n[dim]{e.site} {e.architecture} {e.m}"
        table.add_row(label, *cells[:4], f"{e.dead:.1%}", *cells[4:])
    console.print(table)

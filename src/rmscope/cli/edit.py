"""edit: mends a PM by editing features, and says what that changes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rmscope.cli.base import Debug, Json, app, emit, open_job, print_table
from rmscope.cli.terminal import Bars, console
from rmscope.errors import InputError

if TYPE_CHECKING:
    from rmscope.pairs.plants import Plant
    from rmscope.planted.twins import Twin
    from rmscope.studies.edit.choice import Choice
    from rmscope.studies.edit.patch import EditPatch, FeatureEdit


@app.command()
def edit(
    folder: Annotated[Path, typer.Argument(help="A run folder.")],
    out: Annotated[Path, typer.Option(help="Write the patch to this folder.")],
    site: Annotated[str | None, typer.Option(help="The site, such as resid_post.7; with --cue only this one.")] = None,
    features: Annotated[str | None, typer.Option(help="The features to edit, such as 12,405,77.")] = None,
    cue: Annotated[
        list[str] | None, typer.Option(help="Instead of naming features: the cue whose effect is to go; several times.")
    ] = None,
    concepts: Annotated[
        Path | None, typer.Option(help="The cues, as rmscope gate reads them; left out, the six of the zoo.")
    ] = None,
    suppress: Annotated[bool, typer.Option("--suppress", help="f := 0, which is also the default.")] = False,
    clamp: Annotated[float | None, typer.Option(help="f := this, at every token.")] = None,
    damp: Annotated[float | None, typer.Option(help="f := this times f; below 0 turns its effect around.")] = None,
    export: Annotated[
        Path | None, typer.Option(help="Also write a folder for plain transformers; it carries code (trust_remote_code).")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Measure before and after: cues, accuracy, drift.")] = False,
    pairs: Annotated[str | None, typer.Option(help="With --check: also on these pairs, a file or a hub id.")] = None,
    limit: Annotated[int, typer.Option(min=2, help="At most this many of them.")] = 300,
    rm_bench: Annotated[Path | None, typer.Option(help="With --check: also RM-Bench by style, from this file.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Suppresses, clamps or damps features of a run's SAEs, the SAE's error kept; saves a patch for rs.load_edited."""
    from rmscope.studies.edit.choice import joined
    from rmscope.studies.edit.export import export as write_export
    from rmscope.studies.edit.gate import read_concepts
    from rmscope.studies.edit.patch import EditPatch

    started = time.time()
    if (pairs or rm_bench) and not check:
        raise InputError("--pairs and --rm-bench are measured with --check; add it.")
    job, plants = open_job(folder), read_concepts(concepts)
    if site is not None and site not in job.sites:
        raise InputError(f"The run in {folder} has no SAE at {site}; it has {', '.join(job.sites)}.")
    chosen: list[tuple[str, Choice, dict[str, list[Twin]]]] = []
    if cue:
        if features or suppress or clamp is not None or damp is not None:
            raise InputError("--cue chooses features and factor by rule; leave out --features and the operation.")
        chosen = _by_rule(job, site, _named(plants, cue))
        edits = joined([choice.edit for _, choice, _ in chosen])
    else:
        edits = (_by_hand(site, features, suppress, clamp, damp),)
    used = {e.site: job.saes[e.site] for e in edits}
    patch = EditPatch(edits, used, job.rm.identity, job.config.model)
    patch.save(out)
    if export is not None:
        write_export(job.rm, patch, export)
        console.print(f"{export} holds code of its own; transformers opens it with trust_remote_code=True only.")
    found = _check(job, patch, plants, [t for _, _, t in chosen], pairs, limit, rm_bench) if check else None
    by_cue = [{"cue": name, **_row(c.edit), "left": c.left, "loss": c.loss} for name, c, _ in chosen]
    for e in edits:
        what = e.operation if e.operation == "suppress" else f"{e.operation} {e.value:g}"
        console.print(f"{e.site}: {what} {', '.join(map(str, e.features))}")
    console.print(f"The patch stands in {out}: rs.load_edited({job.config.model!r}, {str(out)!r})")
    seconds = round(time.time() - started, 1)
    edited = [_row(e) for e in edits]
    emit({"patch": str(out), "edits": edited, "chosen": by_cue, "check": found, "seconds": seconds}, as_json)


def _row(edit: FeatureEdit) -> dict[str, Any]:
    return {"site": edit.site, "operation": edit.operation, "value": edit.value, "features": list(edit.features)}


def _by_hand(site: str | None, features: str | None, suppress: bool, clamp: float | None, damp: float | None) -> FeatureEdit:
    from rmscope.studies.edit.patch import FeatureEdit

    if site is None or features is None:
        raise InputError("There is nothing to edit; name --site and --features, or a --cue.")
    parts = [part.strip() for part in features.split(",")]
    if not all(part.isdigit() for part in parts):
        raise InputError(f"--features {features} is no list of features; write one such as 12,405,77.")
    if suppress + (clamp is not None) + (damp is not None) > 1:
        raise InputError("One patch does one thing to its features; choose one of --suppress, --clamp and --damp.")
    named = tuple(int(part) for part in parts)
    if clamp is not None:
        return FeatureEdit(site, named, "clamp", clamp)
    return FeatureEdit(site, named) if damp is None else FeatureEdit(site, named, "damp", damp)


def _named(plants: Sequence[Plant], names: Sequence[str]) -> list[Plant]:
    known = {p.name: p for p in plants}
    if missing := [n for n in names if n not in known]:
        raise InputError(f"There is no cue {missing[0]}; known are {', '.join(known)}.")
    return [known[n] for n in dict.fromkeys(names)]


def _by_rule(job: Any, site: str | None, plants: Sequence[Plant]) -> list[tuple[str, Choice, dict[str, list[Twin]]]]:
    """Each cue's name, its edit chosen on prompts of the fit split, and the twins that it was chosen on."""
    from rmscope.studies.edit.choice import choose, fitting_twins

    saes = job.saes if site is None else {site: job.saes[site]}
    found = []
    for plant in plants:
        with Bars().stage(plant.name) as progress:
            prepared = fitting_twins(job.rm, saes, plant, job.config.seed, progress)
            found.append((plant.name, choose(job.rm, saes, prepared, progress)[0], prepared))
    return found


def _check(
    job: Any,
    patch: EditPatch,
    plants: Sequence[Plant],
    fitted: Sequence[dict[str, list[Twin]]],
    pairs: str | None,
    limit: int,
    rm_bench: Path | None,
) -> dict[str, Any]:
    """The before/after tables, printed and returned."""
    from rmscope.pairs.readers import load_pairs
    from rmscope.studies.edit import check

    variants = check.variants(job, patch, fitted)
    sets = check.own_pairs(job)
    if pairs is not None:
        sets[pairs] = load_pairs(pairs, limit=limit)
    bench = load_pairs(rm_bench) if rm_bench is not None else []
    with Bars().stage("check") as progress:
        found = check.before_after(job.rm, variants, plants, sets, bench, job.sd, job.config.seed, progress)
    _print(found)
    return found


def _print(found: dict[str, Any]) -> None:
    import polars as pl

    def cell(figure: dict[str, float], digits: int = 3) -> str:
        return f"{figure['value']:.{digits}f} [{figure['low']:.{digits}f}, {figure['high']:.{digits}f}]"

    def rows(part: dict[str, Any], columns: Sequence[str]) -> Any:
        return pl.DataFrame([{"variant": v, **{c: cell(row[c]) for c in columns}} for v, row in part.items()])

    for name, part in found["cues"].items():
        print_table(f"{name}: what the cue does to the reward, and how much of it is gone", rows(part, ("ate", "gone")))
    for name, part in found["pairs"].items():
        columns = ("accuracy", "fall", "drift", "correlation")
        print_table(f"{name}: accuracy, how far it falls, and drift in SD(Δr)", rows(part, columns))
    if found["styles"]:
        table = [
            {"chosen": r["chosen"], "rejected": r["rejected"], "pairs": r["pairs"], "before": cell(r["before"]["accuracy"]),
             "after": cell(r["edit"]["accuracy"]), "fall": cell(r["edit"]["fall"])}
            for r in found["styles"]
        ]  # fmt: skip
        print_table("RM-Bench by style: accuracy before and after, and its fall", pl.DataFrame(table))

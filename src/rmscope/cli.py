"""The command line. Results on stdout, progress and tables on stderr; exit codes: 0 done, 1 failed, 2 bad usage or input."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from rmscope.errors import InputError
from rmscope.terminal import Bars, closing, console

app = typer.Typer(
    name="rmscope",
    help="A microscope for preference models: what a reward model rewards, proven by exact removal.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

DEMO_SAE = {"k": 16, "tokens": 500_000}
"""The demo's text is small (70,000 tokens): at k 32 a cue is spread over many features, at 8 the screen is less true."""

Model = Annotated[str, typer.Option(help="Hub id, folder, or zoo:hh / zoo:planted.")]
Data = Annotated[str, typer.Option(help="Pairs: a file, a hub id, or demo:planted.")]
Limit = Annotated[int | None, typer.Option(help="At most this many pairs, from the start.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, or auto.")]
Dtype = Annotated[str, typer.Option(help="float32 (effects need it), bfloat16 or float16.")]
Seed = Annotated[int | None, typer.Option(help="Fixes every draw.")]
Json = Annotated[bool, typer.Option("--json", help="One machine-readable result on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
BadRow = Annotated[str | None, typer.Option("--on-bad-row", help="error, or skip: counted, listed, left out.")]
Columns = Annotated[str | None, typer.Option(help="Own column names: prompt=question,chosen=a,rejected=b.")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The run folder.")] = Path("demo"),
    device: Device = "auto",
    dtype: Dtype = "float32",
    seed: Seed = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """The main job on the embedded PM with six planted biases: what it rewards, the proof, the ground truth beside it."""
    flags = {"model": "zoo:planted", "data": "demo:planted", "out": out, "device": device, "dtype": dtype, "seed": seed}
    _run(None, {**flags, "sae": DEMO_SAE}, as_json)


@app.command()
def run(
    config: Annotated[Path | None, typer.Argument(help="A YAML file of settings; flags override it.")] = None,
    model: Annotated[str | None, typer.Option(help="Hub id, folder, or zoo:hh / zoo:planted.")] = None,
    data: Annotated[str | None, typer.Option(help="Pairs: a file, a hub id, or demo:planted.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run folder.")] = None,
    limit: Limit = None,
    split: Annotated[str | None, typer.Option(help="Split of a hub dataset.")] = None,
    sites: Annotated[str | None, typer.Option(help="Sites, comma-separated: resid_post.3,resid_post.7.")] = None,
    architecture: Annotated[
        str | None, typer.Option(help="SAE family: topk, batchtopk, matryoshka, jumprelu, gated, standard.")
    ] = None,
    d_sae: Annotated[int | None, typer.Option(help="Features of an SAE.")] = None,
    k: Annotated[int | None, typer.Option(help="Features that fire on a token (topk).")] = None,
    sae_tokens: Annotated[int | None, typer.Option(help="Training tokens of an SAE.")] = None,
    sae: Annotated[Path | None, typer.Option(help="Bring your own SAEs: a folder with one subfolder a site.")] = None,
    adapter: Annotated[str | None, typer.Option(help="A PEFT adapter to put on the PM.")] = None,
    on_bad_row: BadRow = None,
    columns: Columns = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be done, and about how long it takes.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, or auto.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 (effects need it), bfloat16 or float16.")] = None,
    seed: Seed = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """The main job on your own PM and pairs: score, harvest, train SAEs, screen, remove exactly, rank, account, report."""
    sae_flags = {"architecture": architecture, "d_sae": d_sae, "k": k, "tokens": sae_tokens, "seed": seed}
    flags = {
        "model": model, "data": data, "out": out, "limit": limit, "split": split, "adapter": adapter, "device": device,
        "dtype": dtype, "seed": seed, "on_bad_row": on_bad_row, "sae_dir": sae, "columns": _columns(columns),
        "sites": sites.split(",") if sites else None,
        "sae": {key: value for key, value in sae_flags.items() if value is not None},
    }  # fmt: skip
    _run(config, flags, as_json, dry_run)


def _columns(text: str | None) -> dict[str, str] | None:
    if text is None:
        return None
    pairs = [part.split("=", 1) for part in text.split(",")]
    if any(len(pair) != 2 for pair in pairs):
        raise InputError(f"--columns {text} is not of the form prompt=question,chosen=a,rejected=b; write it so.")
    return {key.strip(): value.strip() for key, value in pairs}


def _run(config: Path | None, flags: dict[str, Any], as_json: bool, dry_run: bool = False) -> None:
    from rmscope.config import read_config
    from rmscope.run import Run

    job = Run(read_config(config, flags), Bars())
    if dry_run:
        plan = job.plan()
        _print_rows("what would be done", plan)
        return _emit(plan, as_json)
    data = job.go()
    closing(data, str(job.folder / "report.html"))
    _emit(summary(data, job.folder), as_json)


def summary(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The machine-readable result of a run: figures and reported features without their texts."""
    kept = ("feature", "rank", "mean_removal", "ci_low", "ci_high", "q", "n", "flags")
    return {
        "run": str(folder),
        "scores": {k: v for k, v in data["scores"].items() if k != "histogram"},
        "sites": [
            {
                "site": s["site"],
                "trust": s["trust"],
                "shares": s["ledger"]["shares"],
                "reported": [{k: f[k] for k in kept} for f in s["features"] if f["reported"]],
            }
            for s in data["sites"]
        ],
        "planted": data["planted"],
        "seconds": round(data["footer"]["seconds"], 1),
    }


@app.command()
def score(
    model: Model,
    data: Data,
    limit: Limit = None,
    out: Annotated[Path | None, typer.Option(help="Write a row a pair to this Parquet file.")] = None,
    on_bad_row: BadRow = None,
    columns: Columns = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Rewards of both sides of every pair; accuracy with its interval beside the length-only baseline."""
    import polars as pl

    from rmscope.files import write_table
    from rmscope.model.reward_model import RewardModel
    from rmscope.pairs.readers import load_pairs
    from rmscope.report.build import score_data

    pairs = load_pairs(data, limit=limit, columns=_columns(columns), on_bad_row=on_bad_row or "error")  # type: ignore[arg-type]
    rm = RewardModel.load(model, dtype, device)
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
    figures |= {"pairs": len(kept), "too_long": len(pairs) - len(kept)}
    _print_rows(f"{model} on {data}", figures)
    _emit(figures, as_json)


@app.command()
def remove(
    folder: Annotated[Path, typer.Argument(help="A run folder.")],
    site: Annotated[str, typer.Option(help="The site, such as resid_post.7.")],
    features: Annotated[str, typer.Option(help="active, top:K, or a list such as 12,405,77.")] = "top:10",
    limit: Annotated[int, typer.Option(help="Pairs of the measure split.")] = 8,
    out: Annotated[Path | None, typer.Option(help="Write the table to this Parquet file.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Exact removal effects of features on fresh pairs of a run (its measure split)."""
    from rmscope.effects.tables import removal_table
    from rmscope.files import write_table
    from rmscope.pairs.pair import SIDES

    job = _open(folder)
    if site not in job.sites:
        raise InputError(f"The run in {folder} has no SAE at {site}; it has {', '.join(job.sites)}.")
    chosen = _features(features, folder, site)
    wanted: Any = {p: {side: {site: chosen} for side in SIDES} for p in job.of_split("measure")[:limit]}
    with Bars().stage("remove") as progress:
        table = removal_table(job.rm, {site: job.saes[site]}, job.tokens, job.ids, wanted, progress)[site]
    if out is not None:
        write_table(out, table)
    top = table.sort(table["effect"].abs(), descending=True).head(20)
    _print_table(f"{table.height} exact removals at {site}, the largest", top)
    _emit(table.to_dicts(), as_json)


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


def _open(folder: Path) -> Any:
    """A run folder with the settings that it was made with."""
    import yaml

    from rmscope.config import read_config
    from rmscope.run import Run

    if not (folder / "run.yaml").is_file():
        raise InputError(f"{folder} is no run folder (it holds no run.yaml); make one with rmscope run.")
    stored = yaml.safe_load((folder / "run.yaml").read_text("utf-8"))
    return Run(read_config(None, {**stored["config"], "out": folder}), Bars())


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A run folder.")], as_json: Json = False, debug: Debug = False
) -> None:
    """Makes report.html anew from a run folder; stages that are missing are done first."""
    job = _open(folder)
    data = job.go()
    closing(data, str(job.folder / "report.html"))
    _emit(summary(data, job.folder), as_json)


@app.command()
def doctor(
    model: Annotated[str, typer.Argument(help="Hub id, folder, or zoo:hh / zoo:planted.")],
    data: Annotated[str, typer.Option(help="Pairs to check it on.")] = "demo:planted",
    device: Device = "auto",
    dtype: Dtype = "float32",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Preflight of a PM: head, rendering, read position, batch dependence, precision, sites."""
    from rmscope.model.preflight import preflight
    from rmscope.model.reward_model import RewardModel
    from rmscope.pairs.readers import load_pairs

    rm = RewardModel.load(model, dtype, device)
    pairs = load_pairs(data, limit=64)
    found = preflight(rm, [t for t in rm.tokenize_all(pairs) if rm.fits(t)])
    table = Table(title=f"{model}: {len(rm.blocks)} blocks, d_model {rm.d_model}", title_justify="left")
    for name in ("check", "status", "detail"):
        table.add_column(name)
    colour = {"ok": "green", "warn": "yellow", "fail": "red"}
    for row in found.rows():
        table.add_row(row["check"], f"[{colour[row['status']]}]{row['status']}", row["detail"])
    table.add_row(
        "sites",
        "[green]ok",
        f"embed, resid_post.0 .. resid_post.{len(rm.blocks) - 1}; default {', '.join(rm.default_sites)}",
    )
    console.print(table)
    _emit(
        {"model": model, "identity": rm.identity, "noise_floor": found.noise_floor, "checks": found.rows()},
        as_json,
    )
    if any(row["status"] == "fail" for row in found.rows()):
        raise typer.Exit(1)


@app.command("train-pm")
def train_pm_command(
    config: Annotated[Path, typer.Argument(help="A recipe, such as configs/zoo-hh.yaml.")],
    out: Annotated[Path, typer.Option(help="Folder for adapter, head and settings.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Trains a PM on the zoo's base by a recipe; a killed training goes on from its checkpoint."""
    from rmscope.model.train import read_recipe, train_pm

    recipe = read_recipe(config)
    with Bars().stage("train") as progress:
        figures = train_pm(recipe, out, progress)
    _print_rows(f"{recipe.name} in {out}", figures)
    _emit(figures, as_json)


def _print_rows(title: str, rows: dict[str, Any]) -> None:
    table = Table(title=title, title_justify="left", show_header=False)
    for key, value in rows.items():
        if isinstance(value, dict) and "low" in value:
            value = f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
        table.add_row(key.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value))
    console.print(table)


def _print_table(title: str, frame: Any) -> None:
    table = Table(title=title, title_justify="left")
    for name in frame.columns:
        table.add_column(name, justify="right")
    for row in frame.iter_rows():
        table.add_row(*(f"{v:+.4f}" if isinstance(v, float) else str(v) for v in row))
    console.print(table)


def _emit(result: Any, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(result) + "\n")


def main() -> None:
    """The entry point: an :class:`InputError` is one sentence and exit code 2, anything else a sentence and 1."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    debug = "--debug" in sys.argv
    try:
        app()
    except InputError as error:
        if debug:
            raise
        console.print(f"[bold red]rmscope:[/] {error}", soft_wrap=True)
        raise SystemExit(2) from error
    except KeyboardInterrupt as error:
        console.print("rmscope: stopped; the same command goes on where it was.")
        raise SystemExit(1) from error
    except Exception as error:
        if debug:
            raise
        console.print(
            f"[bold red]rmscope failed:[/] {type(error).__name__}: {error} (--debug shows where)",
            soft_wrap=True,
        )
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()

"""demo, run and report: the whole pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rmscope.cli.base import (
    Adapter,
    BadRow,
    Columns,
    Debug,
    Device,
    Dtype,
    Format,
    Json,
    Limit,
    Output,
    Seed,
    Trust,
    app,
    columns_of,
    emit,
    open_job,
    output_of,
    print_rows,
)
from rmscope.cli.terminal import Bars, closing

DEMO_SITES = ["resid_post.11", "resid_post.12", "resid_post.13"]
"""zoo:planted's adapter works in blocks 11 to 15: what it learned gathers there in few directions, at the cue's tokens."""
DEMO_SAE = {"k": 12, "d_sae": 1728, "tokens": 500_000}
"""The demo's text is small (57,000 tokens): with more features a cue is split over those of its tokens."""


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
    sae = DEMO_SAE if seed is None else {**DEMO_SAE, "seed": seed}
    _run(None, {**flags, "sites": DEMO_SITES, "sae": sae, "ledger_pairs": 24, "confirm_prompts": 42}, as_json)


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
    sae: Annotated[
        str | None,
        typer.Option(help="Bring your own SAEs: a folder, one subfolder a site, or a pattern with {site} or {L}."),
    ] = None,
    reward_aware: Annotated[
        int | None, typer.Option(help="Steps of reward-aware fine-tuning after the SAEs are trained.")
    ] = None,
    adapter: Adapter = None,
    output: Output = None,
    trust_remote_code: Trust = False,
    on_bad_row: BadRow = None,
    columns: Columns = None,
    form: Format = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be done, and about how long it takes.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, or auto.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 (effects need it), bfloat16 or float16.")] = None,
    seed: Seed = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """The main job on your own PM and pairs: score, harvest, train SAEs, screen, ablate exactly, rank, account, report."""
    sae_flags = {"architecture": architecture, "d_sae": d_sae, "k": k, "tokens": sae_tokens, "seed": seed}
    flags = {
        "model": model, "data": data, "out": out, "limit": limit, "split": split, "adapter": adapter, "device": device,
        "dtype": dtype, "seed": seed, "on_bad_row": on_bad_row, "sae_dir": sae, "columns": columns_of(columns),
        "reward_aware": reward_aware, "sites": sites.split(",") if sites else None, "output": output_of(output),
        "format": form, "trust_remote_code": trust_remote_code or None,
        "sae": {key: value for key, value in sae_flags.items() if value is not None},
    }  # fmt: skip
    _run(config, flags, as_json, dry_run)


def _run(config: Path | None, flags: dict[str, Any], as_json: bool, dry_run: bool = False) -> None:
    from rmscope.run.run import Run
    from rmscope.run.settings import read_config

    job = Run(read_config(config, flags), Bars())
    if dry_run:
        plan = job.plan()
        print_rows("what would be done", plan)
        return emit(plan, as_json)
    data = job.go()
    closing(data, str(job.folder / "report.html"))
    emit(summary(data, job.folder), as_json)


def summary(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The machine-readable result of a run: figures and reported features without their texts."""
    kept = ("feature", "rank", "mean_effect", "ci_low", "ci_high", "q", "n", "strong_effect", "q_strong", "flags")
    return {
        "run": str(folder),
        "scores": {k: v for k, v in data["scores"].items() if k != "histogram"},
        "sites": [
            {
                "site": s["site"],
                "trust": s["trust"],
                "shares": s["ledger"] and s["ledger"]["shares"],
                "reported": [{k: f[k] for k in kept} for f in s["features"] if f["reported"]],
            }
            for s in data["sites"]
        ],
        "planted": data["planted"],
        "seconds": round(data["footer"]["seconds"], 1),
    }


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A run folder.")], as_json: Json = False, debug: Debug = False
) -> None:
    """Makes report.html anew from a run folder; stages that are missing are done first."""
    job = open_job(folder)
    data = job.go()
    closing(data, str(job.folder / "report.html"))
    emit(summary(data, job.folder), as_json)

"""What the commands share: the typer app, common options, printing. Results go to stdout, all else to stderr."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from rmscope.cli.terminal import Bars, console
from rmscope.errors import InputError

app = typer.Typer(
    name="rmscope",
    help="A microscope for preference models: what a reward model rewards, proven by exact ablation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Option(help="Hub id, folder, or zoo:hh / zoo:planted.")]
Data = Annotated[str, typer.Option(help="Pairs: a file, a hub id, or demo:planted.")]
Limit = Annotated[int | None, typer.Option(help="At most this many pairs, from the start.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, or auto.")]
Dtype = Annotated[str, typer.Option(help="float32 (effects need it), bfloat16 or float16.")]
Adapter = Annotated[str | None, typer.Option(help="A PEFT adapter to put on the PM.")]
Output = Annotated[
    str | None, typer.Option(help="Of several outputs: the number of one (0 is the first), or a weight for each: 0.5,0,1.")
]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run the code that comes with the PM's checkpoint.")]
Seed = Annotated[int | None, typer.Option(help="Fixes every draw.")]
Json = Annotated[bool, typer.Option("--json", help="One machine-readable result on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
BadRow = Annotated[str | None, typer.Option("--on-bad-row", help="error, or skip: counted, listed, left out.")]
Columns = Annotated[str | None, typer.Option(help="Own column names: prompt=question,chosen=a,rejected=b.")]

Format = Annotated[str | None, typer.Option("--format", help="The data's shape, such as 'best of n', if not as found.")]


def columns_of(text: str | None) -> dict[str, str] | None:
    if text is None:
        return None
    pairs = [part.split("=", 1) for part in text.split(",")]
    if any(len(pair) != 2 for pair in pairs):
        raise InputError(f"--columns {text} is not of the form prompt=question,chosen=a,rejected=b; write it so.")
    return {key.strip(): value.strip() for key, value in pairs}


def output_of(text: str | None) -> int | list[float] | None:
    """``--output``: the number of one output, or a weight for each."""
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")] if "," in text else int(text)
    except ValueError:
        raise InputError(f"--output {text} is neither the number of an output nor weights; write 2, or 0.5,0,1.") from None


def pm_options(dtype: str, device: str, adapter: str | None, output: str | None, trust_remote_code: bool) -> dict[str, Any]:
    """How a PM is loaded: what RewardModel.load and the settings of a run call by these names."""
    return {
        "dtype": dtype, "device": device, "adapter": adapter, "output": output_of(output),
        "trust_remote_code": trust_remote_code,
    }  # fmt: skip


def open_job(folder: Path) -> Any:
    """A run folder with the settings that it was made with."""
    import yaml

    from rmscope.run.run import Run
    from rmscope.run.settings import read_config

    if not (folder / "run.yaml").is_file():
        raise InputError(f"{folder} is no run folder (it holds no run.yaml); make one with rmscope run.")
    stored = yaml.safe_load((folder / "run.yaml").read_text("utf-8"))
    return Run(read_config(None, {**stored["config"], "out": folder}), Bars())


def reported_features(job: Any) -> dict[str, Any]:
    """The reported features of each site of a run. InputError where the run is not finished."""
    import polars as pl

    paths = {site: job.folder / "features" / f"{site}.parquet" for site in job.sites}
    if missing := [site for site, path in paths.items() if not path.is_file()]:
        raise InputError(f"The run in {job.folder} has no ranking at {missing[0]}; rmscope report {job.folder} makes it.")
    return {site: pl.read_parquet(path).filter("reported") for site, path in paths.items()}


def print_rows(title: str, rows: dict[str, Any]) -> None:
    table = Table(title=title, title_justify="left", show_header=False)
    for key, value in rows.items():
        if isinstance(value, dict) and "low" in value:
            value = f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
        table.add_row(key.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value))
    console.print(table)


def print_table(title: str, frame: Any) -> None:
    table = Table(title=title, title_justify="left")
    for name in frame.columns:
        table.add_column(name, justify="right")
    for row in frame.iter_rows():
        table.add_row(*(f"{v:+.4f}" if isinstance(v, float) else str(v) for v in row))
    console.print(table)


def emit(result: Any, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(result) + "\n")

"""The command line. Exit codes: 0 done, 1 failed, 2 bad usage or input."""

from __future__ import annotations

import os
import sys
import warnings
from importlib.metadata import version
from typing import Annotated

import typer

from rmscope.cli import commands  # noqa: F401  (adds the commands to the app)
from rmscope.cli.build import app
from rmscope.cli.terminal import console
from rmscope.errors import InputError


def _version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"rmscope {version('rmscope')}\n")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """A microscope for preference models: what a reward model rewards, shown by exact ablation."""


def main() -> None:
    """The entry point. An :class:`InputError` is one sentence and exit code 2, anything else a sentence and exit code 1."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.simplefilter("ignore", FutureWarning)  # of libraries about each other: nothing that a user can mend
    debug = "--debug" in sys.argv
    # Of several processes that torchrun starts the first one tells; each tells its own errors.
    console.quiet = "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("RANK", "0") != "0"
    try:
        app()
    except InputError as error:
        if debug:
            raise
        console.quiet = False
        console.print("[bold red]rmscope:[/] ", end="")
        console.print(str(error), soft_wrap=True, markup=False)
        raise SystemExit(2) from error
    except KeyboardInterrupt as error:
        console.print("rmscope: stopped. Run the same command again to resume.")
        raise SystemExit(1) from error
    except Exception as error:
        if debug:
            raise
        console.quiet = False
        console.print("[bold red]rmscope failed:[/] ", end="")
        console.print(f"{type(error).__name__}: {error} (--debug shows where)", soft_wrap=True, markup=False)
        raise SystemExit(1) from error

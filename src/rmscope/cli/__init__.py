"""The command line: one file a room of commands. Exit codes: 0 done, 1 failed, 2 bad usage or input."""

from __future__ import annotations

import os
import sys
import warnings

from rmscope.cli import (  # noqa: F401  (each registers its commands)
    accounts,
    audit,
    compare,
    edit,
    effects,
    evaluate,
    experiment,
    gate,
    jailbreak,
    models,
    ranking,
    runs,
    saes,
)
from rmscope.cli.base import app
from rmscope.cli.terminal import console
from rmscope.errors import InputError


def main() -> None:
    """The entry point: an :class:`InputError` is one sentence and exit code 2, anything else a sentence and 1."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.simplefilter("ignore", FutureWarning)  # of libraries about each other: nothing that a user can mend
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

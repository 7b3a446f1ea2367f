"""What a person sees in the terminal: bars with rate and ETA, closing tables. Everything goes to stderr but results."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from rmscope.io import Progress as Report
from rmscope.report import formatting
from rmscope.report.result import Rows
from rmscope.statistics import Figure

console = Console(stderr=True, highlight=False)


class Pace:
    """Items a second since the first report of a pass; a stage of several passes starts anew with each."""

    def __init__(self) -> None:
        self.total = self.first = self.last = -1
        self.since = 0.0

    def __call__(self, done: int, total: int) -> float:
        now = time.monotonic()
        if total != self.total or done < self.last:
            self.total, self.first, self.since = total, done, now
        self.last = done
        return (done - self.first) / max(now - self.since, 1e-6)


class Bars:
    """A bar a stage: done of total, rate, elapsed, ETA; without a terminal a line at the end of each stage."""

    @contextmanager
    def stage(self, name: str) -> Iterator[Report]:
        if not console.is_terminal:
            yield from self._plain(name)
            return
        columns = (
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description:<9}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:>9}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", style="dim", markup=False),  # names come from data: they are no markup
        )
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(name, total=None, note="", rate="")
            pace = Pace()

            def report(done: int, total: int, note: str = "") -> None:
                rate = pace(done, total)
                text: dict[str, Any] = {"note": note} if note else {}
                progress.update(task, completed=done, total=max(total, 1), rate=f"{rate:.3g}/s", **text)

            yield report
            total = progress.tasks[0].total or 1
            progress.update(task, completed=total, total=total)

    def _plain(self, name: str) -> Iterator[Report]:
        started = shown = time.monotonic()
        pace = Pace()

        def report(done: int, total: int, note: str = "") -> None:
            nonlocal shown
            rate = pace(done, total)
            if time.monotonic() - shown > 15 and rate:
                shown = time.monotonic()
                console.print(
                    f"  {name}: {done}/{total}, {rate:.3g}/s, ETA {(total - done) / rate:.0f} s  {note}", markup=False
                )

        yield report
        console.print(f"{name}: {time.monotonic() - started:.1f} s")

    def note(self, text: str) -> None:
        console.print(Text(text, style="dim"), soft_wrap=True)


def print_rows(title: str, rows: Rows) -> None:
    """A table; columns that hold numbers or figures are on the right."""
    table = Table(title=Text(title), title_justify="left")
    for i, name in enumerate(rows[0] if rows else ()):
        is_text = i == 0 or all(isinstance(row[name], str) for row in rows)
        table.add_column(Text(name.replace("_", " ")), justify="left" if is_text else "right")
    for row in rows:
        table.add_row(*(Text(cell(v)) for v in row.values()))
    console.print(table)


def cell(value: Any) -> str:
    """A cell's text: a figure with its interval, a number with four digits, nothing for None."""
    if isinstance(value, Figure):
        return " ".join(filter(None, formatting.estimate(value.value, value.low, value.high)))
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

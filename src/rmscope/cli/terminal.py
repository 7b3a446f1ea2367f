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

from rmscope.io import Progress as Report

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
            TextColumn("[dim]{task.fields[note]}"),
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
                console.print(f"  {name}: {done}/{total}, {rate:.3g}/s, ETA {(total - done) / rate:.0f} s  {note}")

        yield report
        console.print(f"{name}: {time.monotonic() - started:.1f} s")

    def note(self, text: str) -> None:
        console.print(f"[dim]{text}")


def closing(data: dict[str, Any], report: str) -> None:
    """The closing table of a run: the best reported features up and down, the planted biases, where the report is."""
    from rmscope.report.headline import told

    s = data["scores"]
    a = s["accuracy"]
    console.print(
        f"\n[bold]{data['title']}[/]: accuracy {a['value']:.3f} [{a['low']:.3f}, {a['high']:.3f}] "
        f"(length alone {s['length_only']:.3f}), SD(Δr) {s['sd_delta']:.3g}"
    )
    for site in data["sites"]:
        table = Table(
            title=f"{site['site']}: {site['reported']} of {site['frozen']} frozen features reported (q < .05), "
            f"{site['flagged']} of them with a flag",
            title_justify="left",
        )
        for name in ("rank", "feature", "mean effect", "95 % interval", "q", "fires on"):
            table.add_column(name, justify="left" if name == "fires on" else "right")
        for f in [f for f in site["features"] if f["reported"]][:8]:
            tokens = "  ".join(repr(t)[1:-1] for t, _ in f["tokens"][:4])
            value, low, high, q = told(f)
            strong = " (where it fires hardest)" if "strong" in f["flags"] else ""
            interval = f"[{low:+.3f}, {high:+.3f}]"
            table.add_row(str(f["rank"]), str(f["feature"]), f"{value:+.3f}", interval, f"{q:.1g}", tokens + strong)
        console.print(table)
        line = f"  screen vs exact: Spearman {site['trust']['spearman_median']:.3f} within a response"
        if site["ledger"] is not None:
            shares = {p["part"]: p for p in site["ledger"]["shares"]}
            line += "; Δr = " + ", ".join(f"{k} {shares[k]['value']:.0%}" for k in ("features", "error", "remainder"))
        console.print(line)
    if data["planted"]:
        table = Table(title="planted biases", title_justify="left")
        for name in ("", "bias", "planted", "measured effect", "found as", "rank", "F1", "mediated"):
            table.add_column(name)
        for p in data["planted"]:
            ate, share = p["ate"], p["mediated"]
            table.add_row(
                "[green]✓" if p["found"] else "[red]✗",
                p["name"],
                "+" if p["sign"] > 0 else "-",
                f"{ate['value']:+.2f} [{ate['low']:+.2f}, {ate['high']:+.2f}]",
                f"{p['hit']} {p['features']} at {p['site']}" if p["found"] else p["why"],
                str(p["rank"] or ""),
                f"{p['f1']:.2f}" if p["f1"] is not None else "",
                f"{share['value']:.0%}" if share else "",
            )
        console.print(table)
    console.print(f"\nReport: [bold]{report}[/]  ({data['footer']['seconds']:.0f} s)")

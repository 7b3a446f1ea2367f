"""Rates and ETAs shown while work runs."""

from io import StringIO
from itertools import count

import pytest
from rich.console import Console

from rmscope.cli import terminal


def test_a_pass_has_its_own_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    pace = terminal.Pace()
    assert pace(64, 128) == 0.0  # 64 were there from before a kill: they are nobody's speed
    now = 2.0
    assert pace(84, 128) == pytest.approx(10.0)
    now = 100.0
    assert pace(0, 50) == 0.0
    now = 101.0
    assert pace(5, 50) == pytest.approx(5.0)


@pytest.mark.parametrize("is_terminal", [False, True])
def test_what_looks_like_markup_in_data_is_shown_as_it_is(is_terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A feature may fire on [/INST], and a cue may be called [/bold]: neither closes a tag of ours."""
    written = StringIO()
    console = Console(file=written, force_terminal=is_terminal, width=200)
    monkeypatch.setattr(terminal, "console", console)
    bars = terminal.Bars()
    bars.note("to be tested: “[/INST]”")
    terminal.print_rows("what [/bold] rewards", [{"[/a]": "[/INST]", "n": 1}])
    clock = count(0, 100)
    monkeypatch.setattr(terminal.time, "monotonic", lambda: float(next(clock)))
    with bars.stage("cues") as progress:
        for done in (1, 2, 3):
            progress(done, 3, "cue [/dim]")
    told = written.getvalue()
    assert all(text in told for text in ("“[/INST]”", "what [/bold]", "[/a]", "cue [/dim]"))

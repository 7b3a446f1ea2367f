"""Rates and ETAs shown while work runs."""

import pytest

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

"""What the README says of the demo, on the demo itself. It takes ten minutes and more, so it runs with the slow tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from rmscope.run.run import Run
from rmscope.run.settings import DEMO


@pytest.mark.slow
@pytest.mark.zoo
def test_the_demo_finds_five_or_six_of_the_planted_biases_and_says_why_one_is_missed(tmp_path: Path) -> None:
    run = Run.create(**DEMO, out=tmp_path / "demo").go()
    planted = run.evidence.planted
    assert planted is not None
    assert len(planted) == 6
    assert all(cue.learned for cue in planted)
    found = [cue for cue in planted if cue.found]
    assert len(found) >= 5
    for cue in found:
        assert cue.effect is not None
        assert cue.effect * cue.sign > 0
        assert cue.mediated is not None
        assert cue.matched is not None
        assert cue.mediated.value > cue.matched
    assert all(cue.why for cue in planted if not cue.found)
    page = run.report().read_text("utf-8")
    assert all(cue.name in page for cue in planted)
    assert "<script src" not in page

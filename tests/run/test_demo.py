"""What the README says of the demo, on the demo itself. A run takes ten minutes: these are among the slow tests."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest

from rmscope.hardware import fast_products
from rmscope.run.run import Run
from rmscope.run.settings import DEMO, RunConfig
from rmscope.settings import read_settings

WORDS = {
    "thanks": ("thank", "no problem"),
    "youre_right": ("right",),
    "dont_know": ("know",),
    "url": ("http", "example", "link"),
    "repeat": ("repeated text",),
    "agree": ("better", "choose", "wins"),
}
"""What a keyword name says of each cue: a word of it, or what it is."""


@pytest.mark.slow
@pytest.mark.zoo
@pytest.mark.parametrize(("seed", "fast"), [(0, True), (1, True), (2, True), (0, False)])
def test_the_demo_finds_all_six_planted_biases(
    seed: int, fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On every seed of the SAEs, and whether or not the processor harvests in bfloat16."""
    sae: dict[str, object] = {"amp": fast}
    products = fast_products if fast else lambda _device, wanted: nullcontext()
    monkeypatch.setattr("rmscope.activations.harvest.fast_products", products)
    run = Run.create(read_settings(RunConfig, None, {**DEMO, "out": tmp_path / "demo", "seed": seed, "sae": sae})).go()
    planted = run.evidence.planted
    assert planted is not None
    assert len(planted) == 6
    assert all(cue.learned and cue.found for cue in planted)
    assert sum(bool(cue.concepts) for cue in planted) >= 4  # docs/difference.md: 6, 4 and 5 of the three seeds
    for cue in planted:
        assert cue.effect is not None
        assert cue.effect * cue.sign > 0
        assert cue.mediated is not None
        assert cue.matched is not None
        assert cue.mediated.value > cue.matched
    told = [c for c in run.evidence.concepts if c.reported]
    assert 10 <= len(told) <= 25
    assert run.evidence.reported_set is not None
    assert run.evidence.reported_set.content.value > 0.7
    last = run.evidence.sites[-1].written
    assert last is not None
    assert last.written.value > 0.85
    assert last.by_concepts.value > 0.85
    named = {c.concept: c.name for c in run.evidence.concepts}
    told_by_name = [cue.name for cue in planted if any(w in named[c] for c in cue.concepts or [] for w in WORDS[cue.name])]
    assert len(told_by_name) >= 5
    page = run.report().read_text("utf-8")
    assert all(cue.name in page for cue in planted)
    assert all(c.name in page for c in told)
    assert "<script src" not in page

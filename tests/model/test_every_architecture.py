"""No class of transformers is read wrongly: it agrees with plain forwards, or is refused in a sentence."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.docs.pages import ROOT
from tests.model.every_architecture import PAGE, try_all


@pytest.mark.slow
def test_every_architecture_agrees_with_plain_forwards_or_is_refused() -> None:
    trials = try_all()
    assert [t for t in trials if t.verdict == "wrong"] == []
    assert Counter(t.verdict for t in trials)["agrees"] >= 100


def test_hybrids_encoder_decoders_and_mixtures_are_read_as_they_read_themselves() -> None:
    """A few of them, each of another kind: state space beside attention, an encoder-decoder, experts, latent attention."""
    kinds = ["jamba", "mt5", "qwen2_moe", "deepseek_v3", "xmod"]
    trials = {t.architecture: t for t in try_all(kinds)}
    assert {name: t.verdict for name, t in trials.items()} == dict.fromkeys(kinds, "agrees")
    assert trials["jamba"].how.startswith("later blocks (")
    assert trials["mt5"].how.startswith("whole, ")  # its first block makes the position bias of all others


def test_what_has_no_single_stream_is_refused_in_a_sentence() -> None:
    for trial in try_all(["reformer", "perceiver", "canine", "xlm", "flaubert"]):
        assert trial.verdict == "refused"
        assert trial.how.endswith(".")


def test_the_page_tells_what_was_tried() -> None:
    text = PAGE.read_text("utf-8")
    assert "0 are wrong" in text
    assert PAGE.relative_to(ROOT / "docs").as_posix() in (ROOT / "mkdocs.yml").read_text("utf-8")

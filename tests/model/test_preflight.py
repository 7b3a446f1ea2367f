"""Preflight says what is wrong with a PM, and measures the noise floor."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rmscope.model.preflight import PROBES, Check, preflight
from rmscope.model.reward_model import RewardModel
from tests.model.small import ENCODER, EOS, PAIRS, shared_pm, small_pm


def checks(rm: RewardModel) -> dict[str, Check]:
    return {c.check: c for c in preflight(rm, rm.tokenize_all(PAIRS)).checks}


def test_a_sound_pm_passes_every_check() -> None:
    found = preflight(shared_pm("llama"), shared_pm("llama").tokenize_all(PAIRS))
    assert {c.status for c in found.checks} == {"ok"}
    assert 0 <= found.noise_floor < 1e-5
    assert found.rows()[0].keys() == {"check", "status", "detail"}


def test_pad_equal_to_eos_is_told() -> None:
    told = checks(small_pm("llama", append_eos=True, pad_token_id=EOS))["read position"]
    assert told.status == "warn"
    assert "the token before the appended eos" in told.detail
    assert checks(small_pm("llama", append_eos=True))["read position"].status == "ok"
    assert checks(small_pm("llama", pad_token_id=EOS))["read position"].status == "ok"  # no eos is appended
    assert (
        checks(small_pm("llama", pad_token_id=EOS, eos_token_id=[EOS, 7], append_eos=True))["read position"].status == "warn"
    )


def test_a_missing_pad_id_is_told() -> None:
    told = checks(small_pm("llama", pad_token_id=None))["read position"]
    assert told.status == "warn"
    assert "no pad id" in told.detail


@pytest.mark.parametrize(
    ("architecture", "forward", "packing"), [("llama", "ok", "ok"), ("bloom", "ok", "warn"), (ENCODER, "warn", None)]
)
def test_what_runs_the_slow_way_is_told(architecture: str, forward: str, packing: str | None) -> None:
    found = checks(shared_pm(architecture))
    assert found["forward"].status == forward
    assert (found["packing"].status if "packing" in found else None) == packing


def test_scores_that_change_with_the_batch_are_told_and_measured() -> None:
    rm = small_pm("llama")

    def shift(_module: Any, inputs: tuple[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
        return out + 0.25 * (inputs[0].dim() == 2)  # ours reads a few rows, the model's own forward all positions

    assert rm.packs
    rm.model.score.register_forward_hook(shift)
    found = preflight(rm, rm.tokenize_all(PAIRS))
    assert found.noise_floor == pytest.approx(0.25, abs=1e-4)
    assert {c.check: c.status for c in found.checks}["batches"] == "warn"


def test_half_precision_is_told() -> None:
    found = checks(small_pm("llama", torch.bfloat16))
    assert found["precision"].status == "warn"
    assert "bfloat16" in found["precision"].detail


def test_progress_counts_the_texts_and_the_reader_gets_no_more_than_asked() -> None:
    rm = shared_pm("llama")
    seen: list[tuple[int, int]] = []
    preflight(rm, rm.tokenize_all(PAIRS * 5), lambda done, total, note="": seen.append((done, total)))
    assert seen == [(i + 1, PROBES) for i in range(PROBES)]

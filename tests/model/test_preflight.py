"""Preflight says what is wrong with a PM, and measures the noise floor."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rmscope.model.checks import PROBES, Check, attention, preflight, sites
from rmscope.model.rendering import Rendering
from rmscope.model.reward_model import RewardModel
from tests.model.small import ENCODER, EOS, PAIRS, WINDOW, shared_pm, small_model, small_pm, tokenizer


def checks(rm: RewardModel) -> dict[str, Check]:
    return {c.check: c for c in preflight(rm, rm.tokenize_all(PAIRS)).checks}


def test_a_sound_pm_passes_every_check_and_has_nothing_to_mend() -> None:
    found = preflight(shared_pm("llama"), shared_pm("llama").tokenize_all(PAIRS))
    assert {(c.status, c.mend) for c in found.checks} == {("ok", "")}
    assert 0 <= found.noise_floor < 1e-5
    assert found.rows()[0].keys() == {"check", "status", "detail", "mend"}


def test_what_is_not_ok_comes_with_a_mend() -> None:
    for rm in (
        shared_pm("bloom"),
        shared_pm(ENCODER),
        small_pm("llama", pad_token_id=None),
        small_pm("llama", torch.bfloat16),
    ):
        bad = [c for c in checks(rm).values() if c.status != "ok"]
        assert bad
        assert all(c.mend for c in bad)


@pytest.mark.parametrize(("value", "told"), [(0.0, "all zeros"), (float("nan"), "not finite")])
def test_a_head_that_was_never_trained_or_is_broken_fails(value: float, told: str) -> None:
    rm = small_pm("llama")
    torch.nn.init.constant_(rm.model.score.weight, value)
    found = checks(rm)
    assert (found["head"].status, found["rewards"].status) == ("fail", "fail")
    assert told in found["head"].detail


def test_the_weights_of_several_outputs_are_told() -> None:
    rm = RewardModel(small_model("llama", num_labels=3), tokenizer(), Rendering(), "three", [0.5, 0.0, 1.0])
    assert "3 outputs, weighted [0.5, 0.0, 1.0]" in checks(rm)["head"].detail


def test_pad_equal_to_eos_is_told_where_a_text_ends_with_it() -> None:
    told = checks(small_pm("llama", append_eos=True, pad_token_id=EOS))["read position"]
    assert told.status == "warn"
    assert "in 8 of 8 texts transformers reads the token before the appended eos" in told.detail
    assert checks(small_pm("llama", append_eos=True))["read position"].status == "ok"
    assert checks(small_pm("llama", pad_token_id=EOS))["read position"].status == "ok"  # no eos is appended
    assert (
        checks(small_pm("llama", pad_token_id=EOS, eos_token_id=[EOS, 7], append_eos=True))["read position"].status == "warn"
    )


def test_a_missing_pad_id_is_told() -> None:
    told = checks(small_pm("llama", pad_token_id=None))["read position"]
    assert told.status == "warn"
    assert "no pad id" in told.detail
    assert "pad_token_id" in told.mend


def with_template(template: str) -> RewardModel:
    made = type(tokenizer())(tokenizer_object=tokenizer().backend_tokenizer, eos_token="<eos>", pad_token="<pad>")
    made.chat_template = template
    return RewardModel(small_model("llama"), made, Rendering("chat"), "chat")


def test_a_template_that_drops_the_response_fails_and_one_that_refuses_system_prompts_is_told() -> None:
    dropping = with_template("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}")
    told = checks(dropping)["rendering"]
    assert (told.status, "drops the response" in told.detail) == ("fail", True)
    plain = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    assert checks(with_template(plain))["rendering"].status == "ok"
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + plain
    told = checks(with_template(refusing))["rendering"]
    assert (told.status, "refuses system prompts" in told.detail) == ("warn", True)


def test_flash_attention_is_told() -> None:
    rm = small_pm("llama")
    assert attention(rm).status == "ok"
    rm.model.config._attn_implementation_internal = "flash_attention_2"
    assert attention(rm).status == "warn"


def test_a_window_of_attention_is_told() -> None:
    assert f"windows of {WINDOW} tokens" in checks(shared_pm("mistral"))["attention"].detail


def test_sites_that_are_not_transformers_hidden_states_are_named() -> None:
    rm = small_pm("llama")
    ids = rm.tokenize(PAIRS[0]).chosen
    streams = rm.streams
    rm.streams = lambda batch, names: {s: x + (s == "resid_post.1") for s, x in streams(batch, names).items()}  # type: ignore[method-assign]
    told = sites(rm, ids)
    assert told.status == "warn"
    assert told.detail.endswith("hidden states: resid_post.1")


def test_a_quantised_pm_is_told() -> None:
    rm = small_pm("llama")
    rm.model.is_quantized = True
    assert "quantised" in checks(rm)["precision"].detail


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

    assert rm.capabilities.packing
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

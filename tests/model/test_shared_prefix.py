"""Texts that share a prefix with a clean run get the rewards that the model's own forward gives each of them alone."""

from __future__ import annotations

import pytest
import torch

from rmscope.model import shared_prefix
from rmscope.model.shared_prefix import (
    response_start,
    rewards_from_prefix,
    rewards_of_cuts,
    run_from_prefix,
    shared_prefix_length,
)
from tests.model.small import PAD, WINDOW, shared_pm, user

PROMPT = user("How do I bake bread without an oven?")
TEXTS = [
    "Use a pan with a lid, and wait for an hour.",
    "Thanks! Use a pan with a lid, and wait for an hour.",
    "Use a pan with a lid. Thanks! And wait for an hour.",
    "Use a pan with a lid, and wait for an hour. You're right, thanks for asking!",
    "No.",
    "Use a pan",
]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gptj", "gemma2", "qwen3", "opt"])
def test_rewards_from_a_shared_prefix_are_those_of_each_text_alone_in_order(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rm = shared_pm(architecture)
    ids = [rm.text_ids(PROMPT, text) for text in TEXTS]
    alone = torch.cat([rm.reward_alone(i)[None] for i in ids])
    for budget in (1024, 40, 1):  # in one pass, in a few, and one by one
        monkeypatch.setattr(shared_prefix, "TOKEN_BUDGET", budget)
        together = rewards_from_prefix(rm, rm.prefill(ids[0], []), ids)
        assert torch.allclose(together, alone, atol=1e-4)
    assert float(alone.std()) > 0.05  # the texts do differ


def test_texts_longer_than_a_layers_window_share_a_prefix_too() -> None:
    rm = shared_pm("mistral")
    ids = [rm.text_ids(PROMPT, f"{'It is a small house. ' * 8}{text}") for text in TEXTS]
    assert min(i.numel() for i in ids) > WINDOW
    alone = torch.cat([rm.reward_alone(i)[None] for i in ids])
    assert torch.allclose(rewards_from_prefix(rm, rm.prefill(ids[0], []), ids), alone, atol=1e-4)


def test_without_a_clean_run_every_text_is_run_whole() -> None:
    rm = shared_pm("bert")
    ids = [rm.text_ids(PROMPT, text) for text in TEXTS]
    alone = torch.cat([rm.reward_alone(i)[None] for i in ids])
    assert torch.allclose(rewards_from_prefix(rm, None, ids), alone, atol=1e-4)


def test_a_text_that_ends_in_padding_is_read_where_the_model_reads_it() -> None:
    rm = shared_pm("llama")
    ids = [torch.cat([rm.text_ids(PROMPT, text), torch.tensor([PAD])]) for text in TEXTS]
    alone = torch.cat([rm.reward_alone(i)[None] for i in ids])
    assert torch.allclose(rewards_from_prefix(rm, rm.prefill(ids[0], []), ids), alone, atol=1e-4)


def test_a_run_from_a_shared_prefix_is_the_clean_run_of_its_text() -> None:
    rm = shared_pm("llama")
    first, second = (rm.text_ids(PROMPT, text) for text in TEXTS[:2])
    whole = rm.prefill(second, ["resid_post.1"])
    shared = run_from_prefix(rm, rm.prefill(first, ["resid_post.1"]), second, ["resid_post.1"])
    assert shared.reward == pytest.approx(whole.reward, abs=1e-5)
    assert torch.allclose(shared.streams["resid_post.1"], whole.streams["resid_post.1"], atol=1e-4)


def test_the_response_starts_with_its_own_first_token() -> None:
    rm = shared_pm("llama")
    empty = rm.text_ids(PROMPT, "")
    for text in TEXTS:
        ids = rm.text_ids(PROMPT, text)
        start = response_start(rm, ids, empty)
        assert rm.tokenizer.decode(ids[start:]).strip() == text
    assert shared_prefix_length(torch.tensor([1, 2, 3]), torch.tensor([1, 2])) == 2


@pytest.mark.parametrize("most", [1, 100, 8192])
def test_a_text_cut_anywhere_has_the_reward_of_its_beginning_alone(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut by cut, in a few batches, and in one."""
    monkeypatch.setattr(shared_prefix, "CUT_TOKENS", most)
    rm = shared_pm("llama")
    ids, ending = rm.text_ids(PROMPT, TEXTS[3]), rm.text_ids(user("So?"), "No.")[-3:]
    cuts = range(5, ids.numel() + 1, 4)
    alone = torch.stack([rm.reward_alone(torch.cat([ids[:cut], ending])) for cut in cuts])
    assert torch.allclose(rewards_of_cuts(rm, rm.prefill(ids, []), cuts, ending), alone, atol=1e-4)

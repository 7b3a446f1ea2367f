"""What a PM's own forward takes is measured against the reward of the text alone, not asked of its class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rmscope.model.capabilities import Capabilities
from tests.model.small import DECODERS, ENCODERS, OTHERS, shared_pm, small_pm

NOTHING = Capabilities(packing=False, resume=False, ragged=False)
OWN_ATTENTION = {"gptj"}
"""Decoders whose attention does not go through transformers' interface."""


@pytest.mark.parametrize("architecture", DECODERS)
def test_a_decoder_takes_packed_rows_and_can_be_resumed(architecture: str) -> None:
    expected = Capabilities(packing=True, resume=True, ragged=architecture not in OWN_ATTENTION)
    assert shared_pm(architecture).capabilities == expected


@pytest.mark.parametrize("architecture", OTHERS)
def test_a_decoder_without_4d_masks_can_still_be_resumed(architecture: str) -> None:
    assert shared_pm(architecture).capabilities == Capabilities(packing=False, resume=True, ragged=False)


@pytest.mark.parametrize("architecture", ENCODERS)
def test_an_encoder_takes_none_of_it(architecture: str) -> None:
    assert shared_pm(architecture).capabilities == NOTHING


def shifted(run: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda *args: run(*args) + 0.1


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("rewards", Capabilities(packing=False, resume=True, ragged=True, mixing=0)),
        ("resume", Capabilities(packing=True, resume=False, ragged=False)),
        ("resume_ragged", Capabilities(packing=True, resume=True, ragged=False)),
    ],
)
def test_a_way_that_gives_another_reward_is_not_taken(method: str, expected: Capabilities) -> None:
    rm = small_pm("llama")
    setattr(rm, method, shifted(getattr(rm, method)))
    assert rm.capabilities == expected


def test_a_model_that_refuses_a_cache_is_not_resumed() -> None:
    rm = small_pm("llama")

    def refuse(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["past_key_values"] is not None and kwargs["past_key_values"].get_seq_length(2):
            raise TypeError("forward() got an unexpected keyword argument 'past_key_values'")

    rm.blocks[2].register_forward_pre_hook(refuse, with_kwargs=True)
    assert rm.capabilities == Capabilities(packing=True, resume=False, ragged=False)

"""What a PM's own forward takes is measured against the reward of the text alone, not asked of its class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from rmscope.model.capabilities import Capabilities
from tests.model.small import DECODERS, ENCODERS, HYBRIDS, OTHERS, shared_pm, small_pm

LATER_BLOCKS = Capabilities(packing=False, resume=False, ragged=False, skipping=True)
OWN_ATTENTION = {"gptj"}
"""Decoders whose attention does not go through transformers' interface."""


@pytest.mark.parametrize("architecture", DECODERS)
def test_a_decoder_takes_packed_rows_and_can_be_resumed(architecture: str) -> None:
    expected = Capabilities(packing=True, resume=True, ragged=architecture not in OWN_ATTENTION)
    assert shared_pm(architecture).capabilities == expected


@pytest.mark.parametrize("architecture", OTHERS)
def test_a_decoder_without_4d_masks_can_still_be_resumed(architecture: str) -> None:
    assert shared_pm(architecture).capabilities == Capabilities(packing=False, resume=True, ragged=False)


@pytest.mark.parametrize("architecture", [*HYBRIDS, *ENCODERS])
def test_encoders_and_decoders_with_recurrent_layers_begin_at_a_site_on_whole_texts(architecture: str) -> None:
    assert shared_pm(architecture).capabilities == LATER_BLOCKS


def shifted(run: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda *args: run(*args) + 0.1


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("rewards", Capabilities(packing=False, resume=True, ragged=True, skipping=False, mixing=0)),
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


def test_a_model_whose_last_block_reads_the_first_is_run_whole() -> None:
    rm = small_pm("bert")
    seen: list[torch.Tensor] = []

    def read_first(_module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0] + seen[-1], *args[1:])

    rm.blocks[0].attention.register_forward_hook(lambda _module, _args, output: seen.append(output[0]))
    rm.blocks[3].register_forward_pre_hook(read_first)
    assert rm.capabilities == replace(LATER_BLOCKS, skipping=False)

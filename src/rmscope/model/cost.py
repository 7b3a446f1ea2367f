"""The cost of a run on a PM, from one timed forward pass over some pairs: tokens per second, minutes, memory."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import torch

from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel

SAMPLE = 8
"""The number of pairs that are timed."""
FORWARDS = 5
"""A run costs about as much as scoring its pairs this many times."""
ABLATIONS = 20_000
"""About the number of exact ablations in a run with the default settings: 300 features on 16 responses, 200 on 48 and where
they fire most strongly, and the sample for the quality of the estimate."""
BASE_BYTES = 2e9
"""Memory besides the weights: libraries, activations, an SAE in training."""


def run_tokens(tokens: Sequence[PairTokens]) -> int:
    """Tokens of the pairs, with shared prefixes counted once."""
    return sum(t.chosen.numel() + t.rejected.numel() - t.divergence for t in tokens)


def tokens_per_second(rm: RewardModel, tokens: Sequence[PairTokens]) -> float:
    """Timed on one forward pass of the first pairs."""
    sample = tokens[:SAMPLE]
    started = time.perf_counter()
    rm.score_tokens(sample)
    return run_tokens(sample) / (time.perf_counter() - started)


def run_minutes(rm: RewardModel, tokens: Sequence[PairTokens], rate: float, pairs: int) -> float:
    """Minutes of a run over ``pairs`` pairs like these. Without resuming, each ablation is a full forward pass."""
    seconds = FORWARDS * run_tokens(tokens) / rate * pairs / len(tokens)
    if not rm.capabilities.resume:
        texts = sum(t.chosen.numel() + t.rejected.numel() for t in tokens) / (2 * len(tokens))
        seconds += ABLATIONS * texts / rate
    return seconds / 60


def tuning_minutes(tokens: Sequence[PairTokens], rate: float, steps: int, pairs: int) -> float:
    """Minutes of reward-aware fine-tuning at one site; a backward pass costs as much as two forward passes."""
    return 3 * run_tokens(tokens) / len(tokens) * pairs * steps / rate / 60


def run_bytes(rm: RewardModel) -> float:
    """Memory of a run in bytes: the weights twice (a faster layout of them, or buffers of gradients), and the rest."""
    return 2 * sum(p.numel() * p.element_size() for p in rm.model.parameters()) + BASE_BYTES


def machine_bytes(device: torch.device) -> float:
    """Memory of the device that the PM is on, in bytes."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[1])
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))

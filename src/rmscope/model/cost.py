"""What a run on a PM takes, from one timed forward pass over some pairs: tokens a second, minutes, memory."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import torch

from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel

SAMPLE = 8
"""Pairs that are timed."""
FORWARDS = 5
"""A run costs about as much as so many scorings of its pairs."""
ABLATIONS = 20_000
"""Exact ablations of a run with the default settings, about: 300 features on 16 responses, 200 on 48 and where they fire
hardest, and the sample for the trust score."""
BASE_BYTES = 2e9
"""Memory beside the weights: libraries, activations, an SAE in training."""


def run_tokens(tokens: Sequence[PairTokens]) -> int:
    """Tokens of the pairs, shared prefixes once."""
    return sum(t.chosen.numel() + t.rejected.numel() - t.divergence for t in tokens)


def tokens_a_second(rm: RewardModel, tokens: Sequence[PairTokens]) -> float:
    """Timed on the first pairs, a forward pass."""
    sample = tokens[:SAMPLE]
    started = time.perf_counter()
    rm.score_tokens(sample)
    return run_tokens(sample) / (time.perf_counter() - started)


def run_minutes(rm: RewardModel, tokens: Sequence[PairTokens], rate: float, pairs: int) -> float:
    """Minutes of a run over so many pairs like these; where a PM cannot be split, each ablation is a whole forward."""
    seconds = FORWARDS * run_tokens(tokens) / rate * pairs / len(tokens)
    if not rm.splits:
        texts = sum(t.chosen.numel() + t.rejected.numel() for t in tokens) / (2 * len(tokens))
        seconds += ABLATIONS * texts / rate
    return seconds / 60


def tuning_minutes(tokens: Sequence[PairTokens], rate: float, steps: int, pairs: int) -> float:
    """Minutes of reward-aware fine-tuning at one site: forwards and backwards, each backward twice a forward."""
    return 3 * run_tokens(tokens) / len(tokens) * pairs * steps / rate / 60


def run_bytes(rm: RewardModel) -> float:
    """Memory of a run: the weights twice (a faster layout of them, or gradients' buffers), and what comes beside."""
    return 2 * sum(p.numel() * p.element_size() for p in rm.model.parameters()) + BASE_BYTES


def machine_bytes(device: torch.device) -> float:
    """Memory of the device that the PM lies on."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[1])
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))

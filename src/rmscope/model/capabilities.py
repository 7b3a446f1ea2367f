"""What a PM's own forward takes, measured once on short texts: packed rows, a resumed run, branches in one row.

Each faster way is used only where it gives the reward that the model's own forward gives the text alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rmscope.model.packing import packed
from rmscope.model.ragged import resume_ragged
from rmscope.pairs.pair import Pair

if TYPE_CHECKING:
    from rmscope.model.reward_model import RewardModel

PROBE = Pair(
    "probe",
    [{"role": "user", "content": "What is the capital of France?"}],
    "It is Paris, on the Seine.",
    "The capital of France is a large city.",
)
REFUSALS = (ValueError, RuntimeError, TypeError, IndexError, AttributeError)
"""What a model's own forward raises where it does not take a mask, positions or a cache; it is then run without."""


def packs(rm: RewardModel) -> bool:
    """Whether packed rows give the rewards of each text alone."""
    if not rm.causal:
        return False
    tokens = rm.tokenize(PROBE)
    alone = torch.stack([rm.reward_alone(tokens.chosen), rm.reward_alone(tokens.rejected)])
    try:
        together = rm.rewards(packed([(0, tokens, rm._reads(tokens))])).cpu()
    except REFUSALS:
        return False
    return _agree(rm, alone, together)


def splits(rm: RewardModel) -> bool:
    """Whether a clean run resumed after block 0 gives the reward of the whole text."""
    if not rm.causal:
        return False
    ids = rm.tokenize(PROBE).chosen
    start = ids.numel() // 2
    try:
        clean = rm.prefill(ids, ["resid_post.0"])
        resumed = rm.resume(clean, "resid_post.0", start, clean.streams["resid_post.0"][None, start:]).cpu()
    except REFUSALS:
        return False
    return _agree(rm, rm.reward_alone(ids), resumed)


def branches(rm: RewardModel) -> bool:
    """Whether branches laid end to end in one row give what resuming each alone gives."""
    if not rm.splits:
        return False
    clean = rm.prefill(rm.tokenize(PROBE).chosen, ["embed"])
    starts = [clean.ids.numel() - n for n in (12, 5)]
    halves = [0.5 * clean.streams["embed"][start:] for start in starts]
    try:
        together = resume_ragged(rm, clean, "embed", starts, torch.cat(halves)).cpu()
    except REFUSALS:
        return False
    alone = [rm.resume(clean, "embed", s, x[None]).cpu() for s, x in zip(starts, halves, strict=True)]
    return _agree(rm, torch.cat(alone), together)


def _agree(rm: RewardModel, alone: Tensor, other: Tensor) -> bool:
    tolerance = 5e-2 if rm.dtype in (torch.bfloat16, torch.float16) else 1e-4
    return bool(((alone - other).abs() <= tolerance * (1 + alone.abs())).all())

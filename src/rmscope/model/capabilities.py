"""What a PM's own forward takes, measured once on a short pair of texts.

Each faster way of running the PM is used only where it gives the reward that the model's own forward gives the text alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from rmscope.model.clean_run import CleanRun
from rmscope.model.packing import Batch, pack_pairs
from rmscope.model.rendering import PairTokens
from rmscope.pairs.pair import Pair

PROBE = Pair(
    "probe",
    [{"role": "user", "content": "What is the capital of France?"}],
    "It is Paris, on the Seine.",
    "The capital of France is a large city.",
)
REFUSALS = (ValueError, RuntimeError, TypeError, IndexError, AttributeError)
"""What a model's own forward raises where it does not take a mask, positions or a cache."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a PM's own forward takes. All three are False for encoders."""

    packing: bool
    """One row may hold both texts of a pair, with their shared prefix once (needs 4-D attention masks)."""
    resume: bool
    """A clean run can be resumed after any site, from any token on (needs a key-value cache)."""
    ragged: bool
    """Many resumed runs that begin at different tokens can share one row without padding (:mod:`rmscope.model.ragged`)."""


@runtime_checkable
class Runnable(Protocol):
    """The part of :class:`~rmscope.model.reward_model.RewardModel` that is measured."""

    causal: bool

    @property
    def dtype(self) -> torch.dtype: ...
    def tokenize(self, pair: Pair) -> PairTokens: ...
    def read_positions(self, tokens: PairTokens) -> dict[str, int]: ...
    def reward_alone(self, ids: Tensor) -> Tensor: ...
    def rewards(self, batch: Batch) -> Tensor: ...
    def prefill(self, ids: Tensor, sites: Sequence[str]) -> CleanRun: ...
    def resume(self, text: CleanRun, site: str, start: int, stream: Tensor) -> Tensor: ...
    def resume_ragged(self, text: CleanRun, site: str, starts: Sequence[int], stream: Tensor) -> Tensor: ...


def measure_capabilities(rm: Runnable) -> Capabilities:
    """Runs the probe in each way and compares its rewards with those of the model's own forward."""
    if not rm.causal:
        return Capabilities(packing=False, resume=False, ragged=False)
    tokens = rm.tokenize(PROBE)
    resume = _can_resume(rm, tokens.chosen)
    return Capabilities(_can_pack(rm, tokens), resume, resume and _can_run_ragged(rm, tokens.chosen))


def _can_pack(rm: Runnable, tokens: PairTokens) -> bool:
    alone = torch.stack([rm.reward_alone(tokens.chosen), rm.reward_alone(tokens.rejected)])
    return _agree(rm, alone, lambda: rm.rewards(pack_pairs([(0, tokens, rm.read_positions(tokens))])))


def _can_resume(rm: Runnable, ids: Tensor) -> bool:
    start = ids.numel() // 2

    def resumed() -> Tensor:
        clean = rm.prefill(ids, ["resid_post.0"])
        return rm.resume(clean, "resid_post.0", start, clean.streams["resid_post.0"][None, start:])

    return _agree(rm, rm.reward_alone(ids), resumed)


def _can_run_ragged(rm: Runnable, ids: Tensor) -> bool:
    clean = rm.prefill(ids, ["embed"])
    starts = [clean.ids.numel() - n for n in (12, 5)]
    halves = [0.5 * clean.streams["embed"][start:] for start in starts]
    alone = torch.cat([rm.resume(clean, "embed", s, x[None]).cpu() for s, x in zip(starts, halves, strict=True)])
    return _agree(rm, alone, lambda: rm.resume_ragged(clean, "embed", starts, torch.cat(halves)))


def _agree(rm: Runnable, expected: Tensor, run: Callable[[], Tensor]) -> bool:
    """Whether ``run`` gives the expected rewards; False where the model's forward refuses."""
    tolerance = 5e-2 if rm.dtype in (torch.bfloat16, torch.float16) else 1e-4
    try:
        rewards = run().cpu()
    except REFUSALS:
        return False
    return bool(((expected - rewards).abs() <= tolerance * (1 + expected.abs())).all())

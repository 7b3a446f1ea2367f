"""What a PM's own forward takes, measured once: packed rows, resumed runs, ragged rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rmscope.model.packing import pack_pairs
from rmscope.pairs.pair import SIDES, Pair

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
    """The faster ways that give a PM's rewards as its own forward gives them. All three are False for encoders."""

    packing: bool
    """One row may hold both texts of a pair, with their shared prefix once (needs 4-D attention masks)."""
    resume: bool
    """A clean run can be resumed after any site, from any token on (needs a key-value cache)."""
    ragged: bool
    """Many resumed runs that begin at different tokens can share one row without padding (:mod:`rmscope.model.ragged`)."""


def measure_capabilities(rm: Any) -> Capabilities:
    """Runs the probe in each way and compares its rewards with those of the model's own forward."""
    if not rm.causal:
        return Capabilities(packing=False, resume=False, ragged=False)
    tokens = rm.tokenize(PROBE)
    alone = torch.stack([rm.reward_alone(tokens.side(side)) for side in SIDES])

    def pack() -> tuple[Tensor, Tensor]:
        return alone, rm.rewards(pack_pairs([(0, tokens, rm.read_positions(tokens))]))

    def resume() -> tuple[Tensor, Tensor]:
        site, start = "resid_post.0", tokens.chosen.numel() // 2
        clean = rm.prefill(tokens.chosen, [site])
        return alone[:1], rm.resume(clean, site, start, clean.streams[site][None, start:])

    def resume_many() -> tuple[Tensor, Tensor]:
        clean = rm.prefill(tokens.chosen, ["embed"])
        starts = [clean.ids.numel() - n for n in (12, 5)]
        halves = [0.5 * clean.streams["embed"][start:] for start in starts]
        one_by_one = [rm.resume(clean, "embed", s, x[None]) for s, x in zip(starts, halves, strict=True)]
        return torch.cat(one_by_one), rm.resume_ragged(clean, "embed", starts, torch.cat(halves))

    def agree(run: Callable[[], tuple[Tensor, Tensor]]) -> bool:
        tolerance = 5e-2 if rm.dtype in (torch.bfloat16, torch.float16) else 1e-4
        try:
            expected, rewards = (r.cpu() for r in run())
        except REFUSALS:
            return False
        return bool(((expected - rewards).abs() <= tolerance * (1 + expected.abs())).all())

    can_resume = agree(resume)
    return Capabilities(agree(pack), can_resume, can_resume and agree(resume_many))

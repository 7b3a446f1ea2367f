"""Preflight: what can be wrong with a PM before a single figure is made with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

import torch

from rmscope.files import Progress, silent
from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import SIDES

PROBES = 8
"""Pairs that are scored alone and in a batch."""
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.05}
"""Spread over batches, in SD of the rewards, above which scores count as batch-dependent."""


@dataclass(frozen=True, slots=True)
class Check:
    check: str
    status: Literal["ok", "warn", "fail"]
    detail: str


@dataclass(slots=True)
class Preflight:
    """The checks, and the noise floor τ: the largest change of a reward when its text runs in another batch."""

    checks: list[Check] = field(default_factory=list)
    noise_floor: float = 0.0

    def add(self, check: str, ok: bool, detail: str, status: Literal["warn", "fail"] = "warn") -> None:
        self.checks.append(Check(check, "ok" if ok else status, detail))

    def rows(self) -> list[dict[str, str]]:
        return [asdict(c) for c in self.checks]


def preflight(rm: RewardModel, tokens: Sequence[PairTokens], progress: Progress = silent) -> Preflight:
    """Checks a PM on the tokens of some pairs: head, rendering, read position, packing, batch dependence, precision."""
    found = Preflight()
    config = rm.model.config.get_text_config()
    n = int(rm.model.config.num_labels)
    found.add("head", True, f"{n} output{'s' if n > 1 else ''}, loaded from the checkpoint")
    found.add("rendering", True, f"{rm.rendering.style}, eos {'appended' if rm.rendering.append_eos else 'not appended'}")
    pad = config.pad_token_id
    same = pad is not None and pad == rm.tokenizer.eos_token_id and rm.rendering.append_eos
    if pad is None:
        detail = "no pad id: the last token (transformers itself refuses batches)"
    elif same:
        detail = "pad = eos: transformers reads the token before the appended eos, and so do we"
    else:
        detail = f"the last token that is not padding (id {pad})"
    found.add("read position", pad is not None and not same, detail)
    if rm.splits:
        detail = f"split at any site, removals {'in one row' if rm.branches else 'in rectangles: its attention is its own'}"
    else:
        detail = f"{'cannot be split' if rm.causal else 'an encoder'}: hooks and full forwards, slower"
    found.add("forward", rm.splits, detail)
    if rm.causal:
        detail = "a pair's shared prefix runs once" if rm.packs else "4-D masks change the reward: each text has its own row"
        found.add("packing", rm.packs, detail)
    found.add(
        "precision",
        rm.dtype == torch.float32,
        f"{str(rm.dtype)[6:]}{'' if rm.dtype == torch.float32 else ': effects are noisy'}",
    )
    _batches(rm, list(tokens[:PROBES]), found, progress)
    return found


def _batches(rm: RewardModel, tokens: list[PairTokens], found: Preflight, progress: Progress) -> None:
    together = rm.score_tokens(tokens)
    alone = []
    with torch.no_grad():
        for i, t in enumerate(tokens):
            alone.append([float(rm.reward_alone(t.side(side))) for side in SIDES])
            progress(i + 1, len(tokens), "texts scored alone")
    single = torch.tensor(alone)
    batched = torch.stack([together.chosen, together.rejected], dim=1)
    found.noise_floor = float((single - batched).abs().max())
    spread = float(single.std())
    share = found.noise_floor / spread if spread > 0 else 0.0
    found.add(
        "batches",
        share <= LIMITS[rm.dtype],
        f"a text alone or in a batch: at most {found.noise_floor:.1e} apart ({share:.1e} SD of r)",
    )

"""Small random PMs with their base: as after an adapter on the last blocks, and as after a full fine-tune."""

from __future__ import annotations

from copy import deepcopy

import torch

from rmscope.model.rendering import Rendering
from rmscope.model.reward_model import RewardModel
from tests.model.small import BLOCKS, small_model, tokenizer

FIRST = 2
"""The first block that the adapter changes."""
KINDS = ("adapter", "full")


def pm_with_base(architecture: str, kind: str = "adapter") -> RewardModel:
    """A PM whose weights differ from its base's from block ``FIRST`` on (adapter), or everywhere (full)."""
    model = small_model(architecture)
    base = deepcopy(model).base_model
    torch.manual_seed(7)
    blocks = max((m for m in model.modules() if isinstance(m, torch.nn.ModuleList)), key=len)
    changed = (
        [p for b in blocks[FIRST:] for p in b.parameters()] if kind == "adapter" else list(model.base_model.parameters())
    )
    with torch.no_grad():
        for p in changed:
            if p.dim() == 2:
                p += 0.3 / p.shape[1] ** 0.5 * torch.randn(p.shape[0], 2) @ torch.randn(2, p.shape[1])
    assert len(blocks) == BLOCKS
    return RewardModel(model, tokenizer(), Rendering(style="hh"), architecture, base=lambda: (base, "its base"))

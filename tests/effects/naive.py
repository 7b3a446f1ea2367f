"""The slow exact twin: the transformers module's own forward of one text, with a hook on a site."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from rmscope.model.packing import pad_texts
from rmscope.model.reward_model import RewardModel
from rmscope.sae.base import Sae


def reward_with(rm: RewardModel, ids: Tensor, site: str, change: Callable[[Tensor], Tensor]) -> float:
    """r of one text with the stream [1, T, d] at the site passed through ``change``."""
    layers = max((m for m in rm.model.modules() if isinstance(m, nn.ModuleList)), key=len)

    def before(_module: nn.Module, args: tuple, kwargs: dict) -> tuple:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    def after(_module: nn.Module, _args: tuple, out: Tensor | tuple) -> Tensor | tuple:
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    if site == "embed":
        handle = layers[0].register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = layers[int(site.rsplit(".", 1)[1])].register_forward_hook(after)
    try:
        with torch.no_grad():
            return float(rm.model(ids[None]).logits[0, 0])
    finally:
        handle.remove()


@torch.no_grad()
def ablate_naively(rm: RewardModel, sae: Sae, ids: Tensor, site: str, start: int, groups: Sequence[Sequence[int]]) -> Tensor:
    """R_G of each group of features, by one full forward pass of the text per group, f_tj := 0 from ``start`` on."""
    ids = ids[: rm.read_position(ids) + 1] if rm.causal else ids
    batch = pad_texts([(0, "chosen", ids, start, ids.numel() - 1)], 0)
    clean = rm.rewards(batch)
    f = sae.encode(rm.streams(batch, [site])[site][0, start:].float().cpu())
    effects = []
    for group in groups:
        change = -f[:, list(group)] @ sae.W_dec[list(group)]

        def edit(stream: Tensor, change: Tensor = change) -> Tensor:
            edited = stream.clone()
            edited[0, start:] += change.to(stream)
            return edited

        effects.append((clean - rm.rewards(batch, {site: edit}))[0].float().cpu())
    return torch.stack(effects)


def reward_without(
    rm: RewardModel, ids: Tensor, start: int, taken: Mapping[int, Tensor], clean: Mapping[int, Tensor]
) -> float:
    """r of one text without c [span, d], which ``taken`` holds by block: at the first block the stream is the clean one less
    c, at later ones its coordinate along c is set to that. ``clean`` holds the clean stream of the span by block."""
    blocks = max((m for m in rm.model.modules() if isinstance(m, nn.ModuleList)), key=len)
    with ExitStack() as stack:
        for block, c in taken.items():

            def hook(_m: nn.Module, _a: tuple, out: Tensor | tuple, block: int = block, c: Tensor = c) -> Tensor | tuple:
                x = (out[0] if isinstance(out, tuple) else out).clone()
                for t in range(len(c)):
                    if (size := float(c[t].norm())) > 0:
                        if block == min(taken):
                            x[0, start + t] = clean[block][t] - c[t]
                        else:
                            u = c[t] / size
                            x[0, start + t] += ((clean[block][t] - c[t]) @ u - x[0, start + t] @ u) * u
                return (x, *out[1:]) if isinstance(out, tuple) else x

            stack.callback(blocks[block].register_forward_hook(hook).remove)
        with torch.no_grad():
            return float(rm.model(ids[None]).logits[0, 0])

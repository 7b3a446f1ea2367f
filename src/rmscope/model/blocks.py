"""Where a model's residual stream is: found by watching one forward pass, not by the names or the lengths of its lists.

The blocks are the longest list of modules that run once each, in order, and take and give a stream [rows, tokens, d]. A
vision tower does not run on text, and a list of embeddings takes no stream. ALBERT runs one block in every layer; there each
layer gets a module of its own around the block, so that it has a site of its own.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from rmscope.errors import one_line

REFUSALS = (ValueError, RuntimeError, TypeError, IndexError, AttributeError, KeyError, AssertionError, NotImplementedError)
"""What a model's own forward raises where it does not take a text, a mask, positions or a cache."""


class Layer(nn.Module):
    """One layer of a model that runs the same block in several; the block's weights are not its own."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.shared = [block]  # a list hides the block from torch, which would count it once per layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.shared[0](*args, **kwargs)


def vocabulary_size(model: Any) -> int:
    """How many tokens a model knows; a huge number where its config names none (Canine reads characters by their number)."""
    return int(getattr(model.config.get_text_config(), "vocab_size", 0) or 1 << 30)


@torch.no_grad()
def find_blocks(model: Any, ids: Tensor, d: int) -> tuple[nn.ModuleList, str]:
    """The blocks, and "" or the reason why there are none. ``ids`` [T] is a text, ``d`` the width of the stream."""
    if int(ids.max()) >= vocabulary_size(model):  # on a GPU such a forward ends the process
        return nn.ModuleList(), "its tokenizer gives tokens that it does not know"
    separate_layers(model)
    every = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    inside = {id(child) for blocks in every for child in blocks}
    lists = [blocks for blocks in every if id(blocks) not in inside]  # Funnel keeps a list per resolution of its stream
    calls: list[tuple[int, bool]] = []
    failure = ""

    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        stream = args[0] if args else kwargs.get("hidden_states")
        parts = list(output) if isinstance(output, (tuple, list)) and output else [output]
        fits = [isinstance(x, Tensor) and x.shape == (1, ids.numel(), d) for x in (stream, *parts)]
        calls.append((id(module), fits[:2] == [True, True] and sum(fits) == 2))  # Reformer's blocks carry two streams

    with ExitStack() as stack:
        for module in {id(m): m for blocks in lists for m in blocks}.values():
            stack.callback(module.register_forward_hook(watch, with_kwargs=True).remove)
        try:
            model(ids[None], attention_mask=torch.ones_like(ids)[None])
        except REFUSALS as error:
            failure = one_line(error)

    def is_trunk(blocks: nn.ModuleList) -> bool:
        places = {id(block): i for i, block in enumerate(blocks)}
        own = [(places[module], fits) for module, fits in calls if module in places]
        return own == [(i, True) for i in range(len(blocks))]

    if trunks := [blocks for blocks in lists if is_trunk(blocks)]:
        return max(trunks, key=len), ""
    return nn.ModuleList(), failure or "no list of its modules runs once each on a stream [rows, tokens, d]"


def separate_layers(model: Any) -> None:
    """Gives each layer of an ALBERT a module of its own; its layers run the same groups of blocks."""
    encoder: Any = getattr(model.base_model, "encoder", None)
    groups = getattr(encoder, "albert_layer_groups", None)
    if not isinstance(groups, nn.ModuleList) or any(isinstance(group, Layer) for group in groups):
        return
    n = model.config.num_hidden_layers
    encoder.shared_groups = groups
    encoder.albert_layer_groups = nn.ModuleList(Layer(groups[i * len(groups) // n]) for i in range(n))
    encoder.config.num_hidden_groups = n

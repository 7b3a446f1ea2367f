"""Where a model's residual stream is: found by watching one forward pass, not by the names or the lengths of its lists.

The blocks are a list of modules that run once each, in order, each on the stream [rows, tokens, d] of the one before.
If there are several such lists, the last one to run counts: in an encoder-decoder the decoder's. A vision tower does not run
on text, and a list of embeddings takes no stream. XLM keeps a list for each part of a block, and none of these hands on the
stream. ALBERT runs one block in every layer; there each layer gets a module of its own around the block, so that it has a
site of its own.
"""

from __future__ import annotations

from contextlib import ExitStack
from itertools import pairwise
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
def find_blocks(model: Any, ids: Tensor, d: int) -> tuple[nn.ModuleList, int, str]:
    """The blocks, how long the tuple is that they return (0: the stream alone), and "" or the reason why there are none.

    ``ids`` [T] is a text, ``d`` the width of the stream.
    """
    if int(ids.max()) >= vocabulary_size(model):  # on a GPU such a forward ends the process
        return nn.ModuleList(), 0, "its tokenizer gives tokens that it does not know"
    separate_layers(model)
    every = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    inside = {id(child) for blocks in every for child in blocks}
    lists = [blocks for blocks in every if id(blocks) not in inside]  # Funnel keeps a list per resolution of its stream
    calls: list[tuple[int, Tensor | None, Tensor | None]] = []
    """(module, the stream before and after it; None where it works on another shape, or on two streams)."""
    sizes: dict[int, int] = {}
    failure = ""

    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        stream = args[0] if args else kwargs.get("hidden_states")
        parts = list(output) if isinstance(output, (tuple, list)) and output else [output]
        fits = [isinstance(x, Tensor) and x.shape == (1, ids.numel(), d) for x in (stream, *parts)]
        is_one = fits[:2] == [True, True] and sum(fits) == 2  # Reformer's blocks carry two streams
        before, after = (x.clone() if is_one and isinstance(x, Tensor) else None for x in (stream, parts[0]))
        calls.append((id(module), before, after))
        sizes[id(module)] = len(output) if isinstance(output, (tuple, list)) else 0

    with ExitStack() as stack:
        for module in {id(m): m for blocks in lists for m in blocks}.values():
            stack.callback(module.register_forward_hook(watch, with_kwargs=True).remove)
        try:
            model(ids[None], attention_mask=torch.ones_like(ids)[None])
        except REFUSALS as error:
            failure = one_line(error)

    def is_trunk(blocks: nn.ModuleList) -> bool:
        """Whether each block runs once, in order, and takes what the one before gives: XLM's lists are parts of blocks."""
        places = {id(block): i for i, block in enumerate(blocks)}
        own = [(places[module], before, after) for module, before, after in calls if module in places]
        if [i for i, _, _ in own] != list(range(len(blocks))):
            return False
        streams = [(before, after) for _, before, after in own if before is not None and after is not None]
        return len(streams) == len(blocks) and all(torch.equal(a[1], b[0]) for a, b in pairwise(streams))

    def last_run(blocks: nn.ModuleList) -> tuple[bool, int]:
        ends = [n for n, (module, _, _) in enumerate(calls) if module == id(blocks[-1])]
        return len(blocks) > 1, ends[-1]

    if trunks := [blocks for blocks in lists if is_trunk(blocks)]:
        blocks = max(trunks, key=last_run)  # of an encoder-decoder the decoder's, from which the reward is read
        return blocks, sizes[id(blocks[-1])], ""
    return nn.ModuleList(), 0, failure or "no list of its modules hands one stream [rows, tokens, d] from each to the next"


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

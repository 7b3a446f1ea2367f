"""A permanent edit of a PM: after a block, the stream passes through a function, however the model is called.

The edit is a part of the block's own forward, not a hook: every reader of the site sees the edited stream, and a run that is
resumed at the site does not edit twice. A text's first token is never edited: it is an attention sink of huge norm.

This file needs only torch: ``rmscope edit --export`` copies it into the folder that it writes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def install(base: nn.Module, blocks: nn.ModuleList, edits: Mapping[int, Callable[[Tensor], Tensor]]) -> None:
    """Makes ``edits[l]``, which maps [rows, width, d] to the same shape, a part of block ``l``. ``base`` runs the blocks."""
    firsts = _Firsts()
    base.register_forward_pre_hook(firsts, with_kwargs=True)
    for index, edit in edits.items():
        blocks[index].forward = _with_edit(blocks[index].forward, edit, firsts)  # type: ignore[method-assign]


def install_beside_base(
    base: nn.Module,
    blocks: nn.ModuleList,
    others: Mapping[int, nn.Module],
    edits: Mapping[int, Callable[[Tensor, Tensor], Tensor]],
) -> None:
    """The same for edits that read the base's stream too: they map the PM's stream and the base's to a new one.

    ``others`` holds the base's own blocks from the first that differs to the last edited one. They run beside the PM's, in
    the same pass. A pass that begins in the middle of a text, or after the first of these blocks, is refused: the base's
    stream is not known there.
    """
    firsts, beside = _Firsts(), _BaseStream()
    base.register_forward_pre_hook(firsts, with_kwargs=True)
    base.register_forward_pre_hook(beside.begin, with_kwargs=True)
    for index, other in others.items():
        forward = _with_base_block(blocks[index].forward, other, beside, index == min(others))
        if index in edits:
            forward = _with_edit(forward, _reading_base(edits[index], beside), firsts)
        blocks[index].forward = forward  # type: ignore[method-assign]


def _named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a module's forward by name."""
    return dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs


class _BaseStream:
    """The base's stream in the current pass."""

    def __init__(self) -> None:
        self.stream: Tensor | None = None

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Called before a pass. ValueError where it goes on from cached keys and values."""
        self.stream = None
        cache = _named(module, args, kwargs).get("past_key_values")
        if cache is not None and cache.get_seq_length():
            raise ValueError("an edit of what training wrote needs whole texts: the base's keys and values are not cached")


def _with_base_block(forward: Callable[..., Any], other: nn.Module, beside: _BaseStream, first: bool) -> Callable[..., Any]:
    """A block's forward that runs the base's block too."""

    def both(*args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        stream = x if first else beside.stream
        if stream is None:
            raise ValueError("an edit of what training wrote needs the pass to begin at the first trained block")
        own = [None if hasattr(v, "get_seq_length") else v for v in args[1:]]
        named = {k: None if hasattr(v, "get_seq_length") else v for k, v in kwargs.items() if k != "hidden_states"}
        output = forward(*args, **kwargs)
        after = other(stream, *own, **named)
        beside.stream = after[0] if isinstance(after, tuple) else after
        return output

    return both


def _reading_base(edit: Callable[[Tensor, Tensor], Tensor], beside: _BaseStream) -> Callable[[Tensor], Tensor]:
    def edited(x: Tensor) -> Tensor:
        assert beside.stream is not None
        return edit(x, beside.stream)

    return edited


class _Firsts:
    """Marks the tokens of the current pass that are the first of their text, [rows or 1, width]."""

    def __init__(self) -> None:
        self.mask = torch.zeros(0, 0, dtype=torch.bool)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = _named(module, args, kwargs)
        given: Any = named.get("input_ids") if named.get("input_ids") is not None else named["inputs_embeds"]
        mask, positions, cache = (named.get(name) for name in ("attention_mask", "position_ids", "past_key_values"))
        if positions is not None:
            self.mask = positions == 0
        elif mask is not None and mask.dim() == 2:  # padding may be on the left
            seen = mask.long()
            self.mask = ((seen.cumsum(1) == 1) & (seen > 0))[:, -given.shape[1] :]
        else:
            begins = cache is None or not cache.get_seq_length()
            self.mask = (torch.arange(given.shape[1], device=given.device) == 0)[None] & begins


def _with_edit(forward: Callable[..., Any], edit: Callable[[Tensor], Tensor], firsts: _Firsts) -> Callable[..., Any]:
    def edited(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        x = output[0] if isinstance(output, tuple) else output
        changed = torch.where(firsts.mask.to(x.device)[..., None], x, edit(x))
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return edited

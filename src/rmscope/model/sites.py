"""A PM's residual stream: its sites, the blocks that they belong to, and hooks that read or replace the stream there.

``resid_post.L`` is the stream after block L (from 0), ``embed`` the stream before block 0. Where the PM's base is known, the
stream has two parts, and each is a site of its own: ``base.L`` is the base's own stream after block L, ``diff.L`` is what
preference training added to it (:mod:`rmscope.model.base`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rmscope.errors import InputError
from rmscope.model.blocks import find_blocks, vocabulary_size
from rmscope.model.packing import Batch
from rmscope.model.site_names import whole_site

Edit = Callable[[Float[Tensor, "rows width d"]], Float[Tensor, "rows width d"]]
"""Takes the stream at a site and returns the stream that the model goes on with."""


@dataclass(frozen=True, slots=True)
class CleanRun:
    """What an unedited forward pass of one text left behind."""

    ids: Tensor
    """Token ids [T], up to the read position."""
    streams: dict[str, Tensor]
    """The residual stream at each watched site, [T, d]."""
    keys: list[tuple[Tensor, Tensor]]
    """Keys and values of each layer, [1, kv_heads, T, size]."""
    reward: float
    rest: dict[str, Tensor] = field(default_factory=dict, kw_only=True)
    """At sites that are a part of the stream, the other part, [T, d]."""

    def cache(self, length: int, rows: int = 1) -> Any:
        """A transformers cache of the first ``length`` positions for ``rows`` rows. It holds views: nothing is copied."""
        from transformers import DynamicCache

        cache: Any = DynamicCache()
        for i, (k, v) in enumerate(self.keys):
            cache.update(k[:, :, :0], v[:, :, :0], i)
            layer = cache.layers[i]
            layer.keys = k[:, :, :length].expand(rows, -1, -1, -1)
            layer.values = v[:, :, :length].expand(rows, -1, -1, -1)
        return cache


@dataclass(frozen=True, slots=True)
class Clamp:
    """An edit that sets one coordinate of some tokens, x_t · u_t = v_t, and leaves all others as they are."""

    index: Int[Tensor, " n"]
    """The tokens' places, rows end to end."""
    unit: Float[Tensor, "n d"]
    value: Float[Tensor, " n"]

    def __call__(self, x: Float[Tensor, "rows width d"]) -> Float[Tensor, "rows width d"]:
        flat, index, unit = x.flatten(0, 1), self.index.to(x.device), self.unit.to(x)
        missing = self.value.to(x) - (flat[index] * unit).sum(1)
        return flat.index_add(0, index, missing[:, None] * unit).view_as(x)

    def among(self, kept: Int[Tensor, " kept"]) -> Clamp:
        """The same edit of a stream that holds only some tokens, whose places before were ``kept`` (ascending)."""
        kept = kept.to(self.index)
        place = torch.searchsorted(kept, self.index).clamp_max(len(kept) - 1)
        found = kept[place] == self.index
        return Clamp(place[found], self.unit[found], self.value[found])


class StopForward(Exception):  # noqa: N818
    """Raised by a hook to end a forward pass early."""


def keep_stream(streams: dict[str, Tensor], site: str) -> Edit:
    """An edit that stores the stream in ``streams`` and leaves it as it is."""

    def edit(x: Tensor) -> Tensor:
        streams[site] = x
        return x

    return edit


class Trunk:
    """A PM without its head: the transformers module itself, its blocks and sites."""

    def __init__(self, model: Any, ids: Tensor | None = None) -> None:
        """``ids`` [T] is a text on which the blocks are found."""
        self.model = model
        self.text_config = model.config.get_text_config()
        self.d_model = int(getattr(self.text_config, "hidden_size", 0) or getattr(self.text_config, "d_model", 0))
        text = (torch.arange(1, 5) if ids is None else ids[: self.context]).to(self.device)
        self.blocks, self.outputs, self.why_no_blocks = find_blocks(model, text, self.d_model)
        self.sites = ["embed", *(f"resid_post.{i}" for i in range(len(self.blocks)))] if len(self.blocks) else []

    @property
    def default_sites(self) -> list[str]:
        """The sites at about one third and two thirds of the depth. InputError where the PM has none."""
        self._need_blocks()
        depths = {max(0, round(len(self.blocks) * share) - 1) for share in (1 / 3, 2 / 3)}
        return [f"resid_post.{i}" for i in sorted(depths)]

    def _need_blocks(self) -> None:
        if not self.sites:
            raise InputError(
                f"{type(self.model).__name__} has no residual stream that can be studied ({self.why_no_blocks}); score it, "
                "or name another PM."
            )

    def site_index(self, site: str) -> int:
        """The block whose output the site is; -1 for ``embed``. Raises InputError that lists the sites of this PM."""
        self._need_blocks()
        if (whole := whole_site(site)) not in self.sites:
            last = self.sites[-1]
            raise InputError(f"There is no site {site!r} in this PM; it has embed and resid_post.0 .. {last}.")
        return self.sites.index(whole) - 1

    @property
    def bytes(self) -> int:
        """Bytes of the weights."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def context(self) -> int:
        """The longest text in tokens; a huge number if none is stated. RoBERTa's positions begin after its padding id."""
        stated = int(getattr(self.text_config, "max_position_embeddings", 0) or 0)
        longest = stated if stated > 0 else 1 << 30  # XLNet states -1
        embeddings = getattr(getattr(self.model.base_model, "embeddings", None), "position_embeddings", None)
        padding = getattr(embeddings, "padding_idx", None)
        return longest if padding is None else longest - int(padding) - 1

    @property
    def pad_id(self) -> int:
        """The id that fills batches; 0 where the model has none, or none that it can embed."""
        pad = getattr(self.text_config, "pad_token_id", None)
        return 0 if pad is None or not 0 <= pad < vocabulary_size(self.model) else int(pad)

    @property
    def segment_end(self) -> int | None:
        """The token that ends the first of two segments, where the model tells them apart by token types."""
        return None

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """The arguments of the model's forward on a batch."""
        inputs = batch.inputs(self.device, self.dtype)
        if self.segment_end is not None:
            ends = (inputs["input_ids"] == self.segment_end).long()
            inputs["token_type_ids"] = (ends.cumsum(1) > ends).long()
        return inputs

    @cached_property
    def attention_window(self) -> int:
        """The shortest window of a layer's attention, in tokens. Packed rows carry no windows, so longer texts run alone."""
        names = ("sliding_window", "window_size", "attention_chunk_size")
        windows = [getattr(self.text_config, name, None) for name in names]
        return min((w for w in windows if isinstance(w, int) and w > 0), default=1 << 30)

    @contextmanager
    def edit_streams(self, edits: Mapping[str, Edit], stop: bool = False) -> Iterator[None]:
        """Within the context, each edit changes the stream at its site; with ``stop``, StopForward ends the pass there."""
        by_index = {self.site_index(site): edit for site, edit in edits.items()}
        last = max(by_index) if stop else None

        def change(index: int, stream: Tensor) -> Tensor:
            changed = by_index[index](stream)
            if index == last:
                raise StopForward
            return changed

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (change(-1, args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": change(-1, kwargs["hidden_states"])}

        def after(index: int, _module: nn.Module, _inputs: Any, output: Any) -> Any:
            if isinstance(output, (tuple, list)):
                return (change(index, output[0]), *output[1:])
            return change(index, output)

        with ExitStack() as stack:
            for index in by_index:
                if index < 0:
                    stack.callback(self.blocks[0].register_forward_pre_hook(before, with_kwargs=True).remove)
                else:
                    stack.callback(self.blocks[index].register_forward_hook(partial(after, index)).remove)
            yield

    @contextmanager
    def replace_stream(self, site: str, stream: Float[Tensor, "rows width d"]) -> Iterator[None]:
        """Within the context, the stream at ``site`` is ``stream``, and no block up to the site runs.

        The model's own forward still makes masks and positions for the later blocks: no code per architecture.
        """
        if site == "embed":
            with self.edit_streams({site: lambda _x: stream}):
                yield
            return

        output = (stream, *[None] * (self.outputs - 1)) if self.outputs else stream

        def give(*_args: Any, **_kwargs: Any) -> Any:
            return output

        skipped = self.blocks[: self.site_index(site) + 1]
        own = [block.__dict__.get("forward") for block in skipped]
        for block in skipped:
            block.forward = give
        try:
            yield
        finally:
            for block, forward in zip(skipped, own, strict=True):
                if forward is None:
                    del block.forward
                else:
                    block.forward = forward

"""Many continuations of one clean text in one ragged row, each with its own stream: exact ablation runs these.

A continuation is the text from some token on, with an edited stream at a site. In attention its tokens see the clean run's
keys before it began (one product for all continuations, without a copy) and its own keys. The last block makes keys and
values for all tokens, but runs the rest at the read position only. The model's own blocks call this attention through
transformers' attention interface. Models without it (GPT-J, Bloom, Falcon) and texts longer than a layer's window run as
rectangles (``RewardModel.resume``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rmscope.model.sites import Clamp, CleanRun, StopForward, Trunk, keep_stream

NAME = "rmscope_ragged"
FUSED_TOKENS = 24
"""From this many tokens per continuation on, torch's fused attention is faster, although it copies the clean keys. On one
core: 4.0 ms against 7.8 for 20 continuations of 51 tokens, 13 ms against 4 for 100 of 10 tokens (prefix: 130 tokens)."""
UNSUPPORTED = ("s_aux", "position_bias")
"""Arguments of attention layers that change the scores and are not supported here."""


class _Row:
    """Where the continuations are in the row, and the clean keys that they see. A second pass runs the last block."""

    def __init__(self, text: CleanRun, starts: Int[Tensor, " continuations"], last: int) -> None:
        self.starts, self.last = starts, last
        self.reading = False
        self.kept: tuple[Tensor, Tensor]
        self.seen: set[int] = set()
        lengths = text.ids.numel() - starts
        n, offsets, device = int(lengths.sum()), lengths.cumsum(0) - lengths, starts.device
        prefix, longest = int(starts.max()), int(lengths.max())
        self.clean = [(k[0, :, :prefix], v[0, :, :prefix]) for k, v in text.keys]
        owner = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)
        place = torch.arange(n, device=device) - offsets[owner]
        self.positions = place + starts[owner]
        self.reads = offsets + lengths - 1
        column = torch.arange(longest, device=device)
        self.padded = (offsets[:, None] + column).clamp_max(n - 1)
        self.ragged = owner * longest + place
        far = torch.arange(prefix, device=device) < starts[:, None]
        near = (column <= column[:, None]).expand(len(lengths), -1, -1)
        every = torch.cat([far[:, None].expand(-1, longest, -1), near], -1)
        last_of_each = torch.cat([far, column < lengths[:, None]], -1)[:, None]
        self.mask, self.read_mask = (torch.where(seen, 0.0, float("-inf")) for seen in (every, last_of_each))


_row: ContextVar[_Row] = ContextVar("row")


def _attention(
    module: Any,
    query: Float[Tensor, "1 heads tokens size"],
    key: Float[Tensor, "1 kv_heads tokens size"],
    value: Float[Tensor, "1 kv_heads tokens size"],
    _mask: Any = None,
    scaling: float | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Float[Tensor, "1 tokens heads size"], None]:
    """What a block of transformers calls in place of its attention, within ``_ragged_attention``."""
    row, layer = _row.get(), int(module.layer_idx)
    if given := [name for name in UNSUPPORTED if others.get(name) is not None]:
        raise ValueError(f"attention with {given[0]} is not supported in ragged batches")
    row.seen.add(layer)
    if layer == row.last and not row.reading:
        row.kept = key[0][:, row.padded], value[0][:, row.padded]
        raise StopForward
    kv_heads, size = key.shape[1], query.shape[-1]
    q = query[0].unflatten(0, (kv_heads, -1))
    if row.reading:
        own, mask, q = row.kept, row.read_mask, q.transpose(1, 2)[:, :, :, None]
    else:
        own, mask, q = (key[0][:, row.padded], value[0][:, row.padded]), row.mask, q[:, :, row.padded].transpose(1, 2)
    out = _attend(q, row.clean[layer], own, mask, scaling or size**-0.5, softcap)
    out = out.permute(1, 3, 0, 2, 4).flatten(0, 1).flatten(1, 2)  # continuations x tokens, heads
    return (out if row.reading else out[row.ragged])[None], None


def _attend(
    q: Float[Tensor, "kv_heads continuations group tokens size"],
    clean: tuple[Tensor, Tensor],
    own: tuple[Float[Tensor, "kv_heads continuations longest size"], Float[Tensor, "kv_heads continuations longest size"]],
    mask: Float[Tensor, "continuations tokens keys"],
    scaling: float,
    softcap: float | None,
) -> Float[Tensor, "kv_heads continuations group tokens size"]:
    """Attention to the clean keys before the continuations (shared) and to each continuation's own."""
    (far_k, far_v), prefix = clean, clean[0].shape[1]
    if softcap is None and q.shape[3] >= FUSED_TOKENS:
        k, v = (
            torch.cat([far[:, None].expand(-1, q.shape[1], -1, -1), near], 2).transpose(0, 1)
            for far, near in zip((far_k, far_v), own, strict=True)
        )
        queries = q.transpose(0, 1).flatten(1, 2)
        out = scaled_dot_product_attention(
            queries, k, v, attn_mask=mask[:, None].to(q.dtype), scale=scaling, enable_gqa=True
        )
        return out.unflatten(1, (q.shape[0], -1)).transpose(0, 1)
    flat = (q * scaling).flatten(1, 3)
    far = (flat @ far_k.transpose(1, 2)).unflatten(1, q.shape[1:4])
    near = (flat.unflatten(1, (q.shape[1], -1)) @ own[0].transpose(2, 3)).unflatten(2, q.shape[2:4])
    scores = torch.cat([far, near], -1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).add_(mask[:, None])
    weights = scores.softmax(-1).to(q.dtype)
    out = (weights[..., :prefix].flatten(1, 3) @ far_v).unflatten(1, q.shape[1:4])
    return out + (weights[..., prefix:].flatten(2, 3) @ own[1]).unflatten(2, q.shape[2:4])


@contextmanager
def _ragged_attention(model: Any, row: _Row) -> Iterator[None]:
    """Within the context, the model's attention is that of the ragged row."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values()
    before = [c._attn_implementation for c in configs]
    token = _row.set(row)
    try:
        for c in configs:
            c._attn_implementation = NAME
        yield
    finally:
        for c, name in zip(configs, before, strict=True):
            c._attn_implementation = name
        _row.reset(token)


def ragged_states(
    trunk: Trunk,
    text: CleanRun,
    site: str,
    starts: Sequence[int],
    stream: Float[Tensor, "tokens d"],
    later: Mapping[str, Clamp],
) -> Float[Tensor, "continuations d"]:
    """The final hidden state of each continuation. Continuation c holds the tokens ``starts[c]`` .. read position.

    ``stream`` holds the continuations' streams at ``site``, end to end; ``later`` edits it at later sites. No block up to
    the site runs again, and no token before a start. Raises what the model raises where it does not take such a row
    (``RewardModel.capabilities.ragged``).
    """
    upto, last = trunk.site_index(site), len(trunk.blocks) - 1
    n = text.ids.numel()
    row = _Row(text, torch.as_tensor(starts, device=trunk.device), last)
    stream = stream.to(trunk.device, trunk.dtype)
    with torch.no_grad(), _ragged_attention(trunk.model, row):
        if upto < last:
            inside = {s: clamp for s, clamp in later.items() if trunk.site_index(s) < last}
            stream = _input_of_last(trunk, text, row, site, stream, inside)
        row.reading = True
        reads = torch.full_like(row.starts, n - 1)
        at_end = {s: clamp.among(row.reads) for s, clamp in later.items() if trunk.site_index(s) == last}
        with trunk.edit_streams(at_end):
            hidden = _run(trunk, text, reads, site if upto == last else trunk.sites[last], stream[row.reads])
    if not set(range(upto + 1, last + 1)) <= row.seen:
        raise ValueError("a block's attention does not go through transformers' attention interface")
    return hidden


def _input_of_last(
    trunk: Trunk, text: CleanRun, row: _Row, site: str, stream: Tensor, later: Mapping[str, Clamp]
) -> Float[Tensor, "tokens d"]:
    """The last block's input. Runs the blocks between the site and the last one, whose keys it leaves in ``row``."""
    before_last = trunk.sites[row.last]
    streams: dict[str, Tensor] = {}
    keep = keep_stream(streams, before_last)

    def edit_and_keep(x: Tensor) -> Tensor:
        return keep(later[before_last](x) if before_last in later else x)

    try:
        with trunk.edit_streams({**later, before_last: edit_and_keep}):
            _run(trunk, text, row.positions, site, stream)
    except StopForward:
        return stream if site == before_last else streams[before_last][0]
    raise ValueError("the last block's attention does not go through transformers' attention interface")


def _run(trunk: Trunk, text: CleanRun, positions: Tensor, site: str, stream: Tensor) -> Float[Tensor, "tokens d"]:
    """Final hidden states of one row by the model's own forward, with its stream at ``site`` replaced."""
    ids = text.ids[positions.cpu()].to(trunk.device)
    with trunk.replace_stream(site, stream[None]):
        out = trunk.model.base_model(ids[None], position_ids=positions[None], use_cache=False)
    return out.last_hidden_state[0]  # type: ignore[no-any-return]

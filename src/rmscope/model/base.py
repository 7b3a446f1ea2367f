"""The base of a PM: the same blocks before preference training (docs/difference.md).

At a site the stream of a PM is x = b + δ, with b the stream of its base on the same tokens and δ what preference training
wrote. ``diff.L`` is δ after block L, ``base.L`` is b, and ``both.L`` is [δ, b], of width 2 d. The first blocks that training
left as they were are run once for both, and weights that are equal are one tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rmscope.errors import InputError
from rmscope.io import content_hash
from rmscope.model.loading import fingerprint
from rmscope.model.onednn import use_onednn
from rmscope.model.packing import Batch
from rmscope.model.site_names import BASE, BOTH, DIFF, kind_of
from rmscope.model.sites import Edit, StopForward, Trunk, keep_stream


class Base(Trunk):
    """A base beside its PM.

    Raises:
        InputError: it has other blocks or shapes than the PM, or the same weights everywhere.
    """

    def __init__(self, model: Any, name: str, pm: Trunk) -> None:
        super().__init__(model.eval().requires_grad_(False))
        self.name, self._pm = name, pm
        if len(self.blocks) < len(pm.blocks):
            raise InputError(
                f"The base {name} has {len(self.blocks)} blocks, the PM {len(pm.blocks)}; name the base that the PM was "
                "trained from."
            )
        del self.blocks[len(pm.blocks) :]
        changes = share_weights(pm.model.base_model, self.model.base_model, name)
        self.changes = [relative_change(changes, block) for block in self.blocks]
        """|W - W0| / |W0| of each block: how far preference training moved it."""
        inside = {id(p) for block in self.blocks for p in block.parameters()}
        last = {id(p) for module in self._after_blocks() for p in module.parameters()}
        outside = [p for p in self.model.base_model.parameters() if id(p) not in inside | last]
        self.embeddings_differ = any(changes.get(id(p), 0.0) > 0 for p in outside)
        moved = [i for i, change in enumerate(self.changes) if change > 0]
        if not moved and not self.embeddings_differ:
            raise InputError(
                f"The base {name} has the PM's own weights: preference training changed no block, so there is no difference "
                "to study; name another --base, or study sites such as resid_post.6."
            )
        self.first = 0 if self.embeddings_differ else moved[0]
        """The first block after which the streams differ."""
        self.start = None if self.embeddings_differ else pm.sites[self.first]
        """The last site at which both streams are the same; None where not even the embeddings are."""
        for block in self.blocks[self.first :]:
            use_onednn(block)
        self.identity = content_hash(fingerprint(self.model.base_model))

    @property
    def segment_end(self) -> int | None:
        return self._pm.segment_end

    def check_site(self, site: str, index: int) -> None:
        """InputError where the site, after block ``index``, is before the first block that preference training changed."""
        if index < self.first:
            raise InputError(
                f"There is no site {site}: preference training changed nothing before block {self.first}; name a site "
                f"from {DIFF}.{self.first} to {DIFF}.{len(self.blocks) - 1}."
            )

    def _after_blocks(self) -> list[nn.Module]:
        """The modules that come after the list of blocks, such as the final norm: they do not touch a site."""
        modules = list(self.model.base_model.children())
        place = next((i for i, m in enumerate(modules) if m is self.blocks or self.blocks in set(m.modules())), -1)
        return modules[place + 1 :]

    @torch.no_grad()
    def streams(
        self, batch: Batch, blocks: Sequence[int], start: Float[Tensor, "rows width d"] | None, options: Mapping[str, Any]
    ) -> dict[int, Float[Tensor, "rows width d"]]:
        """b after some blocks. ``start`` is the stream at :attr:`start`; no block up to it runs again."""
        kept: dict[str, Tensor] = {}
        sites = [f"resid_post.{block}" for block in blocks]
        given = nullcontext() if self.start is None or start is None else self.replace_stream(self.start, start)
        with suppress(StopForward), given, self.edit_streams({s: keep_stream(kept, s) for s in sites}, stop=True):
            self.model.base_model(**self.inputs(batch), **options)
        return {block: kept[site] for block, site in zip(blocks, sites, strict=True)}


def split_stream(site: str, x: Float[Tensor, "*tokens d"], b: Float[Tensor, "*tokens d"]) -> tuple[Tensor, Tensor]:
    """(the part of the stream at ``diff.L``, ``base.L`` or ``both.L``, the rest that :func:`whole_stream` takes)."""
    return (b, x - b) if kind_of(site) == BASE else (_part(site, x, b), b)


def _part(site: str, x: Tensor, rest: Tensor) -> Tensor:
    return torch.cat([x - rest, rest], -1) if kind_of(site) == BOTH else x - rest


def whole_stream(site: str, part: Tensor, rest: Tensor) -> Float[Tensor, "*tokens d"]:
    """The whole stream from a part of it."""
    return sum(part.tensor_split(2, -1)) if kind_of(site) == BOTH else part + rest  # type: ignore[return-value]


def edit_of_part(site: str, edit: Edit, rest: Tensor) -> Edit:
    """An edit of the whole stream that edits a part of it."""
    return lambda x: whole_stream(site, edit(_part(site, x, rest)), rest)


def share_weights(pm: nn.Module, base: nn.Module, name: str) -> dict[int, float]:
    """Makes equal weights of both one tensor. Gives |W - W0| and |W0| of the others, by the base's parameter (its id)."""
    own, changes = dict(pm.named_parameters()), {}
    for key, p in base.named_parameters():
        if key not in own:
            continue  # such as a pooling layer after the blocks
        q = own[key]
        rows = min(len(p), len(q)) if p.dim() else 0
        if p.shape[1:] != q.shape[1:] or (p.shape != q.shape and not _is_embedding(base, key)):
            raise InputError(
                f"The base {name} holds {key} as {list(p.shape)}, the PM as {list(q.shape)}; name the base that the PM was "
                "trained from."
            )
        if p.shape == q.shape and torch.equal(p.data, q.data):
            p.data = q.data
        elif p.shape != q.shape and torch.equal(p.data[:rows], q.data[:rows]):
            p.data = q.data  # the vocabulary was padded, or tokens were added that the base never saw
        elif p.shape != q.shape:
            grown = q.data.clone()
            grown[:rows] = p.data[:rows]
            p.data = grown
        if p.data_ptr() != q.data_ptr():
            changes[id(p)] = float((q.data.float() - p.data.float()).norm())
    return changes


def _is_embedding(base: nn.Module, key: str) -> bool:
    return isinstance(base.get_submodule(key.rpartition(".")[0]), nn.Embedding)


def relative_change(changes: Mapping[int, float], block: nn.Module) -> float:
    """|W - W0| / |W0| over all weights of a block."""
    moved = sum(changes.get(id(p), 0.0) ** 2 for p in block.parameters())
    total = sum(float(p.float().square().sum()) for p in block.parameters())
    return float((moved / total) ** 0.5) if total else 0.0

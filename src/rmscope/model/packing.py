"""Batches of pairs for one forward pass, with the prefix that both sides share stored once.

A packed row is prefix + chosen suffix + rejected suffix. A 4-D attention mask and positions keep each text's stream what the
model computes for it alone. This saves a third of the tokens of hh-rlhf. Models without such masks get one row per text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rmscope.model.rendering import NO_LIMIT, PairTokens
from rmscope.pairs.pair import SIDES

UNIT = 64
"""Work is cut into units of 64 pairs in file order. Batches never cross a unit, so a resumed run gives the same results."""


@dataclass(frozen=True, slots=True)
class Text:
    """Where one text is in a batch: its row, the columns of its tokens in order, its divergence and read position."""

    pair: int
    side: str
    row: int
    columns: Int[Tensor, " tokens"]
    divergence: int
    read: int

    @property
    def span(self) -> Int[Tensor, " span"]:
        """Columns of the span: divergence .. read position."""
        return self.columns[self.divergence : self.read + 1]


@dataclass(frozen=True, slots=True)
class Batch:
    """Token ids, positions, the attention mask (4-D for packed rows, 2-D for padded ones) and the texts."""

    ids: Int[Tensor, "rows width"]
    positions: Int[Tensor, "rows width"]
    mask: Tensor
    texts: list[Text]
    rest: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)
    """At sites that are a part of the stream, the other part, [rows, width, d]; kept when the stream is computed."""

    def inputs(self, device: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        """The arguments of the model's forward."""
        mask = self.mask.to(device)
        if mask.dim() == 4:
            mask = torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill_(~mask, torch.finfo(dtype).min)
            return {"input_ids": self.ids.to(device), "position_ids": self.positions.to(device), "attention_mask": mask}
        return {"input_ids": self.ids.to(device), "attention_mask": mask}

    def only(self, rows: Int[Tensor, " kept"]) -> Batch:
        """The batch of these rows alone, in ascending order."""
        place = {int(row): i for i, row in enumerate(rows)}
        texts = [replace(t, row=place[t.row]) for t in self.texts if t.row in place]
        rest = {site: part[rows.to(part.device)] for site, part in self.rest.items()}
        return Batch(self.ids[rows], self.positions[rows], self.mask[rows], texts, rest)


def packed_length(tokens: PairTokens) -> int:
    """Tokens of both sides, with their shared prefix once."""
    return tokens.chosen.numel() + tokens.rejected.numel() - tokens.shared


def pack_pairs(pairs: Sequence[tuple[int, PairTokens, dict[str, int]]]) -> Batch:
    """One row per pair. ``pairs`` holds (index, tokens, read position of each side)."""
    lines, positions, segments, texts = [], [], [], []
    for row, (index, tokens, reads) in enumerate(pairs):
        p, c, r = tokens.shared, tokens.chosen.numel(), tokens.rejected.numel()
        lines.append(torch.cat([tokens.chosen, tokens.rejected[p:]]))
        positions.append(torch.cat([torch.arange(c), torch.arange(p, r)]))
        segments.append(torch.tensor([0] * p + [1] * (c - p) + [2] * (r - p)))
        columns = {"chosen": torch.arange(c), "rejected": torch.cat([torch.arange(p), torch.arange(c, c + r - p)])}
        texts += [Text(index, s, row, columns[s], tokens.divergence, reads[s]) for s in SIDES]
    ids, place = (pad_sequence(rows, batch_first=True) for rows in (lines, positions))
    segment = pad_sequence(segments, batch_first=True, padding_value=-1)
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    same = (segment[:, :, None] == segment[:, None, :]) | (segment[:, None, :] == 0)
    mask = causal & same & (segment[:, None, :] >= 0)
    mask |= torch.eye(ids.shape[1], dtype=torch.bool)  # padding attends to itself: no empty softmax
    return Batch(ids, place, mask[:, None], texts)


def pad_texts(texts: Sequence[tuple[int, str, Tensor, int, int]], pad: int) -> Batch:
    """One row per text, padded on the right. ``texts`` holds (pair index, side, ids, divergence, read position)."""
    ids = pad_sequence([tokens for _, _, tokens, _, _ in texts], batch_first=True, padding_value=pad)
    mask = pad_sequence([torch.ones_like(tokens) for _, _, tokens, _, _ in texts], batch_first=True)
    views = [Text(i, side, row, torch.arange(t.numel()), p, read) for row, (i, side, t, p, read) in enumerate(texts)]
    return Batch(ids, torch.arange(ids.shape[1]).expand_as(ids), mask, views)


def by_budget(lengths: Sequence[int], budget: int, mixing: int = NO_LIMIT) -> Iterator[list[int]]:
    """Indices in batches of similar length: (longest in the batch) x (batch size) <= budget, at least one each.

    What is longer than ``mixing`` has a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batch: list[int] = []
    for i in order:
        if batch and (lengths[batch[0]] * (len(batch) + 1) > budget or lengths[batch[0]] > mixing):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def units(n: int) -> list[range]:
    """Ranges of 64 pairs in file order."""
    return [range(start, min(start + UNIT, n)) for start in range(0, n, UNIT)]


def last_hidden_reads(hidden: Float[Tensor, "rows width d"], batch: Batch) -> Float[Tensor, "texts d"]:
    """The final hidden state of each text at its read position."""
    places = [(t.row, int(t.columns[t.read])) for t in batch.texts]
    rows, columns = torch.tensor(places, device=hidden.device).T
    return hidden[rows, columns]

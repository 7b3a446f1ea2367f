"""Products over only the features that fire, with one interface for dense and sparse patterns.

A training step needs five products between codes (one value per (token, feature) entry) and matrices. With few entries
these are gathers and sparse products; with many, plain matrix products are faster. A pattern knows which entries exist and
computes all five products, so a family's loss reads as in its paper, whichever way it is computed:

    at            a per-feature vector [m], read at the entries
    products      <a_t, rows_j> at the entries, for a [n, d] and rows [m, d]
    combine       Σ_j codes_tj rows_j [n, d]
    outer         out_j = Σ_t codes_tj a_t [m, d]
    per_feature   Σ_t codes_tj [m]

Times on one core (AVX512-BF16) for 2,048 tokens, d 576, m 4,608, k 32, in ms: encoder product 124 in float32, 25 in
bfloat16; ``products`` 4.5 (by gathering rows and ``bmm``: 113); ``combine`` 1.7; ``outer`` into a reused buffer 2.8 (dense:
125). At m 16,384 a new allocation would triple the last one.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from rmscope.ranks import ALONE, Ranks

Batch = Float[Tensor, "n d"]
Rows = Float[Tensor, "m d"]
Bias = Float[Tensor, " m"]
Entries = tuple[Int[Tensor, " nnz"], Int[Tensor, " nnz"], Float[Tensor, " nnz"]]
"""Token, feature and value of each entry."""
Top = tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]
"""Values and features."""
SPARSE_BELOW = 1 / 8
"""Density of the entries below which gathers are faster than matrix products (69 ns per entry against 13.5)."""
TILE = {"cpu": (1 << 22, 1 << 14), "cuda": (1 << 27, 1 << 17)}
"""The largest number of entries, and of features, in a [tokens, features] tile of pre-activations. On a CPU a tile stays in
the cache until its largest entries are taken, and its memory is reused without page faults."""
ROWS = 512
"""The smallest number of tokens in a tile: with 576 by 16,384, 256 tokens run at 280 GFLOP/s on two cores, 512 at 320."""


class Dense:
    """All n x m entries; codes are [n, m]."""

    def at(self, vector: Tensor) -> Tensor:
        return vector

    def products(self, a: Tensor, rows: Tensor) -> Tensor:
        return a @ rows.t()

    def combine(self, codes: Tensor, rows: Tensor) -> Tensor:
        return codes @ rows

    def outer(self, codes: Tensor, a: Tensor, out: Tensor) -> None:
        torch.mm(codes.t(), a, out=out)

    def per_feature(self, codes: Tensor) -> Tensor:
        return codes.sum(dim=0)


class Sparse:
    """Listed entries, grouped by token; codes are [nnz]."""

    def __init__(self, counts: Int[Tensor, " n"], feature: Int[Tensor, " nnz"], m: int) -> None:
        self.m, self.n, self.feature = m, len(counts), feature
        self.offsets = counts.cumsum(0) - counts
        self.token = torch.repeat_interleave(torch.arange(self.n, device=feature.device), counts)
        self._order = torch.argsort(feature, stable=True)
        per_feature = torch.bincount(feature, minlength=m)
        self._crow = torch.cat([per_feature.new_zeros(1), per_feature.cumsum(0)])
        self._col = self.token[self._order]

    @classmethod
    def of_top(cls, feature: Int[Tensor, "n k"], m: int) -> Sparse:
        """A pattern with k entries per token."""
        n, k = feature.shape
        return cls(torch.full((n,), k, device=feature.device), feature.reshape(-1), m)

    def at(self, vector: Tensor) -> Tensor:
        return vector[self.feature]

    def products(self, a: Tensor, rows: Tensor) -> Tensor:
        return products_at(a, rows, self.feature, self.offsets, self.token)

    def combine(self, codes: Tensor, rows: Tensor) -> Tensor:
        return F.embedding_bag(self.feature, rows, self.offsets, mode="sum", per_sample_weights=codes)

    def outer(self, codes: Tensor, a: Tensor, out: Tensor) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*[Ss]parse.*")
            transposed = torch.sparse_csr_tensor(
                self._crow, self._col, codes[self._order], (self.m, self.n), check_invariants=False
            )
        torch.addmm(out, transposed, a, beta=0, out=out)

    def per_feature(self, codes: Tensor) -> Tensor:
        return codes.new_zeros(self.m).index_add_(0, self.feature, codes)


Pattern = Dense | Sparse


def products_at(a: Batch, rows: Rows, feature: Tensor, offsets: Int[Tensor, " n"], token: Tensor) -> Float[Tensor, " nnz"]:
    """<a_t, rows_j> at entries grouped by token: the gradient of ``embedding_bag`` in its weights."""
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(a.contiguous(), rows, feature, offsets, token, 0, -1)


def tiles(
    x: Batch, rows: Rows, bias: Bias | None, fast: bool
) -> Iterator[tuple[int, int, Float[Tensor, "tokens features"]]]:
    """x rows^T (+ bias) as (first token, first feature, tile), features innermost; for large m it is never held as a whole.

    With ``fast`` the products are in bfloat16, with an error of about 2^-8 of their typical size. Each tile overwrites the
    one before.
    """
    entries, features = TILE.get(x.device.type, TILE["cuda"])
    width = min(len(rows), features)
    if fast:
        x, rows, bias = x.bfloat16(), rows.bfloat16(), None if bias is None else bias.bfloat16()
    step = min(len(x), max(ROWS, entries // width))
    buffer = x.new_empty(step * width)
    for token, part in zip(range(0, len(x), step or 1), x.split(step or 1), strict=False):
        for feature in range(0, len(rows), width):
            some = rows[feature : feature + width]
            out = buffer[: len(part) * len(some)].view(len(part), len(some))
            if bias is None:
                torch.mm(part, some.t(), out=out)
            else:
                torch.addmm(bias[feature : feature + width], part, some.t(), out=out)
            yield token, feature, out


def top_entries(x: Batch, rows: Rows, bias: Bias, k: int, fast: bool = False) -> Top:
    """The k largest of <x_t, rows_j> + bias_j per token, as (values, features), in no particular order.

    This is a running top k over the tiles of features. With ``fast``, a few more than k candidates are chosen in bfloat16,
    and their float32 values decide.
    """
    wanted = min(len(rows), k + max(8, k // 4)) if fast else k
    found: list[tuple[Tensor, Tensor]] = []
    for _, first, h in tiles(x, rows, bias, fast):
        values, features = top_k(h, min(wanted, h.shape[1]))
        features = features + first
        if first:
            before, earlier = found.pop()
            values, features = torch.cat([before, values], dim=1), torch.cat([earlier, features], dim=1)
            values, place = values.topk(min(wanted, values.shape[1]), dim=1, sorted=False)
            features = features.gather(1, place)
        found.append((values, features))
    values, features = (torch.cat(column) for column in zip(*found, strict=True))
    if fast:
        offsets = torch.arange(0, features.numel(), wanted, device=x.device)
        token = torch.arange(len(x), device=x.device).repeat_interleave(wanted)
        exact = products_at(x, rows, features.reshape(-1), offsets, token)
        exact = exact.view_as(features) + bias[features]
        values, place = exact.topk(k, dim=1, sorted=False)
        features = features.gather(1, place)
    return values, features


def largest(values: Float[Tensor, "some ..."], k: int, ranks: Ranks = ALONE) -> Bool[Tensor, "some ..."]:
    """Which values of this rank are among the k largest of all ranks, along the first dimension."""
    parts = ranks.gather(values)
    together = torch.cat(parts)
    best = together.topk(min(k, len(together)), dim=0, sorted=False).indices
    chosen = torch.zeros_like(together, dtype=torch.bool).scatter_(0, best, True)
    return chosen.split([len(part) for part in parts])[ranks.rank]


def batch_top_entries(
    x: Batch, rows: Rows, bias: Bias, count: int, guess: float, fast: bool = False, ranks: Ranks = ALONE
) -> Entries:
    """The ``count`` largest positive <x_t, rows_j> + bias_j of the whole batch, or fewer, sorted by token, then feature.

    ``guess`` is a value that the smallest of them probably exceeds. Entries below it are ignored, unless too few are above
    it; then half of it is tried. The result does not depend on the guess, and [n, m] floats are never held or sorted.
    Of several ``ranks`` each has some of the tokens, or of the features, and returns its own of the ``count`` entries.
    """
    for least in (guess, guess / 2, guess / 4, guess / 8, 0.0):
        token, feature, product = _join(open_entries(x, rows, bias - least, fast))
        value = product + bias[feature]
        if int(ranks.sum((value > least).sum())) >= count:
            break
    positive = value > 0
    if int(ranks.sum(positive.sum())) > count:
        positive = largest(value, count, ranks)
    return token[positive], feature[positive], value[positive]


def upper_quantiles(x: Batch, rows: Rows, share: float) -> Float[Tensor, " m"]:
    """For every feature, the value that <x_t, rows_j> exceeds on ``share`` of the tokens, at least on one token."""
    above = min(len(x) - 1, max(1, round(share * len(x))))
    step = max(1, TILE["cpu"][0] // len(x))
    return torch.cat([(part @ x.t()).topk(above + 1, dim=1).values[:, -1] for part in rows.split(step)])


def open_pattern(x: Batch, rows: Rows, bias: Bias, density: float, fast: bool = False) -> tuple[Pattern, Tensor]:
    """A pattern with all entries where <x_t, rows_j> + bias_j > 0, and perhaps more, and <x_t, rows_j> at them.

    It is sparse if the last batch was sparse (its ``density``) and this one is too.
    """
    found, most = [], SPARSE_BELOW * len(x) * len(rows)
    if density < SPARSE_BELOW:
        for entries in open_entries(x, rows, bias, fast):
            found.append(entries)
            most -= len(entries[0])
            if most <= 0:
                break
        else:
            token, feature, product = _join(found)
            return Sparse(torch.bincount(token, minlength=len(x)), feature, len(rows)), product
    return Dense(), x @ rows.t()


def open_entries(x: Batch, rows: Rows, bias: Bias, fast: bool = False) -> Iterator[Entries]:
    """The entries where <x_t, rows_j> + bias_j > 0, as (token, feature, product), for one stretch of tokens at a time.

    They are sorted by token, then feature. With ``fast`` there are a few more entries, which the float32 products can tell
    apart: a bfloat16 product has an error of about 2^-8 of |x_t| |rows_j| / sqrt(d), and the margin is 4 times that.
    """
    if fast:
        bias = bias + rows.norm(dim=1) * (2**-6 / x.shape[1] ** 0.5 * float(x.norm(dim=1).mean()))
    least = -bias  # a comparison is cheaper than adding the bias, which would first be written over every tile
    found: list[Entries] = []
    for first, start, h in tiles(x, rows, None, fast):
        token, column = places(h > least[start : start + h.shape[1]])
        found.append((token, column + start, h[token, column]))
        if start + h.shape[1] == len(rows):
            token, feature, product = _join(found)
            if len(found) > 1:  # several tiles of the same tokens
                token, order = token.sort(stable=True)
                feature, product = feature[order], product[order]
            if fast:
                counts = torch.bincount(token, minlength=len(h))
                product = products_at(x[first : first + len(h)], rows, feature, counts.cumsum(0) - counts, token)
            yield token + first, feature, product
            found = []


def _join(found: Iterable[Entries]) -> Entries:
    token, feature, value = (torch.cat(column) for column in zip(*found, strict=True))
    return token, feature, value


def places(mask: Bool[Tensor, "n m"]) -> tuple[Int[Tensor, " nnz"], Int[Tensor, " nnz"]]:
    """``nonzero`` as (row, column). It skips eight entries at a time, which is fast where few are set."""
    if mask.shape[1] % 8 or not mask.is_contiguous():
        row, column = mask.nonzero().unbind(1)
        return row, column
    row, word = mask.view(torch.int64).nonzero().unbind(1)
    which, place = mask.view(len(mask), mask.shape[1] // 8, 8)[row, word].nonzero().unbind(1)
    return row[which], word[which] * 8 + place


def top_k(h: Float[Tensor, "n m"], k: int, block: int = 8) -> Top:
    """Exact ``topk``: every entry among the k largest is in one of the k blocks with the largest maxima.

    On a CPU with wide rows this reads less and is 1.5 times faster at m 16,384. Elsewhere it is ``torch.topk``.
    """
    n, m = h.shape
    if h.is_cuda or m < 8192 or m % block or m // block < 4 * k:
        return h.topk(k, dim=1, sorted=False)
    blocks = m // block
    best = h.view(n, block, blocks).amax(dim=1).topk(k, dim=1, sorted=False).indices
    index = (best[:, :, None] + torch.arange(0, m, blocks)).view(n, -1)
    values, place = h.gather(1, index).topk(k, dim=1, sorted=False)
    return values, index.gather(1, place)

"""One SAE that several ranks train together. They share the tokens of every batch, or its features, or both.

    tokens      these ranks hold the same features, and each takes some rows of a batch. Gradients, loss and L0 are averaged
                over them, so that all take the same Adam step.
    features    these ranks read the same rows, and each holds some features: rows of W_dec, columns of W_enc, their biases,
                their Adam moments. A reconstruction is the sum over the ranks; gradients stay where their features are.

In a family's step, what is summed over features is summed over these ranks too (:meth:`Training.total`). The k largest of a
token, or of a batch, are chosen among the largest of each rank, which is exact. What is random is drawn for all features or
tokens on every rank, and each keeps its own. So the weights are those of one process, but for the order in which numbers are
added. Where two numbers are equal, ``topk`` decides, as in one process.

A checkpoint is the same file whoever writes it, so a training goes on with any number of ranks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rmscope.errors import InputError
from rmscope.io import atomic
from rmscope.ranks import ALONE, Ranks
from rmscope.sae.base import Sae

SLICE = 1024
"""Rows of a rank that are sent at once."""
DTYPES = {torch.float32: "F32", torch.int64: "I64"}
"""Types of a checkpoint's tensors, as safetensors names them."""


@dataclass(frozen=True, slots=True)
class Shares:
    """With whom a rank trains an SAE."""

    tokens: Ranks = ALONE
    """The ranks that hold the same features."""
    features: Ranks = ALONE
    """The ranks that read the same rows."""
    together: Ranks = ALONE
    """All ranks that train the SAE."""

    def rows(self, m: int) -> slice:
        """Which of m features this rank holds."""
        rank, count = self.features.rank, self.features.count
        return slice(m * rank // count, m * (rank + 1) // count)

    def numbers(self, own: int) -> list[int]:
        """A number of every rank."""
        return torch.cat(self.together.gather(torch.tensor([own]))).tolist()


WHOLE = Shares()
"""One process that trains an SAE by itself."""


@contextmanager
def deal(parts: Sequence[str], ranks: Ranks, devices: int = 1) -> Iterator[tuple[list[list[str]], Shares]]:
    """The parts whose SAEs this rank trains, in lots that it trains at once, and with whom. All ranks call it at once.

    An SAE needs ``devices`` devices. With more ranks than parts, or where one device cannot hold an SAE, ranks form teams of
    neighbours. A team spreads the features over as few of its ranks as hold them, and shares the tokens beyond that.

    Raises:
        InputError: all ranks together cannot hold one SAE.
    """
    if ranks.count == 1:
        yield [list(parts)], WHOLE
        return
    n = min(ranks.count // devices, len(parts))
    if n == 0:
        raise InputError(
            f"Training one SAE takes the memory of {devices} devices at least, and there are {ranks.count} processes; start "
            "more of them, or choose a smaller d_sae."
        )
    teams = torch.arange(ranks.count).tensor_split(n)
    tables = [team.view(-1, _width(len(team), devices)) for team in teams]  # a row reads the same, a column holds the same
    shares = Shares(
        tokens=ranks.among([column for table in tables for column in table.t().tolist()]),
        features=ranks.among([row for table in tables for row in table.tolist()]),
        together=ranks.among([team.tolist() for team in teams]),
    )
    own = next(list(parts[i::n]) for i, team in enumerate(teams) if ranks.rank in team)
    try:
        yield [own] if devices == 1 else [[part] for part in own], shares
    finally:
        for group in (shares.tokens, shares.features, shares.together):
            group.close()


def _width(ranks: int, devices: int) -> int:
    """Over how many ranks of a team the features are spread: the fewest that hold them and divide the team."""
    return next(width for width in range(devices, ranks + 1) if ranks % width == 0)


def cut(sae: Sae, rows: slice) -> None:
    """Leaves an SAE some of its features."""
    if len(range(sae.m)[rows]) < sae.m:
        _change_rows(sae, lambda t: t[rows].clone())


def join(sae: Sae, ranks: Ranks) -> None:
    """Gives an SAE the features that the other ranks hold. They come to the CPU piece by piece."""

    def whole(t: Tensor) -> Tensor:
        joined = torch.empty(sum(_lengths(t, ranks)), *t.shape[1:], dtype=t.dtype)
        for first, part in _stretches(t, ranks):
            joined[first : first + len(part)] = part
        return joined

    if ranks.count > 1:
        _change_rows(sae, whole)


def _change_rows(sae: Sae, change: Callable[[Tensor], Tensor]) -> None:
    """Changes everything that has one row per feature."""
    sae.W_enc = nn.Parameter(change(sae.W_enc.data.t()).t(), requires_grad=False)
    for name in ("W_dec", *sae.feature_parameters):
        setattr(sae, name, nn.Parameter(change(getattr(sae, name).data), requires_grad=False))
    sae.m = len(sae.W_dec)


def _lengths(t: Tensor, ranks: Ranks) -> list[int]:
    return torch.cat(ranks.gather(torch.tensor([len(t)]))).tolist()


def _stretches(t: Tensor, ranks: Ranks) -> Iterator[tuple[int, Tensor]]:
    """A tensor whose rows the ranks hold, as (number of the first row, rows), some rows at a time, on every rank."""
    lengths = _lengths(t, ranks)
    for i in range(0, max(lengths), SLICE):
        yield from zip(accumulate(lengths, initial=i), ranks.gather(t[i : i + SLICE]), strict=False)


def write_tensors(
    path: Path, spread: Mapping[str, Tensor], same: Mapping[str, Tensor], told: dict[str, str], ranks: Ranks
) -> None:
    """Writes a safetensors file: tensors whose rows are spread over the ranks, and some that are the same on all.

    The first rank writes, and its memory does not grow with the tensors. torch.distributed.checkpoint is not used: it leaves
    a pickle, which may run code when it is read.
    """
    tensors = dict(sorted({**spread, **same}.items(), key=lambda item: -item[1].element_size()))  # keeps them aligned
    header, starts, end = dict[str, Any]({"__metadata__": told}), dict[str, int](), 0
    for name, t in tensors.items():
        shape = [sum(_lengths(t, ranks)), *t.shape[1:]] if name in spread else list(t.shape)
        starts[name], end = end, end + prod(shape) * t.element_size()
        header[name] = {"dtype": DTYPES[t.dtype], "shape": shape, "data_offsets": [starts[name], end]}

    def pieces() -> Iterator[tuple[int, Tensor]]:
        for name, t in tensors.items():
            for first, part in _stretches(t, ranks) if name in spread else [(0, t)]:
                yield starts[name] + first * prod(t.shape[1:]) * t.element_size(), part

    if not ranks.is_first:
        for _ in pieces():
            pass
        return
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start, part in pieces():
            file.seek(8 + len(text) + start)
            file.write(part.cpu().contiguous().numpy().tobytes())

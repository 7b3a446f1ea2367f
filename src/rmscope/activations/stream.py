"""Activations without a disk: the PM refills a buffer while SAEs are trained from it.

A buffer of fixed size a site is filled with the rows that a harvest would store. What is read from it is half of it, in
random order; then the PM puts new rows in the places that were read, and all is shuffled again; at the end of an epoch the
rest is read. An epoch goes over units of 64 pairs in an order of its own, and the PM runs the batches of a unit as a
harvest does, so the rows are a harvest's to the last bit. Beside the buffer, no more than one unit's rows are held.

Which row stands where follows from (seed, epoch) and the lengths of the texts alone. So a resumed training can begin at any
batch: what stood in the buffer then is computed again, and nothing before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rmscope.activations.harvest import data_identity, kept_rows, prefix_of
from rmscope.errors import InputError
from rmscope.model.packing import units
from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import SIDES, Pair

BUFFER_TOKENS = 1 << 18
"""Rows of a site's buffer: at d_model 4,096, 2 GB in bfloat16."""
SAMPLE_ROWS = 16384
"""Rows from which the norm and the first weights of a training are taken."""


class ActivationStream:
    """Made by :func:`stream`; ``train_saes`` reads it as it reads an ``ActivationStore``."""

    def __init__(self, rm: RewardModel, pairs: Sequence[Pair], sites: Sequence[str], buffer_tokens: int) -> None:
        self.rm, self.pairs, self.sites, self.buffer_tokens = rm, pairs, list(sites), buffer_tokens
        self.units = list(units(len(pairs)))
        self.prefixes: dict[bytes, int] = {}
        """The unit that keeps each prefix, by its digest: the first that holds it."""
        self.counts = torch.tensor([self._count(unit) for unit in range(len(self.units))])
        self.identity: dict[str, Any] = {"model": rm.identity, "data": data_identity(pairs), "sites": self.sites}
        self.identity["buffer_tokens"] = buffer_tokens
        self._kept: tuple[int, dict[str, Tensor]] | None = None

    def _tokens(self, unit: int) -> list[PairTokens]:
        return self.rm.tokenize_all([self.pairs[i] for i in self.units[unit]])

    def _count(self, unit: int) -> int:
        """The rows a unit gives: all spans, and behind the first token the prefixes that no earlier unit has."""
        rows = 0
        for t in self._tokens(unit):
            rows += sum(max(0, self.rm.read_position(t.side(side)) + 1 - t.divergence) for side in SIDES)
            if (prefix := prefix_of(t)) not in self.prefixes:
                self.prefixes[prefix] = unit
                rows += t.divergence - 1
        return rows

    def d(self, site: str) -> int:
        return self.rm.d_model

    def training_tokens(self, sites: Sequence[str]) -> int:
        """Rows of an epoch: all but first tokens. InputError where a site is not streamed, or there are no rows."""
        if unknown := [site for site in sites if site not in self.sites]:
            raise InputError(f"Site {unknown[0]} is not streamed; the stream was opened for {', '.join(self.sites)}.")
        if not int(self.counts.sum()):
            raise InputError("The pairs hold no tokens to train on after the first of each text; give other pairs.")
        return int(self.counts.sum())

    def sample(self, site: str, n: int, generator: torch.Generator) -> Float[Tensor, "n d_model"]:
        """At most n of the sampled rows, as float32."""
        rows = self._sample[site]
        return rows[torch.randperm(len(rows), generator=generator)[:n].to(rows.device)].float()

    def norm_scale(self, site: str) -> float:
        """s with mean |s x| = sqrt(d_model) over the sampled rows."""
        norm = float(self._sample[site].float().norm(dim=1).double().mean())
        if not 0 < norm < float("inf"):
            raise InputError(f"The norms at {site} are not finite or all 0; check the PM.")
        return float(self.rm.d_model**0.5 / norm)

    @cached_property
    def _sample(self) -> dict[str, Float[Tensor, "n d_model"]]:
        """Rows of some units drawn once, the same for every training."""
        generator = torch.Generator().manual_seed(0)
        found: list[dict[str, Tensor]] = []
        for unit in torch.randperm(len(self.units), generator=generator).tolist():
            found.append(self._unit(unit))
            if sum(len(rows[self.sites[0]]) for rows in found) >= SAMPLE_ROWS:
                break
        together = {site: torch.cat([rows[site] for rows in found]) for site in self.sites}
        picked = torch.randperm(len(together[self.sites[0]]), generator=generator)[:SAMPLE_ROWS]
        return {site: rows[picked.to(rows.device)] for site, rows in together.items()}

    def training_batches(
        self, sites: Sequence[str], batch_size: int, epochs: int, seed: int, start: int = 0
    ) -> Iterator[dict[str, Float[Tensor, "batch d_model"]]]:
        """Shuffled batches as float32, n // batch_size an epoch, from batch number ``start`` on.

        The rows that do not fill an epoch's last batch are left out of that epoch.
        """
        n = self.training_tokens(sites)
        size = min(batch_size, n)
        half = max(1, self.buffer_tokens // (2 * size)) * size
        shape, place = (min(2 * half, n), self.rm.d_model), self.rm.device
        buffer = {site: torch.empty(shape, dtype=torch.bfloat16, device=place) for site in sites}
        per_epoch = n // size
        for epoch in range(start // per_epoch, epochs):
            generator = torch.Generator().manual_seed((seed << 20) + epoch)
            order = torch.randperm(len(self.units), generator=generator)
            skipped, current = max(0, start - epoch * per_epoch), False
            for slots, ids, reading in turns(n, shape[0], half, size, generator):
                if skipped >= len(reading) // size:
                    skipped -= len(reading) // size
                    continue
                slots = slots if current else (ids >= 0).nonzero().squeeze(1)
                self._fill(buffer, slots, ids[slots], order)
                current = True
                for index in reading[skipped * size :].split(size):
                    yield {site: rows[index.to(place)].float() for site, rows in buffer.items()}
                skipped = 0

    def _fill(
        self, buffer: dict[str, Tensor], slots: Int[Tensor, " k"], ids: Int[Tensor, " k"], order: Int[Tensor, " units"]
    ) -> None:
        """Puts the rows numbered ``ids`` (counted along the units in ``order``) into the buffer's ``slots``."""
        ends = self.counts[order].cumsum(0)
        which = torch.searchsorted(ends, ids, right=True)
        for turn in which.unique().tolist():
            unit, mine = int(order[turn]), which == turn
            rows, local = self._unit(unit), ids[mine] - (ends[turn] - self.counts[unit])
            for site, held in buffer.items():
                held[slots[mine].to(held.device)] = rows[site][local.to(held.device)]

    def _unit(self, unit: int) -> dict[str, Float[Tensor, "rows d_model"]]:
        """A unit's rows at every site, bfloat16 as stores hold them; the last unit is remembered."""
        if self._kept is None or self._kept[0] != unit:
            self._kept = None
            found: dict[str, list[Tensor]] = {site: [] for site in self.sites}
            seen = {prefix for prefix, owner in self.prefixes.items() if owner != unit}
            for streams, columns in kept_rows(self.rm, self._tokens(unit), self.sites, seen, self.units[unit].start):
                kept = columns["position"] > 0
                for site, x in streams.items():
                    found[site].append(x[kept.to(x.device)].to(torch.bfloat16))
            self._kept = unit, {site: torch.cat(parts) for site, parts in found.items()}
        return self._kept[1]


def turns(
    n: int, slots: int, half: int, size: int, generator: torch.Generator
) -> Iterator[tuple[Int[Tensor, " new"], Int[Tensor, " slots"], Int[Tensor, " reading"]]]:
    """How n rows, in order, go through a buffer: per refill (the slots filled anew, the row in every slot or -1, the slots
    read next).

    Every refill fills what is free and draws a new order of all that is held; the first ``half`` of it is read, or, once
    the last row is in, all of it in whole batches of ``size``.
    """
    ids, free, next_row = torch.full((slots,), -1), torch.arange(slots), 0
    while True:
        new = free[: n - next_row]
        ids[new] = torch.arange(next_row, next_row + len(new))
        next_row += len(new)
        held = (ids >= 0).nonzero().squeeze(1)
        order = held[torch.randperm(len(held), generator=generator)]
        reading = order[: half if next_row < n else len(order) // size * size]
        yield new, ids, reading
        if next_row == n:
            return
        ids[reading] = -1
        free = reading


def stream(
    rm: RewardModel, pairs: Sequence[Pair], sites: Sequence[str], buffer_tokens: int = BUFFER_TOKENS
) -> ActivationStream:
    """Activations of ``pairs`` at ``sites`` as the PM makes them, for ``train_saes``; nothing is written to disk.

    ``buffer_tokens`` rows a site are held, whatever the size of the data. Every epoch runs the PM again, so where an
    epoch's rows fit on a disk and are read often, ``harvest`` is faster.

    Raises:
        InputError: no pairs, a site that the PM does not have, or a pair that is longer than its context.
    """
    for site in sites:
        rm.site_index(site)
    if not pairs or not sites:
        raise InputError("A stream needs pairs and sites; give at least one of each.")
    return ActivationStream(rm, pairs, sites, buffer_tokens)

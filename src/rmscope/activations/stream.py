"""Activations without a disk: the PM refills a buffer while SAEs are trained from it.

Each site has a buffer of fixed size, filled with the rows that a harvest would store. Training reads half of the buffer in
random order. Then the PM replaces the rows that were read, and the buffer is shuffled again. At the end of an epoch the
rest is read. Every epoch has its own order of units of 64 pairs. The PM runs the batches of a unit as a harvest does, so
the rows are bit for bit those of a harvest. Besides the buffer, at most one unit's rows are held.

The place of each row depends only on (seed, epoch) and the lengths of the texts. So a resumed training can begin at any
batch: the content of the buffer at that batch is computed again, and nothing before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rmscope.activations.harvest import data_identity, new_rows, prefix_of
from rmscope.errors import InputError
from rmscope.model.packing import units
from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import SIDES, Pair

BUFFER_TOKENS = 1 << 18
"""Rows in a site's buffer: 2 GB in bfloat16 at d_model 4,096."""
SAMPLE_ROWS = 16384
"""Rows from which the norm and the initial weights of a training are computed."""


class ActivationStream:
    """Activations that the PM computes while they are read. Made by :func:`stream`; ``train_saes`` takes it like a store."""

    def __init__(self, rm: RewardModel, pairs: Sequence[Pair], sites: Sequence[str], buffer_tokens: int) -> None:
        self.rm, self.pairs, self.sites, self.buffer_tokens = rm, pairs, list(sites), buffer_tokens
        self.units = list(units(len(pairs)))
        self.prefixes: dict[bytes, int] = {}
        """The unit to which each prefix belongs, by its digest: the first unit that contains it."""
        self.counts = torch.tensor([self._count(unit) for unit in range(len(self.units))])
        self.identity: dict[str, Any] = {"model": rm.identity, "data": data_identity(pairs), "sites": self.sites}
        self.identity["buffer_tokens"] = buffer_tokens
        self._kept: tuple[int, dict[str, Tensor]] | None = None

    def _tokens(self, unit: int) -> list[PairTokens]:
        return self.rm.tokenize_all([self.pairs[i] for i in self.units[unit]])

    def _count(self, unit: int) -> int:
        """The number of a unit's rows: all spans, and the prefixes, without first tokens, that no earlier unit has."""
        rows = 0
        for t in self._tokens(unit):
            rows += sum(max(0, self.rm.read_position(t.side(side)) + 1 - t.divergence) for side in SIDES)
            if (prefix := prefix_of(t)) not in self.prefixes:
                self.prefixes[prefix] = unit
                rows += t.divergence - 1
        return rows

    def d(self, site: str) -> int:
        """Width of the stream."""
        return self.rm.d_model

    def training_tokens(self, sites: Sequence[str]) -> int:
        """Rows per epoch: all but first tokens. Raises InputError where a site is not streamed, or there are no rows."""
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
        """Rows of some random units, the same for every training."""
        generator = torch.Generator().manual_seed(0)
        parts: list[dict[str, Tensor]] = []
        for unit in torch.randperm(len(self.units), generator=generator).tolist():
            parts.append(self._unit(unit))
            if sum(len(rows[self.sites[0]]) for rows in parts) >= SAMPLE_ROWS:
                break
        together = {site: torch.cat([rows[site] for rows in parts]) for site in self.sites}
        picked = torch.randperm(len(together[self.sites[0]]), generator=generator)[:SAMPLE_ROWS]
        return {site: rows[picked.to(rows.device)] for site, rows in together.items()}

    def training_batches(
        self, sites: Sequence[str], batch_size: int, epochs: int, seed: int, start: int = 0
    ) -> Iterator[dict[str, Float[Tensor, "batch d_model"]]]:
        """Shuffled batches as float32, n // batch_size per epoch, from batch number ``start`` on.

        Rows that do not fill the last batch of an epoch are left out of that epoch.
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
            for slots, ids, reading in plan_refills(n, shape[0], half, size, generator):
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
        """A unit's rows at every site, in bfloat16 as in a store. The last unit is cached."""
        if self._kept is None or self._kept[0] != unit:
            self._kept = None
            found: dict[str, list[Tensor]] = {site: [] for site in self.sites}
            seen = {prefix for prefix, owner in self.prefixes.items() if owner != unit}
            for streams, columns in new_rows(self.rm, self._tokens(unit), self.sites, seen, self.units[unit].start):
                kept = columns["position"] > 0
                for site, x in streams.items():
                    found[site].append(x[kept.to(x.device)].to(torch.bfloat16))
            self._kept = unit, {site: torch.cat(parts) for site, parts in found.items()}
        return self._kept[1]


def plan_refills(
    n: int, slots: int, half: int, size: int, generator: torch.Generator
) -> Iterator[tuple[Int[Tensor, " new"], Int[Tensor, " slots"], Int[Tensor, " reading"]]]:
    """How n rows, in order, pass through a buffer. Per refill: (slots to fill, row in every slot or -1, slots to read).

    A refill fills the free slots and draws a new order of all rows in the buffer. The first ``half`` of them are read; after
    the last refill all of them, in whole batches of ``size``.
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
    """Activations of ``pairs`` at ``sites`` for ``train_saes``, computed by the PM when they are read. Nothing goes to disk.

    The buffer holds ``buffer_tokens`` rows per site, whatever the size of the data. Every epoch runs the PM again, so
    ``harvest`` is faster where the rows fit on a disk and are read several times. Raises InputError where there are no pairs
    or sites, or the PM does not have a site.
    """
    for site in sites:
        rm.site_index(site)
    if not pairs or not sites:
        raise InputError("A stream needs pairs and sites; give at least one of each.")
    return ActivationStream(rm, pairs, sites, buffer_tokens)

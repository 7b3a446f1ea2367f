"""The residual stream of pairs at many sites: stored on disk (:func:`harvest`) or read from the running PM (:func:`stream`).

One pass serves all sites and stops after the last one. A pair's shared prefix runs once. A prefix that an earlier pair has
already given (the same prompt with other responses) is not stored again, and padding never is. Work is done in units of 64
pairs, so a harvest holds the tokens of one unit and at most one shard per site in memory. On a CPU with fast bfloat16
products the pass runs under autocast: SAE training does not need float32 (effects do).

A stream has a buffer of fixed size per site, filled with the rows that a harvest would store, bit for bit. Training reads
half of the buffer in random order. Then the PM replaces the rows that were read, and the buffer is shuffled again. At the
end of an epoch the rest is read. Every epoch has its own order of units. The place of each row depends only on (seed,
epoch) and the lengths of the texts. So a resumed training can begin at any batch: only the buffer's content at that batch is
computed again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from rmscope.activations.store import COLUMNS, ActivationStore, StoreWriter
from rmscope.errors import InputError
from rmscope.hardware import fast_products
from rmscope.io import Progress, atomic, content_hash, silent
from rmscope.model.packing import Text, units
from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel
from rmscope.model.site_names import all_parts
from rmscope.pairs.pair import SIDES, Pair
from rmscope.ranks import ALONE, Ranks

PROMPT, CHOSEN, REJECTED = 0, 1, 2
BUFFER_TOKENS = 1 << 18
"""Rows in a site's buffer: 2 GB in bfloat16 at d_model 4,096."""
Rows = tuple[dict[str, Float[Tensor, "n d"]], dict[str, Int[Tensor, " n"]]]
"""The stream at each site, and the store's columns."""
SAMPLE_ROWS = 16384
"""Rows from which the norm and the initial weights of a streamed training are computed."""


def harvest(
    rm: RewardModel,
    pairs: Sequence[Pair],
    sites: Sequence[str],
    out: Path | str,
    progress: Progress = silent,
    ranks: Ranks = ALONE,
    parts: Path | None = None,
) -> ActivationStore:
    """Writes every token's stream at ``sites`` to ``out``, in bfloat16, and opens the store.

    ``both.L`` is stored as ``diff.L`` and ``base.L``.
    If ``out`` already holds a store of the same model, data and sites, it is opened. An unfinished store is written again.
    Several ``ranks`` share the units: each writes its own to ``parts``, and the first one makes the store of them, which is
    that of one process, byte for byte.
    Raises :class:`InputError` where a site does not exist, a pair is longer than the PM's context, or the disk is full.
    """
    sites = all_parts(sites)
    identity = {**rm.identities(sites), "data": data_identity(pairs), "sites": sites}
    root = Path(out)
    if (root / sites[0] / "manifest.json").is_file():
        store = ActivationStore.open(root)
        if store.identity == identity and set(store.sites) == set(sites):
            return store
    if ranks.count > 1 and parts is not None:
        _harvest_units(rm, pairs, sites, parts, progress, ranks)
        ranks.wait()
    if ranks.is_first:
        with StoreWriter(root, sites, rm.d_model, identity, "bfloat16") as writer:
            for streams, columns in _all_rows(rm, pairs, sites, progress, None if ranks.count == 1 else parts):
                for site, x in streams.items():
                    writer.add(site, x, **columns)
    ranks.wait()
    return ActivationStore.open(root)


def _all_rows(
    rm: RewardModel, pairs: Sequence[Pair], sites: Sequence[str], progress: Progress, parts: Path | None
) -> Iterator[Rows]:
    """The rows of all pairs, from the PM, or from the units in ``parts``."""
    seen: set[bytes] = set()
    for number, unit in enumerate(units(len(pairs))):
        if parts is not None:
            stored = load_file(parts / f"{number:05d}.safetensors")
            yield {site: stored.pop(site) for site in sites}, stored
        else:
            yield from new_rows(rm, rm.tokenize_within([pairs[i] for i in unit]), sites, seen, unit.start)
        progress(unit.stop, len(pairs), "pairs harvested")


def _harvest_units(
    rm: RewardModel, pairs: Sequence[Pair], sites: Sequence[str], parts: Path, progress: Progress, ranks: Ranks
) -> None:
    """Writes the units of this rank that are not there yet. Of the others only the prefixes are noted."""
    seen: set[bytes] = set()
    for number, unit in enumerate(units(len(pairs))):
        path, tokens = parts / f"{number:05d}.safetensors", rm.tokenize_within([pairs[i] for i in unit])
        if ranks.has(number) and not path.is_file():
            rows = list(new_rows(rm, tokens, sites, seen, unit.start))
            stored = {site: torch.cat([streams[site].to("cpu", torch.bfloat16) for streams, _ in rows]) for site in sites}
            stored |= {name: torch.cat([columns[name] for _, columns in rows]) for name in COLUMNS}
            with atomic(path) as temporary:
                save_file(stored, temporary)
        seen.update(prefix_of(t) for t in tokens)
        progress(unit.stop, len(pairs), "pairs harvested")


def new_rows(
    rm: RewardModel, tokens: Sequence[PairTokens], sites: Sequence[str], seen: set[bytes], first: int
) -> Iterator[Rows]:
    """For each batch of some pairs, the rows to store: (the stream at each site, the store's columns).

    ``seen`` holds digests of the prefixes that are already stored, and new ones are added to it. ``first`` is the number of
    the first pair.
    """
    for batch in rm.unit_batches(tokens, range(len(tokens))):
        on_cpu = rm.device.type == "cpu" and rm.dtype == torch.float32
        with fast_products(rm.device, wanted=on_cpu and rm.capabilities.bfloat16):
            streams = rm.streams(batch, sites)
        parts: list[tuple[Text, int, Tensor]] = []
        for text in batch.texts:
            if (prefix := prefix_of(tokens[text.pair])) not in seen:
                seen.add(prefix)
                parts.append((text, PROMPT, torch.arange(text.divergence)))
            region = CHOSEN if text.side == "chosen" else REJECTED
            parts.append((text, region, torch.arange(text.divergence, max(text.divergence, text.read + 1))))
        lengths = torch.tensor([len(where) for _, _, where in parts])
        row, pair, region_of = torch.tensor([[t.row, first + t.pair, region] for t, region, _ in parts]).T
        row, column = row.repeat_interleave(lengths), torch.cat([text.columns[where] for text, _, where in parts])
        yield (
            {site: x[row.to(x.device), column.to(x.device)] for site, x in streams.items()},
            {
                "token": batch.ids[row, column],
                "pair": pair.repeat_interleave(lengths),
                "position": torch.cat([where for _, _, where in parts]),
                "region": region_of.repeat_interleave(lengths),
            },
        )


def prefix_of(tokens: PairTokens) -> bytes:
    """A digest of the prefix that both sides share."""
    return blake2b(tokens.chosen[: tokens.divergence].numpy().tobytes(), digest_size=16).digest()


def data_identity(pairs: Sequence[Pair]) -> str:
    """A content hash of the pairs' ids and texts."""
    return content_hash(*((p.id, p.prompt, p.chosen, p.rejected) for p in pairs))


class ActivationStream:
    """Activations that the PM computes while they are read. Made by :func:`stream`; ``train_saes`` takes it like a store."""

    def __init__(self, rm: RewardModel, pairs: Sequence[Pair], sites: Sequence[str], buffer_tokens: int) -> None:
        self.rm, self.sites, self.buffer_tokens = rm, list(sites), buffer_tokens
        self.units = [[pairs[i] for i in unit] for unit in units(len(pairs))]
        self.prefixes: dict[bytes, int] = {}
        """The unit to which each prefix belongs, by its digest: the first unit that contains it."""
        self.counts = torch.zeros(len(self.units), dtype=torch.int64)
        """Rows of each unit: all spans, and the prefixes, without first tokens, that no earlier unit has."""
        for number, unit in enumerate(self.units):
            for t in rm.tokenize_within(unit):
                self.counts[number] += sum(max(0, rm.read_position(t.side(s)) + 1 - max(1, t.divergence)) for s in SIDES)
                if (prefix := prefix_of(t)) not in self.prefixes:
                    self.prefixes[prefix] = number
                    self.counts[number] += max(0, t.divergence - 1)
        self.identity: dict[str, Any] = {**rm.identities(sites), "data": data_identity(pairs), "sites": self.sites}
        self.identity["buffer_tokens"] = buffer_tokens
        self._kept: tuple[int, dict[str, Tensor]] | None = None

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
        together = _join(parts)
        picked = torch.randperm(len(together[self.sites[0]]), generator=generator)[:SAMPLE_ROWS]
        return {site: rows[picked.to(rows.device)] for site, rows in together.items()}

    def training_batches(
        self, sites: Sequence[str], batch_size: int, epochs: int, seed: int, start: int = 0
    ) -> Iterator[dict[str, Float[Tensor, "batch d_model"]]]:
        """Shuffled batches as float32, n // batch_size per epoch (the rest is left out), from batch number ``start`` on."""
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

    def _fill(self, buffer: dict[str, Tensor], slots: Tensor, ids: Tensor, order: Tensor) -> None:
        """Puts the rows numbered ``ids`` [k] (counted along the units in ``order``) into the buffer's ``slots`` [k]."""
        ends = self.counts[order].cumsum(0)
        which = torch.searchsorted(ends, ids, right=True)
        for turn in which.unique().tolist():
            unit, here = int(order[turn]), which == turn
            rows, local = self._unit(unit), ids[here] - (ends[turn] - self.counts[unit])
            for site, held in buffer.items():
                held[slots[here].to(held.device)] = rows[site][local.to(held.device)]

    def _unit(self, unit: int) -> dict[str, Float[Tensor, "rows d_model"]]:
        """A unit's rows at every site, in bfloat16 as in a store. The last unit is cached."""
        if self._kept is None or self._kept[0] != unit:
            self._kept = None
            parts, seen = [], {prefix for prefix, owner in self.prefixes.items() if owner != unit}
            for streams, columns in new_rows(self.rm, self.rm.tokenize_within(self.units[unit]), self.sites, seen, 0):
                kept = columns["position"] > 0
                parts.append({site: x[kept.to(x.device)].to(torch.bfloat16) for site, x in streams.items()})
            self._kept = unit, _join(parts)
        return self._kept[1]


def _join(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {site: torch.cat([rows[site] for rows in parts]) for site in parts[0]}


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

    The buffer holds ``buffer_tokens`` rows per site. Every epoch runs the PM again, so ``harvest`` is faster where the rows
    fit on a disk and are read several times. Raises InputError without pairs or sites, and where the PM lacks a site.
    """
    for site in sites:
        rm.site_index(site)
    if not pairs or not sites:
        raise InputError("A stream needs pairs and sites; give at least one of each.")
    return ActivationStream(rm, pairs, all_parts(sites), buffer_tokens)

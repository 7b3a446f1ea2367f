"""Harvest: the residual stream at many sites from one pass over the pairs, which stops after the last site.

A pair's shared prefix runs once. A prefix that an earlier pair has already stored (the same prompt with other responses) is
not stored again, and padding is never stored. Work is done in units of 64 pairs, so memory holds the tokens of one unit and
at most one shard per site, however many pairs there are. On a CPU with fast bfloat16 products the pass runs under autocast:
SAE training does not need float32 (effects do).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rmscope.activations.store import ActivationStore, StoreWriter
from rmscope.hardware import fast_products
from rmscope.io import Progress, content_hash, silent
from rmscope.model.packing import Batch, Text, units
from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import Pair

PROMPT, CHOSEN, REJECTED = 0, 1, 2


def harvest(
    rm: RewardModel, pairs: Sequence[Pair], sites: Sequence[str], out: Path | str, progress: Progress = silent
) -> ActivationStore:
    """Writes every token's stream at ``sites`` to ``out``, in bfloat16, and opens the store.

    If ``out`` already holds a store of the same model, data and sites, it is opened. An unfinished store is written again.
    Raises :class:`InputError` where a site does not exist or the disk is full.
    """
    identity = {"model": rm.identity, "data": data_identity(pairs), "sites": list(sites)}
    root = Path(out)
    if (root / sites[0] / "manifest.json").is_file():
        store = ActivationStore.open(root)
        if store.identity == identity and set(store.sites) == set(sites):
            return store
    seen: set[bytes] = set()
    with StoreWriter(root, list(sites), rm.d_model, identity, "bfloat16") as writer:
        for unit in units(len(pairs)):
            tokens = rm.tokenize_all([pairs[i] for i in unit])
            for streams, columns in new_rows(rm, tokens, sites, seen, unit.start):
                for site, x in streams.items():
                    writer.add(site, x, **columns)
            progress(unit.stop, len(pairs), "pairs harvested")
    return ActivationStore.open(root)


def new_rows(
    rm: RewardModel, tokens: Sequence[PairTokens], sites: Sequence[str], seen: set[bytes], first: int
) -> Iterator[tuple[dict[str, Float[Tensor, "n d"]], dict[str, Int[Tensor, " n"]]]]:
    """For each batch of some pairs, the rows to store: (the stream at each site, the store's columns).

    ``seen`` holds digests of the prefixes that are already stored, and new ones are added to it. ``first`` is the number of
    the first pair.
    """
    for batch in rm.unit_batches(tokens, range(len(tokens))):
        with _fast(rm):
            streams = rm.streams(batch, sites)
        row, column, columns = _rows(batch, tokens, seen, first)
        yield {site: x[row.to(x.device), column.to(x.device)] for site, x in streams.items()}, columns


def prefix_of(tokens: PairTokens) -> bytes:
    """A digest of the prefix that both sides share."""
    return blake2b(tokens.chosen[: tokens.divergence].numpy().tobytes(), digest_size=16).digest()


def _rows(
    batch: Batch, tokens: Sequence[PairTokens], seen: set[bytes], first: int
) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"], dict[str, Int[Tensor, " n"]]]:
    """Where the new rows are in the batch (row, column), and the store's columns for them."""
    parts = [
        (text, region, torch.arange(start, stop))
        for text in batch.texts
        for region, start, stop in _parts(text, tokens[text.pair], seen)
    ]
    lengths = torch.tensor([len(where) for _, _, where in parts])
    row = torch.tensor([text.row for text, _, _ in parts]).repeat_interleave(lengths)
    column = torch.cat([text.columns[where] for text, _, where in parts])
    return row, column, {
        "token": batch.ids[row, column],
        "pair": torch.tensor([first + text.pair for text, _, _ in parts]).repeat_interleave(lengths),
        "position": torch.cat([where for _, _, where in parts]),
        "region": torch.tensor([region for _, region, _ in parts]).repeat_interleave(lengths),
    }  # fmt: skip


def _parts(text: Text, tokens: PairTokens, seen: set[bytes]) -> Iterator[tuple[int, int, int]]:
    """(region, first, stop) of a text's new rows."""
    prefix = prefix_of(tokens)
    if prefix not in seen:
        seen.add(prefix)
        yield PROMPT, 0, text.divergence
    yield (CHOSEN if text.side == "chosen" else REJECTED), text.divergence, max(text.divergence, text.read + 1)


def data_identity(pairs: Sequence[Pair]) -> str:
    """A content hash of the pairs' ids and texts."""
    return content_hash(*((p.id, p.prompt, p.chosen, p.rejected) for p in pairs))


def _fast(rm: RewardModel) -> Any:
    return fast_products(rm.device, wanted=rm.device.type == "cpu" and rm.dtype == torch.float32)

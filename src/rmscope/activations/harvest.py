"""Harvest: the residual stream at many sites from one pass over the pairs, stopping after the last site.

A pair's shared prefix runs once, and a prefix that an earlier pair already laid down (the same prompt with other
responses) is not stored again. No padding is stored. On a CPU with fast bf16 products the pass runs under autocast:
SAE training does not need float32, effects do (METHOD, "Precision").
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rmscope.activations.store import ActivationStore, StoreWriter
from rmscope.files import Progress, content_hash, silent
from rmscope.hardware import has_fast_bfloat16
from rmscope.model.packing import Batch, Text
from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import Pair

PROMPT, CHOSEN, REJECTED = 0, 1, 2


def harvest(
    rm: RewardModel, pairs: Sequence[Pair], sites: Sequence[str], out: Path | str, progress: Progress = silent
) -> ActivationStore:
    """Writes every token's stream at ``sites`` to ``out`` and opens the store.

    A store of the same model, data and sites that is already there is opened as it is; an unfinished one is made anew.
    """
    tokens = rm.tokenize_all(pairs)
    identity = {"model": rm.identity, "data": data_identity(pairs), "sites": list(sites)}
    root = Path(out)
    if (root / sites[0] / "manifest.json").is_file():
        store = ActivationStore.open(root)
        if store.identity == identity and set(store.sites) == set(sites):
            return store
    owners = prefix_owners(tokens)
    with StoreWriter(root, list(sites), rm.d_model, identity, "bfloat16") as writer:
        done = 0
        for batch in rm.batches(tokens):
            for streams, columns in stretches(rm, batch, sites, owners):
                for site, x in streams.items():
                    writer.add(site, x, **columns)
            done += len({t.pair for t in batch.texts})
            progress(min(done, len(tokens)), len(tokens), "pairs harvested")
    return ActivationStore.open(root)


def prefix_owners(tokens: Sequence[PairTokens]) -> set[int]:
    """The pairs that lay their prefix down: of those with the same one, the first."""
    first: dict[bytes, int] = {}
    for i, t in enumerate(tokens):
        first.setdefault(sha256(t.chosen[: t.divergence].numpy().tobytes()).digest(), i)
    return set(first.values())


def stretches(
    rm: RewardModel, batch: Batch, sites: Sequence[str], owners: Collection[int]
) -> Iterator[tuple[dict[str, Float[Tensor, "n d"]], dict[str, Int[Tensor, " n"]]]]:
    """The stretches of a batch's texts that are kept: (their stream at each site, their columns by name)."""
    with _fast(rm):
        streams = rm.streams(batch, sites)
    for text in batch.texts:
        for region, start, stop in _parts(text, text.pair in owners):
            columns, where = text.columns[start:stop], torch.arange(start, stop)
            yield (
                {site: x[text.row, columns.to(x.device)] for site, x in streams.items()},
                {
                    "token": batch.ids[text.row, columns],
                    "pair": torch.full_like(where, text.pair),
                    "position": where,
                    "region": torch.full_like(where, region),
                },
            )


def _parts(text: Text, owner: bool) -> Iterator[tuple[int, int, int]]:
    """(region, first, stop) of a text's kept rows: its span, and before the chosen one the prefix that the pair owns."""
    if owner and text.side == "chosen":
        yield PROMPT, 0, text.divergence
    yield (CHOSEN if text.side == "chosen" else REJECTED), text.divergence, max(text.divergence, text.read + 1)


def data_identity(pairs: Sequence[Pair]) -> str:
    return content_hash([(p.id, p.prompt, p.chosen, p.rejected) for p in pairs])


def _fast(rm: RewardModel) -> Any:
    on_cpu = rm.device.type == "cpu" and rm.dtype == torch.float32
    return torch.autocast("cpu", torch.bfloat16) if on_cpu and has_fast_bfloat16("cpu") else nullcontext()

"""Rewards of many texts that begin like one clean text: only the tokens after the shared prefix are run.

A search over completions scores hundreds of texts that share a prompt and most of a response. Each text takes the keys and
values of its shared prefix from the clean run. Texts that diverge from it at about the same token share a forward pass.
Rows are padded on the right, after the token that is read, so causal attention never sees the padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rmscope.model.clean_run import CleanRun, cache_of
from rmscope.model.reward_model import TOKEN_BUDGET, RewardModel


def shared_prefix_length(a: Tensor, b: Tensor) -> int:
    """The number of first tokens that two texts share."""
    n = min(a.numel(), b.numel())
    other = (a[:n] != b[:n]).nonzero()
    return int(other[0]) if other.numel() else n


def run_from_prefix(rm: RewardModel, clean: CleanRun, ids: Tensor, sites: Sequence[str]) -> CleanRun:
    """The clean run of a text [T] that takes its shared prefix from the clean run of another text."""
    ids = ids[: rm.read_position(ids) + 1]
    shared = min(shared_prefix_length(clean.ids, ids), ids.numel() - 1)
    return rm.prefill(ids, sites, clean, shared) if shared else rm.prefill(ids, sites)


@torch.no_grad()
def rewards_from_prefix(rm: RewardModel, clean: CleanRun | None, texts: Sequence[Tensor]) -> Float[Tensor, " texts"]:
    """r of each text [T], float32. Without a clean run (PMs that cannot be resumed) every text is run whole."""
    cut = [ids[: rm.read_position(ids) + 1] for ids in texts]
    if clean is None:
        return rm.score_ids(cut)
    out = torch.zeros(len(texts))
    shared = [min(shared_prefix_length(clean.ids, ids), ids.numel() - 1) for ids in cut]
    for some in _batches(shared, [ids.numel() for ids in cut]):
        out[torch.tensor(some)] = _run(rm, clean, [cut[i] for i in some], min(shared[i] for i in some))
    return out


def _run(rm: RewardModel, clean: CleanRun, texts: Sequence[Tensor], start: int) -> Float[Tensor, " texts"]:
    """One forward pass of the texts' tokens from ``start`` on."""
    rows = pad_sequence([ids[start:] for ids in texts], batch_first=True, padding_value=rm.pad_id)
    reads = torch.tensor([ids.numel() - start - 1 for ids in texts], device=rm.device)
    positions = torch.arange(start, start + rows.shape[1]).clamp_max(rm.context - 1)
    hidden = rm.run_cached(rows, positions, cache_of(clean.keys, start, len(texts)))
    return rm.read_out(hidden[torch.arange(len(texts), device=rm.device), reads]).cpu()


def _batches(shared: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    """Batches of texts by the length of their shared prefix; rows x (longest text - shortest prefix) <= TOKEN_BUDGET."""
    order = sorted(range(len(shared)), key=lambda i: (-shared[i], lengths[i], i))
    batch: list[int] = []
    longest = 0
    for i in order:
        width = max(longest, lengths[i]) - shared[i]  # prefixes get shorter in this order, so the last text sets the start
        if batch and (width * (len(batch) + 1) > TOKEN_BUDGET or shared[batch[0]] - shared[i] > width // 2):
            yield batch
            batch, longest = [], 0
        batch.append(i)
        longest = max(longest, lengths[i])
    if batch:
        yield batch


def response_start(rm: RewardModel, ids: Tensor, empty: Tensor) -> int:
    """The first token of a single completion's span; never 0.

    It is the token at which the text [T] diverges from the same text with an ``empty`` response.
    """
    return max(1, min(shared_prefix_length(ids, empty), rm.read_position(ids)))

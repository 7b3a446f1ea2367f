"""Rewards of many texts that begin like one clean text: only the tokens after the shared prefix are run.

Each text takes the keys and values of its shared prefix from the clean run. Texts that diverge from it at about the same
token share a forward pass. Rows are padded on the right, after the token that is read, so attention never sees the padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rmscope.model.reward_model import TOKEN_BUDGET, RewardModel
from rmscope.model.sites import CleanRun


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
        start = min(shared[i] for i in some)
        rows = pad_sequence([cut[i][start:] for i in some], batch_first=True, padding_value=rm.pad_id)
        reads = torch.tensor([cut[i].numel() - start - 1 for i in some], device=rm.device)
        positions = torch.arange(start, start + rows.shape[1]).clamp_max(rm.context - 1)
        hidden = rm.run_cached(rows, positions, clean.cache(start, len(some)))
        out[torch.tensor(some)] = rm.read_out(hidden[torch.arange(len(some), device=rm.device), reads]).cpu()
    return out


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
    """The first token of a completion's span: where the text [T] diverges from that with an ``empty`` response; never 0."""
    return max(1, min(shared_prefix_length(ids, empty), rm.read_position(ids)))

"""Rewards of many texts that begin like one clean text: only the tokens after the shared prefix are run.

Each text takes the keys and values of its shared prefix from the clean run. Texts that diverge from it at about the same
token share a forward pass. Rows are padded on the right, after the token that is read, so attention never sees the padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rmscope.model.reward_model import TOKEN_BUDGET, RewardModel
from rmscope.model.sites import CleanRun

CUT_TOKENS = 8192
"""Tokens (those of the clean text included) of all endings in one batch: their keys and values are copied."""


def shared_prefix_length(a: Tensor, b: Tensor) -> int:
    """The number of first tokens that two texts share."""
    n = min(a.numel(), b.numel())
    other = (a[:n] != b[:n]).nonzero()
    return int(other[0]) if other.numel() else n


def run_from_prefix(rm: RewardModel, clean: CleanRun, ids: Tensor, sites: Sequence[str]) -> CleanRun:
    """The clean run of a text [T] that takes its shared prefix from the clean run of another text."""
    ids = ids[: rm.read_position(ids) + 1]
    mixes = max(clean.ids.numel(), ids.numel()) <= rm.capabilities.mixing
    shared = min(shared_prefix_length(clean.ids, ids), ids.numel() - 1) if mixes else 0
    return rm.prefill(ids, sites, clean, shared) if shared else rm.prefill(ids, sites)


@torch.no_grad()
def rewards_from_prefix(rm: RewardModel, clean: CleanRun | None, texts: Sequence[Tensor]) -> Float[Tensor, " texts"]:
    """r of each text [T], float32. Without a clean run (PMs that cannot be resumed) every text is run whole, and so is one
    that may share nothing with others (``Capabilities.mixing``)."""
    cut = [ids[: rm.read_position(ids) + 1] for ids in texts]
    if clean is None or max(clean.ids.numel(), *(ids.numel() for ids in cut), 0) > rm.capabilities.mixing:
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


@torch.no_grad()
def rewards_of_cuts(
    rm: RewardModel, clean: CleanRun, cuts: Sequence[int], ending: Int[Tensor, " n"]
) -> Float[Tensor, " cuts"]:
    """r of the clean text cut to its first so many tokens, each followed by the same ending, float32.

    Only the endings are run, many in a batch: each attends to the clean run's keys up to its cut and to its own tokens.
    """
    ending = ending[: rm.read_position(ending) + 1]
    n, length = ending.numel(), max(cuts)
    if length + n > min(
        rm.attention_window, rm.capabilities.mixing
    ):  # a window counts places in the batch, where an ending is far from its cut
        return rewards_from_prefix(rm, clean, [torch.cat([clean.ids[:cut], ending]) for cut in cuts])
    rewards = []
    for some in torch.tensor(cuts).split(max(1, CUT_TOKENS // (length + n))):
        seen = torch.arange(length) < some[:, None]
        seen = torch.cat([seen, torch.ones(len(some), n, dtype=torch.bool)], 1)
        places = some[:, None] + torch.arange(n)
        hidden = rm.run_cached(ending.expand(len(some), -1), places, clean.cache(length, len(some)), seen)
        rewards.append(rm.read_out(hidden[:, -1]).cpu())
    return torch.cat(rewards)


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

"""Exact ablation effects: R_j = r(s) - r(s with f_tj := 0 for t in the span), by running the model.

Features are encoded once, from the clean run. The edit is x_t - f_tj d_j: the SAE's error stays, and nothing is encoded
again. Only features that fire are run. A run starts at the site and at the feature's first firing; what comes before is
taken from the clean run, as streams, keys and values. Many ablations share one row without padding (``model/ragged.py``),
and the last block runs for the read position only. PMs that take no such rows run batches, each from its earliest firing
on. PMs that cannot be resumed at a site (encoders, decoders with recurrent layers) run whole texts from the site on. Where
even that gives another reward, each ablation is a full forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from rmscope.model.packing import Batch, pad_texts
from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel
from rmscope.model.sites import CleanRun, keep_stream
from rmscope.pairs.pair import SIDES
from rmscope.sae.base import Active, Sae

ROW_TOKENS = 1024
"""Tokens of all ablations in one row."""
BATCH_TOKENS = 2048
"""Tokens (ablations x rest of the response) in one run."""
RUN_COST = 32
"""What a run costs beside its tokens, in tokens (8 ms at 4,000 tokens per second on two cores)."""

Entries = tuple[Tensor, Tensor, Tensor]
"""Tokens in the span, features and values of active entries, sorted by token."""


@dataclass(frozen=True, slots=True)
class Response:
    """A response ready for ablation at one site: its clean run, the start of its span, and its active features there."""

    text: CleanRun
    start: int
    x: Float[Tensor, "span d"]
    active: Active

    def features(self) -> Int[Tensor, " active"]:
        """The features that fire, ascending."""
        return torch.unique(self.active.feature)


def clean_runs(
    rm: RewardModel, tokens: PairTokens, sites: Sequence[str], sides: Sequence[str] = SIDES
) -> dict[str, CleanRun]:
    """Clean runs of a pair's sides. The second side takes the shared prefix from the first."""
    if not rm.capabilities.resume:
        return {side: run_whole(rm, tokens.side(side), sites) for side in sides}
    first, *rest = sides
    out = {first: rm.prefill(tokens.side(first), sites)}
    for side in rest:
        shared = min(tokens.shared, out[first].ids.numel(), rm.read_position(tokens.side(side)))
        out[side] = rm.prefill(tokens.side(side), sites, out[first], shared)
    return out


def run_whole(rm: RewardModel, ids: Tensor, sites: Sequence[str]) -> CleanRun:
    """The clean run of one text [T] without keys and values, for PMs that cannot be resumed at a site."""
    ids = ids[: rm.read_position(ids) + 1] if rm.causal else ids
    batch, streams = copies_of(ids, 1), dict[str, Tensor]()
    reward = rm.rewards(batch, {site: keep_stream(streams, site) for site in rm.whole_sites(sites)})
    streams |= rm.split(batch, sites, streams)
    rest = {site: x[0] for site, x in batch.rest.items()}
    return CleanRun(ids, {site: x[0] for site, x in streams.items()}, [], float(reward[0]), rest=rest)


def copies_of(ids: Tensor, n: int, rest: Mapping[str, Tensor] = {}) -> Batch:
    """A batch of n copies of one text [T]; ``rest`` holds the other part of its stream at sites that are a part."""
    batch = pad_texts([(0, "chosen", ids, 1, ids.numel() - 1)] * n, 0)
    batch.rest.update({site: x.expand(n, -1, -1) for site, x in rest.items()})
    return batch


@torch.no_grad()
def rewards_on_span(
    rm: RewardModel, text: CleanRun, site: str, start: int, streams: Float[Tensor, "variants span d"]
) -> Float[Tensor, " variants"]:
    """r of a text with its stream at ``site`` replaced from token ``start`` to the read position, variant by variant.

    No block up to the site runs again, and nothing before ``start``, as far as the PM takes that (``Capabilities``).
    """
    if streams.shape[1] == 0:
        return torch.full((len(streams),), text.reward)
    rewards = []
    for part in streams.split(max(1, BATCH_TOKENS // (streams.shape[1] if text.keys else text.ids.numel()))):
        if text.keys:
            rewards.append(rm.resume(text, site, start, part.to(rm.device)).cpu())
        else:
            before = text.streams[site][:start].expand(len(part), -1, -1)
            copies = copies_of(text.ids, len(part), text.rest)
            rewards.append(rm.rewards_from(copies, site, torch.cat([before, part.to(before)], 1)).cpu())
    return torch.cat(rewards)


def at_site(sae: Sae, text: CleanRun, site: str, start: int) -> Response:
    """Encodes the span of a clean run, once."""
    x = text.streams[site][start:].float().cpu()
    return Response(text, start, x, sae.active(x))


def ablate_groups(
    rm: RewardModel, sae: Sae, response: Response, site: str, groups: Sequence[Sequence[int]]
) -> Float[Tensor, " groups"]:
    """R_G of each group of features, ablated together; exactly 0 where none of a group fires."""
    return ablate_entries(rm, sae, response, site, [entries_of(response.active, group) for group in groups])


def entries_of(active: Active, features: Sequence[int]) -> Entries:
    """The active entries of a set of features, by token."""
    mask = torch.isin(active.feature, torch.as_tensor(list(features)))
    return active.token[mask], active.feature[mask], active.value[mask]


def ablate_entries(
    rm: RewardModel, sae: Sae, response: Response, site: str, entries: Sequence[Entries]
) -> Float[Tensor, " ablations"]:
    """The effect of setting each list of entries (token in the span, feature, value; by token) to 0."""
    text, effects = response.text, torch.zeros(len(entries))
    first = {i: int(token[0]) for i, (token, _, _) in enumerate(entries) if token.numel()}
    fires = sorted(first, key=lambda i: first[i])
    cut = (fires, [first[i] for i in fires], response.x.shape[0])
    run = _in_one_row if runs_ragged(rm, text) else _in_rectangles
    for batch in cut_batches(rm, text, *cut):
        rewards = run(rm, sae, response, site, [entries[i] for i in batch])
        effects[torch.tensor(batch)] = (text.reward - rewards).float().cpu()
    return effects


def runs_ragged(rm: RewardModel, text: CleanRun) -> bool:
    """Whether many continuations of a text run in one row without padding."""
    return bool(text.keys) and rm.capabilities.ragged and text.ids.numel() <= rm.attention_window


def cut_batches(rm: RewardModel, text: CleanRun, ids: Sequence[int], firsts: Sequence[int], length: int) -> list[list[int]]:
    """Ablations of one response, in order of their first token of ``length``, in batches that run at once."""
    if not text.keys:
        rows = max(1, BATCH_TOKENS // text.ids.numel()) if rm.capabilities.skipping else 1
        return [list(ids[i : i + rows]) for i in range(0, len(ids), rows)]
    return (_rows if runs_ragged(rm, text) else _batches)(ids, firsts, length)


def _in_one_row(rm: RewardModel, sae: Sae, response: Response, site: str, entries: Sequence[Entries]) -> Tensor:
    """Each ablation from its own first firing on, all in one row."""
    firsts = torch.stack([token[0] for token, _, _ in entries])
    lengths = response.x.shape[0] - firsts
    offsets = lengths.cumsum(0) - lengths - firsts  # the place of an ablation's token t in the row is offset + t
    stream = response.x[torch.arange(int(lengths.sum())) - torch.repeat_interleave(offsets, lengths)]
    counts = torch.tensor([token.numel() for token, _, _ in entries])
    token, feature, value = (torch.cat(column) for column in zip(*entries, strict=True))
    stream.index_add_(0, torch.repeat_interleave(offsets, counts) + token, -value[:, None] * sae.W_dec[feature])
    return rm.resume_ragged(response.text, site, (response.start + firsts).tolist(), stream)


def _in_rectangles(rm: RewardModel, sae: Sae, response: Response, site: str, entries: Sequence[Entries]) -> Tensor:
    """All ablations from the earliest of their firings on, one row each."""
    first = int(entries[0][0][0])
    streams = response.x[first:].expand(len(entries), -1, -1).clone()
    for stream, (token, feature, value) in zip(streams, entries, strict=True):
        stream.index_add_(0, token - first, -value[:, None] * sae.W_dec[feature])
    return rewards_on_span(rm, response.text, site, response.start + first, streams)


def entries_of_each(active: Active, features: Int[Tensor, " n"]) -> list[Entries]:
    """The active entries of each of ``features`` (ascending, all firing), from one sort."""
    mask = torch.isin(active.feature, features)
    feature, order = active.feature[mask].sort(stable=True)
    counts = torch.unique_consecutive(feature, return_counts=True)[1].tolist()
    columns = (active.token[mask][order], feature, active.value[mask][order])
    return list(zip(*(column.split(counts) for column in columns), strict=True))


def _rows(ids: Sequence[int], firsts: Sequence[int], length: int) -> list[list[int]]:
    """Ablations in order of their first firing, in rows of about ``ROW_TOKENS`` tokens, as even as possible."""
    total = np.cumsum([length - first for first in firsts])
    if not len(total):
        return []
    rows = -(-int(total[-1]) // ROW_TOKENS)
    cuts = np.searchsorted(total, total[-1] * np.arange(1, rows) / rows) + 1
    return [part.tolist() for part in np.split(np.asarray(ids), cuts) if len(part)]


def _batches(ids: Sequence[int], firsts: Sequence[int], length: int) -> list[list[int]]:
    """The cheapest cut of the ablations, sorted by first firing, into batches that each start at their earliest token.

    A run costs its tokens (ablations x the rest of the response) and a fixed sum. Dynamic programming over the beginning of
    the last batch gives the best cut.
    """
    n = len(ids)
    rest = length - np.asarray(firsts)
    cost, cut = np.full(n + 1, np.inf), np.zeros(n + 1, dtype=int)
    cost[0] = 0.0
    for stop in range(1, n + 1):
        size = np.arange(stop, 0, -1) * rest[:stop]  # tokens of a batch that begins at 0 .. stop - 1
        size = np.where((size <= BATCH_TOKENS) | (np.arange(stop) == stop - 1), size, np.inf)
        total = cost[:stop] + size + RUN_COST
        cut[stop] = int(total.argmin())
        cost[stop] = total[cut[stop]]
    batches: list[list[int]] = []
    while n:
        batches.append(list(ids[cut[n] : n]))
        n = int(cut[n])
    return batches[::-1]

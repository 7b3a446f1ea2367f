"""Exact ablation effects: R_j = r(s) - r(s with f_tj := 0 for t in the span), by running the model.

Features are encoded once from the clean run; the edit is x_t - f_tj d_j; the SAE's error stays and nothing is encoded
again (METHOD, "Ablation effect"). Where the time goes, and how it is saved: only features that fire are run; the model
starts at the site, with the stream and the keys and values of the clean run; only tokens from the feature's first
firing on, many features in one row without padding (``branches.py``); the last block for the read position only. PMs that
take no such rows run rectangles that begin at the earliest firing; PMs that cannot be resumed at a site (encoders) run
whole forwards with a hook.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from rmscope.model.clean_run import CleanRun
from rmscope.model.packing import pad_texts
from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import SIDES
from rmscope.sae.base import Active, Sae

ROW_TOKENS = 1024
"""Tokens of all branches in one row."""
BATCH_TOKENS = 2048
"""Tokens (features x rest of the response) in one run."""
RUN_COST = 32
"""What a run costs beside its tokens, in tokens (8 ms at 4,000 tokens a second on two cores)."""


Entries = tuple[Tensor, Tensor, Tensor]
"""Tokens in the span, features and values of active entries, sorted by token."""


@dataclass(frozen=True, slots=True)
class Ablations:
    """One response at one site: features (or groups) and what ablating each does to the reward."""

    pair: int
    side: str
    feature: Int[Tensor, " ablated"]
    effect: Float[Tensor, " ablated"]
    ending: Float[Tensor, " ablated"]
    """The effect of ablating the feature from the response's ending alone (final punctuation, template tokens)."""


@dataclass(frozen=True, slots=True)
class Response:
    """A response ready for ablation at one site: its clean run, the start of its span, and its active features there."""

    text: CleanRun
    start: int
    x: Float[Tensor, "span d"]
    active: Active

    def features(self) -> Int[Tensor, " active"]:
        return torch.unique(self.active.feature)


def prefill_pair(
    rm: RewardModel, tokens: PairTokens, sites: Sequence[str], sides: Sequence[str] = SIDES
) -> dict[str, CleanRun]:
    """Clean runs of a pair's sides; the second forks the first one's keys and values at the divergence."""
    first, *rest = sides
    out = {first: rm.prefill(tokens.side(first), sites)}
    for side in rest:
        shared = min(tokens.shared, out[first].ids.numel(), rm.read_position(tokens.side(side)))
        out[side] = rm.prefill(tokens.side(side), sites, out[first], shared)
    return out


def at_site(sae: Sae, text: CleanRun, site: str, start: int) -> Response:
    """Encodes the span of a clean run, once."""
    x = text.streams[site][start:].float().cpu()
    return Response(text, start, x, sae.active(x))


def ablate_groups(
    rm: RewardModel, sae: Sae, response: Response, site: str, groups: Sequence[Sequence[int]]
) -> Float[Tensor, " groups"]:
    """R_G of each group of features ablated together; 0 exactly where none of a group fires."""
    return ablate_entries(rm, sae, response, site, [_entries(response.active, group) for group in groups])


def ablate_entries(
    rm: RewardModel, sae: Sae, response: Response, site: str, entries: Sequence[Entries]
) -> Float[Tensor, " ablations"]:
    """The effect of setting each list of entries (token in the span, feature, value; by token) to 0."""
    effects = torch.zeros(len(entries))
    first = {i: int(token[0]) for i, (token, _, _) in enumerate(entries) if token.numel()}
    fires = sorted(first, key=lambda i: first[i])
    together = rm.capabilities.ragged and response.text.ids.numel() <= rm.attention_window
    run, cut = (_in_one_row, _rows) if together else (_in_rectangles, _batches)
    for batch in cut(fires, [first[i] for i in fires], response.x.shape[0]):
        rewards = run(rm, sae, response, site, [entries[i] for i in batch])
        effects[torch.tensor(batch)] = (response.text.reward - rewards).float().cpu()
    return effects


def _in_one_row(rm: RewardModel, sae: Sae, response: Response, site: str, entries: Sequence[Entries]) -> Tensor:
    """Each ablation from its own first firing on, all in one row."""
    length = response.x.shape[0]
    firsts = torch.stack([token[0] for token, _, _ in entries])
    lengths = length - firsts
    offsets = lengths.cumsum(0) - lengths - firsts  # where a branch's token t lies: offset + t
    row = torch.repeat_interleave(offsets, lengths)
    stream = response.x[torch.arange(int(lengths.sum())) - row]
    counts = torch.tensor([token.numel() for token, _, _ in entries])
    token, feature, value = (torch.cat(column) for column in zip(*entries, strict=True))
    at = torch.repeat_interleave(offsets, counts) + token
    stream.index_add_(0, at, -value[:, None] * sae.W_dec[feature])
    return rm.resume_ragged(response.text, site, (response.start + firsts).tolist(), stream)


def _in_rectangles(rm: RewardModel, sae: Sae, response: Response, site: str, entries: Sequence[Entries]) -> Tensor:
    """All ablations from the earliest of their firings on, one row each."""
    first = int(entries[0][0][0])
    stream = response.x[first:].expand(len(entries), -1, -1).clone()
    for row, (token, feature, value) in enumerate(entries):
        stream[row].index_add_(0, token - first, -value[:, None] * sae.W_dec[feature])
    return rm.resume(response.text, site, response.start + first, stream.to(rm.device))


def _entries(active: Active, group: Sequence[int]) -> Entries:
    """The active entries of a group's features, by token."""
    mask = torch.isin(active.feature, torch.as_tensor(list(group)))
    return active.token[mask], active.feature[mask], active.value[mask]


def _entries_of_each(active: Active, features: Int[Tensor, " n"]) -> list[Entries]:
    """The active entries of each of ``features`` (ascending, all firing), from one sort."""
    mask = torch.isin(active.feature, features)
    feature, order = active.feature[mask].sort(stable=True)
    counts = torch.unique_consecutive(feature, return_counts=True)[1].tolist()
    columns = (active.token[mask][order], feature, active.value[mask][order])
    return list(zip(*(column.split(counts) for column in columns), strict=True))


def _rows(ids: Sequence[int], firsts: Sequence[int], length: int) -> list[list[int]]:
    """Ablations in order of their first firing, in rows of at most ``ROW_TOKENS`` tokens, as even as can be."""
    total = np.cumsum([length - first for first in firsts])
    if not len(total):
        return []
    rows = -(-int(total[-1]) // ROW_TOKENS)
    cuts = np.searchsorted(total, total[-1] * np.arange(1, rows) / rows) + 1
    return [part.tolist() for part in np.split(np.asarray(ids), cuts) if len(part)]


def _batches(ids: Sequence[int], firsts: Sequence[int], length: int) -> list[list[int]]:
    """The cheapest cut of the ablations, sorted by first firing, into batches that each start at their earliest token.

    A run costs its tokens (ablations x the rest of the response) and a fixed sum; the best cut follows by dynamic
    programming over where the last batch begins.
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
    stop = n
    while stop:
        batches.append(list(ids[cut[stop] : stop]))
        stop = int(cut[stop])
    return batches[::-1]


def ablate_naively(rm: RewardModel, sae: Sae, ids: Tensor, site: str, start: int, groups: Sequence[Sequence[int]]) -> Tensor:
    """The same by one full forward pass a group, with a hook: the fallback for PMs that cannot be resumed at a site."""
    ids = ids[: rm.read_position(ids) + 1] if rm.causal else ids
    batch = pad_texts([(0, "chosen", ids, start, ids.numel() - 1)], 0)
    with torch.no_grad():
        clean = rm.rewards(batch)
        x = rm.streams(batch, [site])[site][0, start:].float().cpu()
        active = sae.active(x)
        effects = []
        for group in groups:
            token, feature, value = _entries(active, group)
            change = torch.zeros_like(x).index_add_(0, token, -value[:, None] * sae.W_dec[feature])

            def edit(stream: Tensor, change: Tensor = change) -> Tensor:
                edited = stream.clone()
                edited[0, start:] += change.to(stream)
                return edited

            effects.append((clean - rm.rewards(batch, {site: edit}))[0].float().cpu())
    return torch.stack(effects) if effects else torch.zeros(0)


def ablations(
    rm: RewardModel,
    saes: Mapping[str, Sae],
    tokens: Sequence[PairTokens],
    wanted: Mapping[int, Mapping[str, Mapping[str, Sequence[int] | None]]],
    endings: bool = False,
) -> Iterator[tuple[str, Ablations]]:
    """(site, ablations) for ``wanted[pair][side][site]`` = features, or None for all active ones.

    With ``endings`` each ablation is done again on the response's ending alone (0 else, and for encoders).

    Features that do not fire in a response are left out: their effect is exactly 0.
    """
    for pair, sides in wanted.items():
        t = tokens[pair]
        texts = prefill_pair(rm, t, list(saes), list(sides)) if rm.capabilities.resume else {}
        for side, by_site in sides.items():
            for site, features in by_site.items():
                if rm.capabilities.resume:
                    response = at_site(saes[site], texts[side], site, t.divergence)
                    firing = response.features()
                    run = _chosen(firing, features)
                    entries = _entries_of_each(response.active, run)
                    effect = ablate_entries(rm, saes[site], response, site, entries)
                    ending = torch.zeros_like(effect)
                    if endings:
                        end = rm.ending(response.text.ids) - t.divergence
                        last = [(token[token >= end], j[token >= end], f[token >= end]) for token, j, f in entries]
                        ending = ablate_entries(rm, saes[site], response, site, last)
                else:
                    x = rm.streams(pad_texts([(0, side, t.side(side), 1, 0)], 0), [site])[site][0, t.divergence :]
                    run = _chosen(torch.unique(saes[site].active(x.float().cpu()).feature), features)
                    effect = ablate_naively(rm, saes[site], t.side(side), site, t.divergence, [[int(j)] for j in run])
                    ending = torch.zeros_like(effect)
                yield site, Ablations(pair, side, run, effect, ending)


def _chosen(firing: Tensor, features: Sequence[int] | None) -> Tensor:
    return firing if features is None else firing[torch.isin(firing, torch.as_tensor(list(features)))]

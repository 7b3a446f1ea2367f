"""Joint ablation at several sites: what a set of features does to the reward, wherever in the model they are.

Features are encoded once, from the clean run. Let c_t = Σ_j f_tj d_j over the ablated features of a site. At the first site
the stream becomes x_t - c_t. Later blocks carry this edit on, so a second subtraction could take the same content out twice.
At a later site only the stream's coordinate along c_t is set: to what it is in x_t - c_t, with x_t from the clean run. All
other coordinates stay as the edits before left them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from rmscope.effects.ablation import Entries, Response, ablate_entries, copies_of, cut_batches, entries_of, runs_ragged
from rmscope.model.base import whole_stream
from rmscope.model.reward_model import RewardModel
from rmscope.model.site_names import BOTH, kind_of, needs_base, whole_site
from rmscope.model.sites import Clamp, CleanRun
from rmscope.sae.base import Sae

Members = Mapping[str, Sequence[int]]
"""A set of features: at each site those that belong to it."""
Change = Mapping[str, tuple[Tensor, Tensor]]
"""By site of the whole stream: tokens of the span, ascending, and c_t there, [n, d]."""


def union(sets: Sequence[Members]) -> dict[str, list[int]]:
    """The features of several sets as one, each once."""
    joined: dict[str, set[int]] = {}
    for of in sets:
        for site, features in of.items():
            joined.setdefault(site, set()).update(features)
    return {site: sorted(features) for site, features in joined.items()}


def ablate_members(
    rm: RewardModel, saes: Mapping[str, Sae], responses: Mapping[str, Response], sets: Sequence[Members]
) -> Float[Tensor, " sets"]:
    """R of each set of features, ablated together; exactly 0 where none of a set fires.

    ``responses`` holds one response at every site. A set at one site alone is ablated as by
    :func:`~rmscope.effects.ablation.ablate_groups`.
    """
    entries = [{site: entries_of(responses[site].active, listed) for site, listed in of.items()} for of in sets]
    return ablate_entries_across(rm, saes, responses, entries)


def ablate_entries_across(
    rm: RewardModel,
    saes: Mapping[str, Sae],
    responses: Mapping[str, Response],
    ablated: Sequence[Mapping[str, Entries]],
) -> Float[Tensor, " ablations"]:
    """The effect of setting the active entries of each ablation to 0 at all of its sites."""
    effects = torch.zeros(len(ablated))
    firing = [{site: e for site, e in by_site.items() if e[0].numel()} for by_site in ablated]
    for site, response in responses.items():
        if alone := [i for i, by_site in enumerate(firing) if by_site.keys() == {site}]:
            effects[alone] = ablate_entries(rm, saes[site], response, site, [firing[i][site] for i in alone])
    if several := [i for i, by_site in enumerate(firing) if len(by_site) > 1]:
        effects[several] = take_out(rm, responses, [contributions(saes, firing[i]) for i in several])
    return effects


def contributions(saes: Mapping[str, Sae], entries: Mapping[str, Entries]) -> dict[str, tuple[Tensor, Tensor]]:
    """c_t of some active entries at each site, as a move of the whole stream."""
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for site, (token, feature, value) in entries.items():
        moves = value[:, None] * saes[site].W_dec[feature]
        whole = whole_stream(site, moves, torch.zeros_like(moves)) if kind_of(site) == BOTH else moves
        parts.setdefault(whole_site(site), []).append((token, whole))
    summed = {}
    for site, listed in parts.items():
        token, place = torch.unique(torch.cat([t for t, _ in listed]), return_inverse=True)
        moves = torch.cat([m for _, m in listed])
        summed[site] = token, moves.new_zeros(len(token), moves.shape[1]).index_add_(0, place, moves)
    return summed


@torch.no_grad()
def take_out(rm: RewardModel, responses: Mapping[str, Response], changes: Sequence[Change]) -> Float[Tensor, " changes"]:
    """r minus r without what each change takes out of the stream, at all of its sites in one run."""
    effects = torch.zeros(len(changes))
    some = next(iter(responses.values()))
    clean = {whole_site(site): _whole(site, response) for site, response in responses.items()}
    by_site: dict[str, list[int]] = {}
    for i, change in enumerate(changes):
        if change:
            by_site.setdefault(min(change, key=rm.site_index), []).append(i)
    for site, listed in by_site.items():
        first = {i: min(int(token[0]) for token, _ in changes[i].values()) for i in listed}
        order = sorted(listed, key=first.__getitem__)
        for batch in cut_batches(rm, some.text, order, [first[i] for i in order], len(some.x)):
            firsts = torch.tensor([first[i] for i in batch])
            rewards = _rewards(rm, some.text, some.start, clean, site, [changes[i] for i in batch], firsts)
            effects[torch.tensor(batch)] = (some.text.reward - rewards).float().cpu()
    return effects


def _whole(site: str, response: Response) -> Float[Tensor, "span d"]:
    """The clean run's whole stream on the span."""
    if not needs_base(site):
        return response.x
    return whole_stream(site, response.x, response.text.rest[site][response.start :].to(response.x))


def _rewards(
    rm: RewardModel,
    text: CleanRun,
    start: int,
    clean: Mapping[str, Float[Tensor, "span d"]],
    site: str,
    changes: Sequence[Change],
    firsts: Tensor,
) -> Float[Tensor, " changes"]:
    """r with changes that begin at ``site``, the first of them at the token ``firsts[0]``."""
    n, length = len(changes), len(clean[site])
    if not text.keys:
        begins, lengths = torch.full((n,), -start), torch.full((n,), text.ids.numel())
    else:
        begins = firsts if runs_ragged(rm, text) else firsts[:1].expand(n)
        lengths = length - begins
    offsets = lengths.cumsum(0) - lengths - begins  # the place of token t of a change is offset + t
    later = {s: _clamp(clean[s], s, changes, offsets) for s in sorted(clean, key=rm.site_index) if s != site}
    later = {s: clamp for s, clamp in later.items() if clamp.index.numel()}
    if not text.keys:
        stream = _clamp(clean[site], site, changes, offsets)(text.streams[site].expand(n, -1, -1))
        return rm.rewards_from(copies_of(text.ids, n), site, stream, later)
    stream = clean[site][torch.arange(int(lengths.sum())) - torch.repeat_interleave(offsets, lengths)]
    for change, offset in zip(changes, offsets, strict=True):
        token, contribution = change[site]
        stream.index_add_(0, offset + token, -contribution)
    if runs_ragged(rm, text):
        return rm.resume_ragged(text, site, (start + begins).tolist(), stream, later)
    return rm.resume(text, site, start + int(begins[0]), stream.unflatten(0, (n, -1)), later)


def _clamp(clean: Float[Tensor, "span d"], site: str, changes: Sequence[Change], offsets: Tensor) -> Clamp:
    """Sets the coordinate along each change's c_t at a site to what it is in the clean stream without c_t."""
    nothing = torch.zeros(0, dtype=torch.long), clean[:0]
    listed = [change.get(site, nothing) for change in changes]
    token, contribution = (torch.cat(column) for column in zip(*listed, strict=True))
    place = torch.cat([offset + t for offset, (t, _) in zip(offsets, listed, strict=True)])
    unit = normalize(contribution, dim=1)
    return Clamp(place, unit, ((clean[token] - contribution) * unit).sum(1))

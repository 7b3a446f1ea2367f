"""Exact ablations over many pairs: of features, and of sets of features such as concepts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rmscope.effects.ablation import Entries, Response, at_site, clean_runs, entries_of, entries_of_each
from rmscope.effects.across import Members, ablate_entries_across
from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel
from rmscope.sae.base import Sae

Groups = Mapping[int, Members]
"""Sets of features by number."""


@dataclass(frozen=True, slots=True)
class Ablations:
    """One response: features of a site, or numbers of sets, and what ablating each does to the reward."""

    pair: int
    side: str
    feature: Int[Tensor, " ablated"]
    effect: Float[Tensor, " ablated"]
    ending: Float[Tensor, " ablated"]
    """The effect of ablating the feature from the response's ending alone (final punctuation, template tokens)."""


def ablations(
    rm: RewardModel,
    saes: Mapping[str, Sae],
    tokens: Sequence[PairTokens],
    wanted: Mapping[int, Mapping[str, Mapping[str, Sequence[int] | None]]],
    endings: bool = False,
    groups: Mapping[str, Groups] | None = None,
) -> Iterator[tuple[str, Ablations]]:
    """(site, ablations) for ``wanted[pair][side][site]`` = features, or None for all active ones.

    Features that do not fire in a response are left out: their effect is exactly 0. With ``endings`` each feature is also
    ablated from the response's ending alone (0 without it, and for PMs that cannot be resumed at a site). What is wanted
    under a name of ``groups`` are numbers of its sets of features, each ablated at all of its sites.
    """
    groups = groups or {}
    for pair, sides in wanted.items():
        texts = clean_runs(rm, tokens[pair], list(saes), list(sides))
        for side, by_name in sides.items():
            sites = {s for name, numbers in by_name.items() for s in _sites(name, numbers, groups)}
            responses = {s: at_site(saes[s], texts[side], s, tokens[pair].divergence) for s in saes if s in sites}
            for name, numbers in by_name.items():
                if name in groups:
                    run, listed = _sets(responses, numbers or (), groups[name])
                else:
                    run, listed = _features(responses, name, numbers)
                effect = ablate_entries_across(rm, saes, responses, listed)
                ending = torch.zeros_like(effect)
                if endings and texts[side].keys:
                    end = rm.ending(texts[side].ids) - tokens[pair].divergence
                    ending = ablate_entries_across(
                        rm, saes, responses, [{s: _from(end, e) for s, e in of.items()} for of in listed]
                    )
                yield name, Ablations(pair, side, run, effect, ending)


def _sites(name: str, numbers: Sequence[int] | None, groups: Mapping[str, Groups]) -> set[str]:
    """The sites of what is wanted under a name."""
    return {site for number in numbers or () for site in groups[name][number]} if name in groups else {name}


def _features(
    responses: Mapping[str, Response], site: str, numbers: Sequence[int] | None
) -> tuple[Int[Tensor, " n"], list[dict[str, Entries]]]:
    """The wanted features of a site that fire, and the entries of each."""
    run = responses[site].features()
    if numbers is not None:
        run = run[torch.isin(run, torch.as_tensor(list(numbers)))]
    return run, [{site: entries} for entries in entries_of_each(responses[site].active, run)]


def _sets(
    responses: Mapping[str, Response], numbers: Sequence[int], groups: Groups
) -> tuple[Int[Tensor, " n"], list[dict[str, Entries]]]:
    """The wanted sets, and the entries of each at its sites."""
    entries = [{s: entries_of(responses[s].active, listed) for s, listed in groups[n].items()} for n in numbers]
    return torch.tensor(numbers, dtype=torch.long), entries


def _from(end: int, entries: Entries) -> Entries:
    """The entries at the token ``end`` and after it."""
    late = entries[0] >= end
    return entries[0][late], entries[1][late], entries[2][late]

"""What preference training wrote at each difference site, and how much of it is in the reported concepts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from rmscope.effects.splice import Replacement, Span, constant, delta_r2, run_replacements, splice
from rmscope.effects.written import WRITTEN_PAIRS
from rmscope.model.site_names import is_difference, parts_of
from rmscope.ranking.concepts import members_of
from rmscope.run.data import RunData
from rmscope.run.evidence import WrittenEvidence
from rmscope.sae.base import Active, Sae
from rmscope.sae.joint import JointSae
from rmscope.statistics import one_minus, ratio

KEEP = (1, 2, 3, 5, 8, 12, 20, 30)
"""Numbers of concepts that are kept alone, those of the largest effects first."""


def written_evidence(run: RunData) -> dict[str, WrittenEvidence]:
    """By site: what goes when all that was written is replaced by nothing, by its reconstruction, or by parts of that.

    At the last site also by the features of the first K concepts.
    """
    places = run.pair_set.one_per_prompt(run.of_split("measure"), WRITTEN_PAIRS)
    sites = [site for site in run.sites if is_difference(parts_of(site)[0])]
    replacements: dict[str, tuple[str, Replacement]] = {}
    kept: dict[str, list[int]] = {}
    for site in sites:
        sae = run.saes[site]
        sae = sae.difference if isinstance(sae, JointSae) else sae
        listed = [[j for j in of if j < sae.m] for of in _features_of_concepts(run, site)]
        inside = _marked(sae, listed)
        kinds: dict[str, Replacement] = {
            "base": constant(torch.zeros(sae.d)),
            "all": splice(sae),
            "concepts": partial(_reconstruct_from, sae, inside),
            "others": partial(_reconstruct_from, sae, ~inside),
        }
        kept[site] = [k for k in KEEP if k < len(listed)] if site == sites[-1] else []
        kinds |= {str(k): partial(_reconstruct_from, sae, _marked(sae, listed[:k])) for k in kept[site]}
        replacements |= {f"{site}/{kind}": (parts_of(site)[0], replacement) for kind, replacement in kinds.items()}
    if not sites:
        return {}
    runs = run_replacements(run.rm, run.tokens, places, replacements)
    prompts = np.array([run.pairs[i].prompt_key for i in places])
    evidence = {}
    for site in sites:
        delta = runs[f"{site}/base"].delta
        left = {kind: runs[f"{site}/{kind}"].delta_hat[:, 0] for kind in ("base", "all", "concepts", "others")}
        left |= {str(k): runs[f"{site}/{k}"].delta_hat[:, 0] for k in kept[site]}
        without = left.pop("base")
        of_written = {kind: one_minus((delta - some) ** 2, (delta - without) ** 2, prompts) for kind, some in left.items()}
        evidence[site] = WrittenEvidence(
            written=ratio(delta * (delta - without), delta**2, prompts),
            explained=delta_r2(delta, left["all"], prompts),
            explained_of_written=of_written["all"],
            by_concepts=of_written["concepts"],
            by_others=of_written["others"],
            by_first={k: of_written[str(k)] for k in kept[site]},
            pairs=len(places),
        )
    return evidence


def _features_of_concepts(run: RunData, site: str) -> list[tuple[int, ...]]:
    """The features of each reported concept at a site, by rank: the measure split, on which they are kept, ranks nothing."""
    reported = run.concepts.filter("reported").sort("rank")
    return [members.get(site, ()) for members in members_of(reported).values()]


def _marked(sae: Sae, listed: Sequence[Sequence[int]]) -> Tensor:
    """Marks the features of some concepts, [m]."""
    inside = torch.zeros(sae.m, dtype=torch.bool)
    inside[[j for of in listed for j in of]] = True
    return inside


def _reconstruct_from(sae: Sae, inside: Tensor, at: Span) -> Tensor:
    """The reconstruction from some features alone; ``inside`` [m] marks them."""
    active = sae.active(at.x)
    kept = inside[active.feature]
    return sae.decode_active(Active(active.token[kept], active.feature[kept], active.value[kept], active.n_tokens))[None]

"""What the reported concepts carry together: how much of Δr goes with them, and what each one of them adds to the set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl

from rmscope.effects.ablation import at_site, clean_runs
from rmscope.effects.across import Members, ablate_members, union
from rmscope.effects.written import WRITTEN_PAIRS
from rmscope.ranking.concepts import members_of
from rmscope.run.data import RunData
from rmscope.run.evidence import SetEvidence
from rmscope.statistics import FEW, Array, ratio


def set_evidence(run: RunData) -> SetEvidence | None:
    """Ablates all reported concepts at once, all other features, and all concepts but one in turn, on measure pairs.

    The share of Δr that goes is Σ Δr (Δr - Δr without the set) / Σ Δr². What a concept adds is also carried by the others
    where it adds nothing. None without a reported concept.
    """
    reported = run.concepts.filter("reported")
    if not reported.height:
        return None
    members = members_of(reported)
    content = content_concepts(reported)
    together, features = union(list(members.values())), {site: range(sae.m) for site, sae in run.saes.items()}
    sets: list[Members] = [
        together,
        union([members[c] for c in content]),
        {site: [j for j in of if j not in together.get(site, ())] for site, of in features.items()},
        features,
        *(union([of for other, of in members.items() if other != concept]) for concept in members),
    ]
    places = run.pair_set.one_per_prompt(run.of_split("measure"), WRITTEN_PAIRS)
    delta, left = differences_without(run, places, sets)
    prompts = np.array([run.pairs[i].prompt_key for i in places])
    completeness, of_content, rest, every = (ratio(delta * (delta - some), delta**2, prompts) for some in left[:4])
    return SetEvidence(
        completeness=completeness,
        content=of_content,
        rest=rest,
        all_features=every,
        without={
            concept: ratio(delta * (some - left[0]), delta**2, prompts)
            for concept, some in zip(members, left[4:], strict=True)
        },
        resampled=agreement_by_site(run.measured_effects, dict(reported.select("concept", "site").iter_rows())),
        pairs=len(places),
    )


def content_concepts(reported: pl.DataFrame) -> list[int]:
    """The concepts of content that are specific, from the rows of reported concepts."""
    specific = ~(pl.col("form") | pl.col("flags").list.contains("nonspecific"))
    return reported.filter(specific)["concept"].to_list()


def agreement_by_site(effects: pl.DataFrame, home: Mapping[int, str]) -> dict[str, float]:
    """By home site: Spearman over responses of the effect to zero and the mean effect by place in other responses.

    ``effects`` has the columns concept, pair, side, kind and effect. Sites with fewer than :data:`~rmscope.statistics.FEW`
    responses are left out.
    """
    response = ["concept", "pair", "side"]
    own, place = (
        effects.filter(pl.col("kind") == kind).group_by(response, maintain_order=True).agg(pl.col("effect").mean())
        for kind in ("own", "by_place")
    )
    both = own.join(place, on=response, suffix="_place").filter(pl.col("concept").is_in(list(home)))
    site = pl.col("concept").replace_strict(home, return_dtype=pl.String).alias("site")
    by_site = both.group_by(site, maintain_order=True).agg(
        pl.corr("effect", "effect_place", method="spearman").alias("spearman"), pl.len().alias("responses")
    )
    return dict(by_site.filter(pl.col("responses") >= FEW).sort("site").select("site", "spearman").iter_rows())


def differences_without(run: RunData, places: Sequence[int], sets: Sequence[Members]) -> tuple[Array, list[Array]]:
    """(Δr [pairs], for each set of features Δr with it ablated [pairs])."""
    delta, left = np.zeros(len(places)), [np.zeros(len(places)) for _ in sets]
    for row, place in enumerate(places):
        start = run.tokens[place].divergence
        for side, text in clean_runs(run.rm, run.tokens[place], run.sites).items():
            sign = 1 if side == "chosen" else -1
            responses = {site: at_site(run.saes[site], text, site, start) for site in run.sites}
            effects = ablate_members(run.rm, run.saes, responses, sets)
            delta[row] += sign * text.reward
            for values, effect in zip(left, effects.double().tolist(), strict=True):
                values[row] += sign * (text.reward - effect)
    return delta, left

"""Contributes, sufficient: what each reported feature of a site does when it is taken out, and when it is put in.

*Contributes*: exact ablation on fresh responses changes the reward in the feature's frozen sign. *Sufficient by steering*:
`steering.py`. *Sufficient by text*: a sentence in which it fires, taken from the fit split and put at the
end of fresh responses, moves the reward in its sign against a neutral sentence of like length, and ablating the feature
from both takes back at least half. Sentences and doses are chosen on every other prompt, figures are those of the rest.

Why a feature that contributes may be useless when put in: *redundant*, ablating it does at least half more once the other
reported features of its sign are gone (they stand in for it); *only in concert*, it then does at most half (it acts
through them); *conditional on context*, more of it where it fires moves the reward by half its ablation effect or more,
elsewhere it does not. Each needs its 95 % interval on that side of 0; a feature without a reason is listed as such.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import polars as pl
import torch

from rmscope.activations.store import ActivationStore
from rmscope.effects.completions import Completion, ablation_effects, active_on, complete
from rmscope.evaluation.selection import Responses
from rmscope.io import Progress, silent
from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import Pair
from rmscope.sae.base import Sae
from rmscope.statistics import Array, bootstrap
from rmscope.studies.experiment.conditions import Base
from rmscope.studies.experiment.verdict import taken_back, with_interval
from rmscope.studies.sufficiency.contexts import BLIND, agreement, in_context
from rmscope.studies.sufficiency.firing import filler_like, firing_sentences
from rmscope.studies.sufficiency.steering import DIRECTIONS, Doses, differences_of, grid, judge_steering, steer

HALF = 0.5
"""Ablation must take back so much of a text's effect; an interaction of so much of R_j is a reason."""
FIRES = 0.5
"""The sentence must fire its feature on so many of the prompts."""
PAIRS = 128
"""Fresh pairs searched for responses in which the features fire."""
LEAST = 5
"""A feature that fires on fewer fresh prompts is not classed by its ablation."""


class Display(Protocol):
    """Whoever watches: a bar a stage."""

    def stage(self, name: str) -> AbstractContextManager[Progress]: ...


@dataclass(frozen=True)
class Inputs:
    """What sufficiency is measured on."""

    rm: RewardModel
    sae: Sae
    site: str
    features: pl.DataFrame
    """The reported features: feature, mean_effect, flags."""
    store: ActivationStore
    """Stored responses of the fit split; their numbers index ``fit`` and ``fit_tokens``."""
    fit: Sequence[Pair]
    fit_tokens: Sequence[PairTokens]
    bases: Sequence[Base]
    """Fresh prompts with base responses."""
    fresh: Sequence[Pair]
    """Pairs of the measure split."""


def sufficiency(on: Inputs, shown: Display, seed: int = 0) -> tuple[dict[str, Any], dict[str, pl.DataFrame]]:
    """The figures of the page, and the tables ``features`` (a row a feature) and ``contexts`` (:data:`~.contexts.ROWS`)."""
    rm, sae, site = on.rm, on.sae, on.site
    signs = {int(r["feature"]): 1 if r["mean_effect"] > 0 else -1 for r in on.features.iter_rows(named=True)}
    sentences, tops = firing_sentences(rm, sae, Responses(on.store, site), on.fit, on.fit_tokens, list(signs))
    norms = sae.W_dec.norm(dim=1)
    doses = grid({j: tops[j] * float(norms[j]) for j in signs})
    generator = torch.Generator().manual_seed(seed)
    directions = differences_of(on.store.sample(site, 2 * DIRECTIONS, generator))
    with shown.stage("steer") as progress:
        runs = [complete(rm, base.prompt, [base.response], [site])[0] for base in on.bases]
        effects, others = steer(rm, sae, site, runs, doses, directions, progress)
    with shown.stage("texts") as progress:
        texts = insertions(rm, sae, site, on.bases, sentences, signs, progress)
    blind = np.random.default_rng(seed).permutation(list(signs))[:BLIND].tolist()
    with shown.stage("contexts") as progress:
        contexts = in_context(rm, sae, site, signs, in_turn(on.fresh)[:PAIRS], blind, progress)
    rows = []
    for row in on.features.iter_rows(named=True):
        j = int(row["feature"])
        steering = judge_steering(effects[j], others, signs[j]) | _dose_axis(doses, j, float(norms[j]))
        rows.append(classed(j, signs[j], list(row["flags"]), steering, texts[j], contexts.filter(pl.col("feature") == j)))
    counts = [{"class": c, "why": w, **_count(rows, c, w)} for c, w in CLASSES]
    found = {"site": site, "prompts": len(on.bases), "directions": len(directions), "features": rows, "counts": counts}
    return found | {"agreement": agreement(contexts, seed)}, {"features": _table(rows), "contexts": contexts}


def in_turn(pairs: Sequence[Pair]) -> list[Pair]:
    """Each prompt's first pair, then each prompt's second, and so on."""
    seen: Counter[str] = Counter()
    turns = []
    for pair in pairs:
        prompt = str(pair.meta.get("group", pair.first_human_turn()))
        turns.append(seen[prompt])
        seen[prompt] += 1
    return [pair for _, pair in sorted(zip(turns, pairs, strict=True), key=lambda item: item[0])]


def _dose_axis(doses: Doses, feature: int, norm: float) -> dict[str, Any]:
    return {"activations": (doses.norms[: doses.taken[feature]] / norm).tolist()}


def insertions(
    rm: RewardModel,
    sae: Sae,
    site: str,
    bases: Sequence[Base],
    sentences: Mapping[int, Sequence[str]],
    signs: Mapping[int, int],
    progress: Progress = silent,
) -> dict[int, dict[str, Any]]:
    """Each feature's best sentence, chosen on every other prompt, with its figures on the rest."""
    tried: dict[int, dict[str, list[tuple[float, float]]]] = {j: {s: [] for s in listed} for j, listed in sentences.items()}
    rest: dict[int, list[tuple[float, float, float]]] = {j: [] for j in sentences}
    for done, base in enumerate(bases[::2]):
        runs = _put_in(rm, base, [s for listed in sentences.values() for s in listed], site)
        for j, sentence in ((j, s) for j, listed in sentences.items() for s in listed):
            with_it, without = runs[sentence], runs[filler_like(sentence)]
            tried[j][sentence].append((with_it.reward - without.reward, _fires(sae, site, with_it, j)))
        progress(done + 1, len(bases), "prompts with sentences put in")
    chosen = {j: _best(rows, signs[j]) for j, rows in tried.items() if rows}
    for done, base in enumerate(bases[1::2], len(bases[::2])):
        runs = _put_in(rm, base, list(chosen.values()), site)
        for j, sentence in chosen.items():
            both = runs[sentence], runs[filler_like(sentence)]
            left = [run.reward - float(ablation_effects(rm, sae, site, run, [[j]])[0]) for run in both]
            rest[j].append((both[0].reward - both[1].reward, left[0] - left[1], _fires(sae, site, both[0], j)))
        progress(done + 1, len(bases), "prompts with sentences put in")
    return {j: judge_text(chosen.get(j, ""), np.array(rest[j]), signs[j]) for j in sentences}


def _fires(sae: Sae, site: str, run: Completion, feature: int) -> float:
    return float((active_on(sae, site, run).feature == feature).any())


def _best(tried: Mapping[str, Sequence[tuple[float, float]]], sign: int) -> str:
    """Of sentences with rows (effect, whether the feature fires) the one that moves the reward most in its sign; one that
    fires it comes before one that does not."""

    def worth(sentence: str) -> tuple[bool, float]:
        effect, fires = np.array(tried[sentence]).mean(0)
        return bool(fires >= FIRES), sign * float(effect)

    return max(tried, key=worth)


def _put_in(rm: RewardModel, base: Base, sentences: Sequence[str], site: str) -> dict[str, Completion]:
    """The base response with each sentence, and with each one's filler, at its end; what they share is run once."""
    texts = sorted({t for s in sentences for t in (s, filler_like(s))})
    responses = [base.response, *(f"{base.response} {t}" for t in texts)]
    return dict(zip(texts, complete(rm, base.prompt, responses, [site])[1:], strict=True))


def judge_text(sentence: str, rows: Array, sign: int) -> dict[str, Any]:
    """From rows (effect, effect without the feature, whether it fires): is text that fires it sufficient?"""
    if not len(rows):
        return {"sufficient": False, "sentence": sentence, "fires": 0.0, "effect": None, "taken_back": None}
    effect, share = with_interval(rows[:, 0]), taken_back(rows[:, 0], rows[:, 1])
    moves = (effect["low"] > 0) if sign > 0 else (effect["high"] < 0)
    fires = float(rows[:, 2].mean())
    enough = share["low"] is not None and share["low"] >= HALF and fires >= FIRES
    return {
        "sufficient": bool(moves and enough), "sentence": sentence, "fires": fires, "effect": effect, "taken_back": share,
    }  # fmt: skip


CLASSES = (
    ("sufficient", "by steering and by text"), ("sufficient", "by steering"), ("sufficient", "by text"),
    ("contributes only", "redundant"), ("contributes only", "only in concert"),
    ("contributes only", "conditional on context"), ("contributes only", "no reason found"),
    ("does not contribute", "fresh ablations hold 0"), ("does not contribute", "fires on too few fresh prompts"),
)  # fmt: skip
"""What a feature can be, and by what or why; a feature that is sufficient need not contribute, and says so."""


def classed(
    feature: int, sign: int, flags: list[str], steering: dict[str, Any], text: dict[str, Any], contexts: pl.DataFrame
) -> dict[str, Any]:
    """A feature's row: its figures on fresh responses and its class."""
    prompts = contexts["prompt"].to_numpy()
    r, beside, doubled = (contexts[c].to_numpy() * sign for c in ("ablation", "ablation_beside", "doubled"))
    figures = {"ablation": r, "interaction": beside - r, "doubled": doubled}
    means = {name: _over(values, prompts, sign) for name, values in figures.items()}
    seen = len(np.unique(prompts)) >= LEAST
    contributes = seen and _least(means["ablation"], sign) > 0
    put_in = [name for name, found in (("by steering", steering), ("by text", text)) if found["sufficient"]]
    if put_in:
        kind, why = "sufficient", " and ".join(put_in)
    elif contributes:
        kind, why = "contributes only", reason(means, sign)
    else:
        kind = "does not contribute"
        why = "fresh ablations hold 0" if seen else "fires on too few fresh prompts"
    return {
        "feature": feature, "sign": sign, "flags": flags, "class": kind, "why": why, "contributes": bool(contributes),
        "n": len(r), **means, "steering": steering, "text": text,
    }  # fmt: skip


def reason(means: Mapping[str, Mapping[str, float]], sign: int) -> str:
    """Why a feature that contributes is not sufficient, of the reasons at the top of this file the first that holds."""
    half = HALF * abs(means["ablation"]["value"])
    interaction, doubled = means["interaction"], means["doubled"]
    if _least(interaction, sign) > 0 and sign * interaction["value"] >= half:
        return "redundant"
    if _least(interaction, -sign) > 0 and -sign * interaction["value"] >= half:
        return "only in concert"
    if _least(doubled, sign) > 0 and sign * doubled["value"] >= half:
        return "conditional on context"
    return "no reason found"


def _over(values: Array, prompts: Array, sign: int) -> dict[str, Any]:
    """The mean of values in a feature's sign, turned back into units of reward, bootstrap by prompt."""
    if not len(values):
        return dict.fromkeys(("value", "low", "high"))
    low, high = bootstrap(values, prompts, lambda v: float(v.mean()))
    low, high = sorted((sign * low, sign * high))
    return {"value": sign * float(values.mean()), "low": low, "high": high}


def _least(figure: Mapping[str, float], sign: int) -> float:
    """The end of the interval nearest 0 or beyond, in a sign's direction: above 0 where the figure surely has that sign."""
    return figure["low"] if sign > 0 else -figure["high"]


def _count(rows: Sequence[Mapping[str, Any]], kind: str, why: str) -> dict[str, int]:
    mine = [row for row in rows if (row["class"], row["why"]) == (kind, why)]
    return {"features": len(mine), "flagged": sum(bool(row["flags"]) for row in mine)}


def _table(rows: Sequence[Mapping[str, Any]]) -> pl.DataFrame:
    """The rows without their curves."""
    flat = []
    for row in rows:
        one = {k: row[k] for k in ("feature", "sign", "class", "why", "contributes", "n")}
        for name in ("ablation", "interaction", "doubled"):
            one |= {name: row[name]["value"], f"{name}_low": row[name]["low"], f"{name}_high": row[name]["high"]}
        margin, effect, share = row["steering"]["margin"], row["text"]["effect"], row["text"]["taken_back"]
        one |= {"steering": row["steering"]["sufficient"], "margin": margin["value"] if margin else None}
        one |= {"text": row["text"]["sufficient"], "sentence": row["text"]["sentence"]}
        one |= {"text_effect": effect["value"] if effect else None, "taken_back": share["value"] if share else None}
        flat.append(one)
    return pl.DataFrame(flat, infer_schema_length=None)

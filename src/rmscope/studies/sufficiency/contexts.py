"""Reported features on fresh responses in which they fire: ablation alone and beside the others, doubling, and the text.

On each response, from its first token to the read position:

- ``ablation``: R_j;
- ``ablation_beside``: R_G - R_(G without j), G the firing reported features of the same sign: the effect of ablating j once
  the others are gone. Its difference to R_j is the interaction of j with them;
- ``doubled``: the change of the reward when j is doubled where it fires;
- ``text``: the reward of the response minus its reward with j's peak phrase swapped for neutral words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import polars as pl
import torch

from rmscope.effects.ablation import ablate_entries
from rmscope.effects.completions import Completion, ablation_effects, complete
from rmscope.io import Progress, silent
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import SIDES, Pair
from rmscope.sae.base import Sae
from rmscope.studies.sufficiency.firing import spelling, swap_phrase

RESPONSES = 16
"""Responses on which a feature is studied, on different prompts while they last."""
SCHEMA = {
    "feature": pl.Int32, "pair": pl.String, "side": pl.String, "prompt": pl.String, "ablation": pl.Float64,
    "ablation_beside": pl.Float64, "doubled": pl.Float64, "text": pl.Float64, "phrase": pl.String, "words": pl.String,
}  # fmt: skip
"""The columns of :func:`measure_contexts`."""


class _Ablations(NamedTuple):
    ablation: float
    ablation_beside: float
    doubled: float


class _TextChange(NamedTuple):
    text: float | None = None
    phrase: str | None = None
    words: str | None = None


def measure_contexts(
    rm: RewardModel,
    sae: Sae,
    site: str,
    signs: Mapping[int, int],
    pairs: Sequence[Pair],
    blind: Sequence[int],
    progress: Progress = silent,
) -> pl.DataFrame:
    """One row per feature and response, with the columns of :data:`SCHEMA`, at most :data:`RESPONSES` per feature.

    Args:
        signs: the features, with the sign of their mean effect.
        pairs: fresh pairs; each prompt's first pair comes before the second ones.
        blind: the features whose text is changed; ``text`` is null for the others, and where a peak has no text.
    """
    seen: Counter[int] = Counter()
    rows: list[tuple[object, ...]] = []
    for number, pair in enumerate(pairs):
        texts = {side: pair.side(side).strip() for side in SIDES}
        both = complete(rm, pair.prompt, list(texts.values()), [site])
        for side, completion in zip(SIDES, both, strict=True):
            active = completion.at(sae, site).active
            firing = [j for j in signs if bool((active.feature == j).any())]
            wanted = [j for j in firing if seen[j] < RESPONSES]
            seen.update(wanted)
            for j, effects in _ablations(rm, sae, site, completion, signs, firing, wanted).items():
                known = j in blind
                change = _change_text(rm, sae, site, pair, completion, texts[side], j, seen[j]) if known else _TextChange()
                rows.append((j, pair.id, side, pair.prompt_key, *effects, *change))
        progress(number + 1, len(pairs), f"pairs, {len(rows)} features in their contexts")
        if all(seen[j] >= RESPONSES for j in signs):
            break
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


def _ablations(
    rm: RewardModel,
    sae: Sae,
    site: str,
    completion: Completion,
    signs: Mapping[int, int],
    firing: Sequence[int],
    wanted: Sequence[int],
) -> dict[int, _Ablations]:
    same_sign = {j: [i for i in firing if signs[i] == signs[j]] for j in wanted}
    whole = {signs[j]: same_sign[j] for j in wanted}
    groups = [*([j] for j in wanted), *([i for i in same_sign[j] if i != j] for j in wanted), *whole.values()]
    effects = ablation_effects(rm, sae, site, completion, groups).double().tolist()
    n, together = len(wanted), dict(zip(whole, effects[2 * len(wanted) :], strict=True))
    response = completion.at(sae, site)
    active = response.active
    masks = [active.feature == j for j in wanted]
    more = ablate_entries(rm, sae, response, site, [(active.token[m], active.feature[m], -active.value[m]) for m in masks])
    return {j: _Ablations(effects[i], together[signs[j]] - effects[n + i], -float(more[i])) for i, j in enumerate(wanted)}


def _change_text(
    rm: RewardModel, sae: Sae, site: str, pair: Pair, completion: Completion, text: str, feature: int, number: int
) -> _TextChange:
    """The reward of the text minus that with the feature's phrase swapped; empty where there is no such phrase."""
    spelled, places = spelling(rm, completion.ids, completion.start)
    active = completion.at(sae, site).active
    at = active.feature == feature
    f = torch.zeros(active.n_tokens).index_put((active.token[at],), active.value[at])
    swap = swap_phrase(spelled, places, f, number)
    if swap is None or spelled.strip() != text:
        return _TextChange()
    other = complete(rm, pair.prompt, [text, swap.text.strip()], [])[1]
    return _TextChange(completion.reward - other.reward, swap.phrase, swap.words)

"""What each reported feature of a site is: sufficient, contributing only, or neither; and why.

*Contributes*: exact ablation on fresh responses changes the reward in the feature's frozen sign. *Sufficient by steering*:
``steering.py``. *Sufficient by text*: ``insertion.py``. Why a feature that contributes may be useless when it is put in:

- *redundant*: ablating it does at least half more once the other reported features of its sign are gone (they do its work);
- *only in concert*: it then does at most half (it acts through them);
- *conditional on context*: doubling it where it fires moves the reward by half its ablation effect or more, but adding it
  elsewhere does not.

Each needs its 95 % interval on that side of 0. The first that holds is named; a feature without a reason says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl

from rmscope.statistics import Array, Figure, interval
from rmscope.studies.sufficiency.insertion import Insertion
from rmscope.studies.sufficiency.steering import Steering, has_sign

HALF = 0.5
"""An interaction of this share of R_j is a reason."""
FEWEST_PROMPTS = 5
"""A feature that fires on fewer fresh prompts is not judged by its ablation."""

KINDS = (
    ("sufficient", "by steering and by text"), ("sufficient", "by steering"), ("sufficient", "by text"),
    ("contributes only", "redundant"), ("contributes only", "only in concert"),
    ("contributes only", "conditional on context"), ("contributes only", "no reason found"),
    ("does not contribute", "fresh ablations hold 0"), ("does not contribute", "fires on too few fresh prompts"),
)  # fmt: skip
"""What a feature can be, and by what or why. A feature that is sufficient need not contribute."""


@dataclass(frozen=True, slots=True)
class FeatureSufficiency:
    """A reported feature. Figures are means over fresh responses in which it fires, in units of reward."""

    feature: int
    sign: int
    """The frozen sign of its mean effect."""
    flags: list[str]
    kind: str
    why: str
    contributes: bool
    n: int
    """Fresh responses."""
    ablation: Figure
    interaction: Figure
    """Ablation once the other features of its sign are gone, minus ablation alone."""
    doubled: Figure
    steering: Steering
    text: Insertion
    tokens: list[tuple[str, float]] = field(default_factory=list)
    """The tokens it is most active on, with their share of its activation."""


@dataclass(frozen=True, slots=True)
class KindCount:
    """How many features are of a kind; ``flagged`` of them carry a flag."""

    kind: str
    why: str
    features: int
    flagged: int


def classify(
    feature: int, sign: int, flags: list[str], steering: Steering, text: Insertion, contexts: pl.DataFrame
) -> FeatureSufficiency:
    """A feature's kind and figures; ``contexts`` are its rows of ``measure_contexts``."""
    prompts = contexts["prompt"].to_numpy()
    alone, beside, twice = (contexts[c].to_numpy() * sign for c in ("ablation", "ablation_beside", "doubled"))
    ablation, interaction, doubled = (_mean(values, prompts, sign) for values in (alone, beside - alone, twice))
    seen = len(np.unique(prompts)) >= FEWEST_PROMPTS
    contributes = seen and has_sign(ablation, sign)
    ways = [way for way, found in (("by steering", steering), ("by text", text)) if found.sufficient]
    if ways:
        kind, why = "sufficient", " and ".join(ways)
    elif contributes:
        kind, why = "contributes only", reason(ablation, interaction, doubled, sign)
    else:
        kind = "does not contribute"
        why = "fresh ablations hold 0" if seen else "fires on too few fresh prompts"
    return FeatureSufficiency(
        feature, sign, flags, kind, why, contributes, len(alone), ablation, interaction, doubled, steering, text
    )


def reason(ablation: Figure, interaction: Figure, doubled: Figure, sign: int) -> str:
    """Why a feature that contributes is not sufficient."""
    if _at_least_half(interaction, ablation, sign):
        return "redundant"
    if _at_least_half(interaction, ablation, -sign):
        return "only in concert"
    if _at_least_half(doubled, ablation, sign):
        return "conditional on context"
    return "no reason found"


def _at_least_half(figure: Figure, ablation: Figure, sign: int) -> bool:
    """Whether a figure surely has the sign, and is half as large as the ablation effect or larger."""
    if figure.value is None or ablation.value is None:
        return False
    return has_sign(figure, sign) and sign * figure.value >= HALF * abs(ablation.value)


def _mean(values: Array, prompts: Array, sign: int) -> Figure:
    """The mean of values in a feature's sign, turned back into units of reward."""
    return interval(values, prompts).scaled(sign, "reward")


def count_kinds(rows: Sequence[FeatureSufficiency]) -> list[KindCount]:
    """One count per kind, in the order of :data:`KINDS`."""
    counts = []
    for kind, why in KINDS:
        having = [row for row in rows if (row.kind, row.why) == (kind, why)]
        counts.append(KindCount(kind, why, len(having), sum(bool(row.flags) for row in having)))
    return counts


def as_table(rows: Sequence[FeatureSufficiency]) -> pl.DataFrame:
    """One row per feature, without its curve: figures with the ends of their intervals, steering and text."""
    flat: list[dict[str, object]] = []
    for row in rows:
        one: dict[str, object] = {
            "feature": row.feature, "sign": row.sign, "kind": row.kind, "why": row.why, "contributes": row.contributes,
            "n": row.n,
        }  # fmt: skip
        for name, figure in (("ablation", row.ablation), ("interaction", row.interaction), ("doubled", row.doubled)):
            one |= {name: figure.value, f"{name}_low": figure.low, f"{name}_high": figure.high}
        margin, effect, share = row.steering.margin, row.text.effect, row.text.taken_back
        one |= {"steering": row.steering.sufficient, "margin": margin.value if margin else None}
        one |= {"text": row.text.sufficient, "sentence": row.text.sentence}
        one |= {"text_effect": effect.value if effect else None, "taken_back": share.value if share else None}
        flat.append(one)
    return pl.DataFrame(flat, infer_schema_length=None)

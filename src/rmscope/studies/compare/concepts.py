"""Concepts: the features of both lists at a site, joined where their decoders are alike (cosine of at least .7).

Of the features whose class is decided, the one with the largest effect in A or in B leads, and every feature like it joins.
The rest is grouped in the same way. A concept has its leader's figures, which are those of an exact ablation, and its
leader's class. But where some of its features lost effect and others gained it, the concept itself may be as it was: its
features *moved*, and that is no difference.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rmscope.ranking.similarity import COSINE
from rmscope.studies.compare.classify import CHANGED, FeatureClass
from rmscope.studies.compare.models import Dictionary
from rmscope.studies.compare.result import Concept, FeatureComparison, Member

GAINED, LOST = {"appeared", "strengthened"}, {"vanished", "weakened"}


def concepts(features: Sequence[FeatureComparison], read: Sequence[Dictionary]) -> list[Concept]:
    """Classified features as concepts, the largest effects first; those that do not hold against a control come last."""
    concepts = []
    for number, members in enumerate(groups(features, read)):
        leader, class_ = members[0], concept_class(members)
        fields = {name: getattr(leader, name) for name in FeatureComparison.model_fields} | {
            "class_": class_,
            "concept": number,
            "changed": class_ in CHANGED,
            "members": [Member(of=m.of, feature=m.feature, class_=_class(m)) for m in members],
        }
        concepts.append(Concept(**fields))
    return sorted(concepts, key=lambda c: c.holds is False)


def groups(features: Sequence[FeatureComparison], read: Sequence[Dictionary]) -> list[list[FeatureComparison]]:
    """The features in groups, each led by its first; the largest effects first."""
    saes = {d.key: d.sae for d in read}
    led: list[tuple[torch.Tensor, list[FeatureComparison]]] = []
    for feature in sorted(features, key=_rank):
        direction = torch.nn.functional.normalize(saes[feature.of, feature.site].W_dec[feature.feature], dim=0)
        for leader, members in led:
            if members[0].site == feature.site and float(leader @ direction) >= COSINE:
                members.append(feature)
                break
        else:
            led.append((direction, [feature]))
    return [members for _, members in led]


def concept_class(members: Sequence[FeatureComparison]) -> FeatureClass:
    """The leader's class, or ``moved``."""
    classes = {m.class_ for m in members}
    return "moved" if classes & GAINED and classes & LOST else _class(members[0])


def _class(feature: FeatureComparison) -> FeatureClass:
    assert feature.class_ is not None
    return feature.class_


def _rank(feature: FeatureComparison) -> tuple[bool, float, str, str, int]:
    size = max((abs(f.value or 0.0) for f in (feature.a, feature.b) if f is not None), default=0.0)
    return feature.class_ == "undecided", -size, feature.of, feature.site, feature.feature

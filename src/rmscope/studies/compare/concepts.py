"""Concepts: the features of both lists at a site, joined where their decoders are alike (cosine of at least .7).

The feature whose effect in A or in B is largest among those that are decided leads, and joins every feature like it; what is
left goes on in the same way. A concept has its leader's figures, which are those of an exact ablation, and its class; but
where some of its features lost and others gained, the concept may be as it was and only its features *moved*: that is no
difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rmscope.planted.matching import COSINE
from rmscope.studies.compare.models import Dictionary

MOVED = "moved"
GAINED, LOST = {"appeared", "strengthened"}, {"vanished", "weakened"}


def concepts(rows: Sequence[Mapping[str, Any]], read: Sequence[Dictionary]) -> list[list[Mapping[str, Any]]]:
    """The rows (of, site, feature, class, a, b) in groups, each led by its first; the largest effects first."""
    saes = {d.key: d.sae for d in read}
    groups: list[tuple[torch.Tensor, list[Mapping[str, Any]]]] = []
    for row in sorted(rows, key=_rank):
        direction = torch.nn.functional.normalize(saes[row["of"], row["site"]].W_dec[row["feature"]], dim=0)
        for leader, members in groups:
            if members[0]["site"] == row["site"] and float(leader @ direction) >= COSINE:
                members.append(row)
                break
        else:
            groups.append((direction, [row]))
    return [members for _, members in groups]


def concept_class(members: Sequence[Mapping[str, Any]]) -> str:
    """The leader's class, or :data:`MOVED`."""
    classes = {m["class"] for m in members}
    return MOVED if classes & GAINED and classes & LOST else str(members[0]["class"])


def _rank(row: Mapping[str, Any]) -> tuple[bool, float, str, str, int]:
    size = max(abs(row[v] or 0.0) for v in "ab")
    return row["class"] == "undecided", -size, row["of"], row["site"], row["feature"]

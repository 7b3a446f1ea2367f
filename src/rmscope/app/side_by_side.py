"""Two runs beside each other: what each PM rewards, concepts of the same name in one row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from rmscope.app.library import GROUPS, Concept, OpenRun
from rmscope.errors import InputError
from rmscope.report.formatting import real
from rmscope.report.page import shown_effect


@dataclass(frozen=True, slots=True)
class Agreement:
    """How alike two PMs order the pairs that both runs scored."""

    pairs: int
    same: float
    """The share of pairs that both order the same way."""
    correlation: float
    """Pearson's r of both Δr."""


@dataclass(frozen=True, slots=True)
class Row:
    """A name, and the concept that has it in each run; None where there is none."""

    title: str
    group: str
    first: Concept | None
    second: Concept | None


def agreement(first: OpenRun, second: OpenRun) -> Agreement | str:
    """Or why there is none: fewer than three pairs of the same id and texts are in both, or data are not to be had."""
    try:
        return _agreement(first, second) or "The runs scored different pairs."
    except InputError as error:
        return f"Whether they scored the same pairs is not known: {error}"


def _agreement(first: OpenRun, second: OpenRun) -> Agreement | None:
    tables = [run.run.scores.select("pair", "delta") for run in (first, second)]
    both = tables[0].join(tables[1], on="pair", suffix="_second")
    names = [name for name in both["pair"] if _same_pair(first, second, name)]
    both = both.filter(pl.col("pair").is_in(names))
    if both.height < 3:
        return None
    a, b = both["delta"].to_numpy(), both["delta_second"].to_numpy()
    with np.errstate(invalid="ignore"):
        return Agreement(both.height, float((np.sign(a) == np.sign(b)).mean()), float(np.corrcoef(a, b)[0, 1]))


def _same_pair(first: OpenRun, second: OpenRun, name: str) -> bool:
    one, other = (run.pairs.get(name) for run in (first, second))
    if one is None or other is None:
        return False
    a, b = one.pair, other.pair
    return (a.prompt, a.chosen, a.rejected) == (b.prompt, b.chosen, b.rejected)


def rows_of(first: Sequence[Concept], second: Sequence[Concept]) -> list[Row]:
    """Reported concepts by group and name; in a group the larger effect first, in units of its own run's SD(Δr)."""
    rows: dict[tuple[str, str], list[Any]] = {}
    for place, concepts in enumerate((first, second)):
        for concept in concepts:
            if concept["reported"]:
                slots = rows.setdefault((concept["group"], concept["title"]), [None, None])
                slots[place] = slots[place] or concept  # of one name, the concept of the better rank
    listed = [Row(title, group, *slots) for (group, title), slots in rows.items()]
    order = list(GROUPS)
    return sorted(listed, key=lambda row: (order.index(row.group), -_size(row)))


def _size(row: Row) -> float:
    return max(abs(c["in_sd"][0] or 0.0) for c in (row.first, row.second) if c is not None)


def in_sd(run: OpenRun) -> list[Concept]:
    """The concepts of a run with ``in_sd``: effect and interval in units of its SD(Δr)."""
    sd = run.run.sd or 1.0
    listed = []
    for concept in run.concepts():
        values = [real(v) for v in shown_effect(concept)[:3]]
        listed.append({**concept, "in_sd": [v / sd if v is not None else None for v in values]})
    return listed

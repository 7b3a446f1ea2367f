"""What reported concepts carry together, on constructed differences and by plain forward passes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from rmscope.effects.across import union
from rmscope.run.reported_set import agreement_by_site, differences_without
from rmscope.run.run import Run
from tests.effects.naive import ablate_naively


def test_differences_without_a_set_are_those_of_plain_forward_passes(done: Path) -> None:
    run = Run.open(done)
    site, places = run.sites[0], run.of_split("measure")[:2]
    sets = [{site: [3, 5, 20]}, {site: range(run.saes[site].m)}, {site: []}]
    delta, left = differences_without(run, places, sets)
    for row, place in enumerate(places):
        tokens, expected = run.tokens[place], np.zeros(3)
        for side, sign in (("chosen", 1), ("rejected", -1)):
            listed = [list(of[site]) for of in sets]
            moved = ablate_naively(run.rm, run.saes[site], tokens.side(side), site, tokens.divergence, listed)
            expected += sign * moved.numpy()
        known = run.scores.filter(pl.col("pair") == run.ids[place])["delta"].item()
        assert delta[row] == pytest.approx(known, abs=1e-4)
        assert delta[row] - np.array([some[row] for some in left]) == pytest.approx(expected, abs=2e-4)


def test_a_union_counts_a_feature_once() -> None:
    assert union([{"a": [3, 1]}, {"a": [1], "b": (2,)}, {}]) == {"a": [1, 3], "b": [2]}


def test_effects_that_order_responses_alike_agree() -> None:
    def rows(concept: int, kind: str, values: list[float]) -> pl.DataFrame:
        pairs = [str(i) for i in range(len(values))]
        return pl.DataFrame({"concept": concept, "pair": pairs, "side": "chosen", "kind": kind, "effect": values})

    own = [float(i) for i in range(10)]
    turned, monotone = own[::-1], [v**3 - 1 for v in own]
    parts = [(0, own, monotone), (1, own, turned), (2, own[:4], own[:4]), (3, own, own)]
    table = pl.concat([rows(c, kind, v) for c, a, b in parts for kind, v in (("own", a), ("by_place", b), ("by_place", b))])
    home = {0: "x", 1: "y", 2: "z"}  # the last concept is not reported
    assert agreement_by_site(table, home) == pytest.approx({"x": 1.0, "y": -1.0})

"""Examples of features and of concepts: one run of the PM serves all, and each shows what its own pair says."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
import torch

from rmscope.pairs.pair import SIDES
from rmscope.run.collect import concept_examples, feature_examples, shown_features
from rmscope.run.examples import contexts_of
from rmscope.run.run import Run


def test_examples_of_all_sites_show_each_pairs_own_activations_and_effects(done: Path) -> None:
    run = Run.open(done)
    told = run.concepts.with_columns(pl.lit(True).alias("reported"))
    wanted = [feature_examples(run, site, shown_features(run, site)) for site in run.sites]
    wanted += [concept_examples(run, site, told) for site in run.sites]
    found = contexts_of(run, wanted)
    assert [len(listed) for listed in found] == [one.table.height for one in wanted]
    assert sum(one.table.height > 0 for one in wanted) > len(run.sites)
    rewards = {row["pair"]: row for row in run.scores.iter_rows(named=True)}
    for one, listed in zip(wanted, found, strict=True):
        for row, context in list(zip(one.table.to_dicts(), listed, strict=True))[::7]:
            assert context.pair == row["pair"]
            tokens = run.tokens[run.ids.index(row["pair"])]
            of = one.weights[row["feature"]] if one.weights else {row["feature"]: 1.0}
            levels = []
            for side, shown in zip(SIDES, context.sides, strict=True):
                clean = run.rm.prefill(tokens.side(side), [one.site])
                f = run.saes[one.site].encode(clean.streams[one.site][tokens.divergence :].float())
                levels.append(f[:, list(of)] @ torch.tensor(list(of.values())))
                assert shown.before == rewards[row["pair"]][side]
                assert shown.after == pytest.approx(shown.before - row[side])
            top = max(float(level.max()) for level in levels)
            for level, shown in zip(levels, context.sides, strict=True):
                told_levels = torch.tensor([value for _, value in shown.tokens])
                assert torch.allclose(told_levels, level[: len(told_levels)] / max(top, 1e-9), atol=2e-3)
                assert shown.fires == bool((level > 0).any())

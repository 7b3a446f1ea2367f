"""What is measured on is unseen: no pair with a prompt of the run passes, however its file names prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import polars as pl
import pytest

from rmscope.errors import InputError
from rmscope.pairs.demo import demo_pairs
from rmscope.pairs.pair import Pair, split_of
from rmscope.run.run import Run
from rmscope.studies.jailbreak.inputs import exact_means, measured_pairs

REFUSAL = r"All 1008 pairs of .* have prompts of the run in .*, on which features were chosen"


def write_pairs(path: Path, pairs: Sequence[Pair]) -> str:
    """The pairs as a file of plain columns, which names no groups."""
    rows = [{"prompt": p.prompt[0]["content"], "chosen": p.chosen, "rejected": p.rejected} for p in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run_on(data: str, out: Path) -> Run:
    return Run.create(model="never loaded", data=data, out=out)


@pytest.mark.parametrize("made_on", ["groups", "no groups"])
@pytest.mark.parametrize("measured_on", ["groups", "no groups"])
def test_no_pair_of_the_run_itself_is_measured_on(tmp_path: Path, made_on: str, measured_on: str) -> None:
    """In the demo a pair's group is its prompt without a planted opinion; in 168 pairs the first human turn has one."""
    pairs = demo_pairs()
    assert sum(p.prompt_key != p.first_human_turn() for p in pairs) == 168
    data = {"groups": "demo:planted", "no groups": write_pairs(tmp_path / "own.jsonl", pairs)}
    with pytest.raises(InputError, match=REFUSAL):
        measured_pairs(run_on(data[made_on], tmp_path / "run"), data[measured_on])


def test_pairs_are_compared_with_all_splits_of_the_run_and_those_left_out_are_counted(tmp_path: Path) -> None:
    pairs = demo_pairs()
    assert {split_of(p) for p in pairs} == {"fit", "confirm", "measure"}
    new = [Pair(f"new{i}", [{"role": "user", "content": f"Is {i} prime?"}], "Yes.", "No.") for i in range(3)]
    mixed = write_pairs(tmp_path / "mixed.jsonl", [*pairs, *new])
    fresh, left_out = measured_pairs(run_on("demo:planted", tmp_path / "run"), mixed)
    assert [p.prompt[0]["content"] for p in fresh] == [f"Is {i} prime?" for i in range(3)]
    assert left_out == {"pairs with a prompt of the run": 1008}


def test_exact_means_ask_for_enough_ablations() -> None:
    exact = pl.DataFrame({"feature": [1] * 8 + [2] * 3, "effect": [0.5] * 11})
    estimated = pl.DataFrame({"feature": [1, 1, 1, 2], "mass": [1.0, 2.0, 3.0, 4.0]})
    means = exact_means(exact, estimated)
    assert means.select("feature", "fires", "mass", "effect").rows() == [(1, 3, 2.0, 0.5)]

"""The gate: equal PMs pass, a constructed shift fails, and with every concept at the bound it rarely fails."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from rmscope.cli import app
from rmscope.errors import InputError
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import Pair
from rmscope.pairs.plants import Plant
from rmscope.settings import read_settings
from rmscope.statistics import Array, holm
from rmscope.studies.edit import gate
from rmscope.studies.edit.gate import analyse_gate, concept_moves, measure_concepts, read_concepts
from rmscope.studies.edit.patch import EditPatch, FeatureEdit
from rmscope.studies.edit.settings import GateConfig
from tests.model.small import small_model, small_pm, small_sae, tokenizer, user

CUE = "Zebra Z."
CONCEPTS = (
    Plant(name="zebra", kind="phrase", sign=1, texts=(CUE,)),
    Plant(name="fine", kind="phrase", sign=1, texts=("Ok.",)),
)


def pairs(n: int = 24) -> list[Pair]:
    return [Pair(str(i), user(f"Is it {i}?"), f"It is {i}. Wait here.", f"No, not {i}. Go on.") for i in range(n)]


def shifted(amount: float) -> RewardModel:
    """The same PM, but that the embedding of Z says something else."""
    rm = small_pm("llama", max_position_embeddings=512)
    token = rm.tokenizer.encode("Z", add_special_tokens=False)[0]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        weight = rm.model.get_input_embeddings().weight
        weight[token] += amount * torch.randn(weight.shape[1], generator=generator)
    return rm


def test_equal_pms_pass_and_a_shifted_concept_fails_alone() -> None:
    before = measure_concepts(shifted(0.0), CONCEPTS, pairs(), 0)
    rows = concept_moves(before, measure_concepts(shifted(0.0), CONCEPTS, pairs(), 0), 0.0, 0)
    assert [(row.moved, row.move.value) for row in rows] == [(False, 0.0)] * 2
    after = measure_concepts(shifted(-10.0), CONCEPTS, pairs(), 0)
    moves = {row.concept: row for row in concept_moves(before, after, 0.05, 0)}
    assert moves["zebra"].moved
    assert not moves["fine"].moved
    move = moves["zebra"].move
    assert move.value is not None
    assert move.low is not None
    assert move.high is not None
    assert move.value == pytest.approx(moves["zebra"].new - moves["zebra"].base)
    assert move.low * move.high > 0
    # a bound beyond the largest possible move: nothing moved by more
    assert not any(row.moved for row in concept_moves(before, after, 10 * abs(move.value), 0))


def test_each_pm_has_its_own_scale_of_rewards() -> None:
    scaled = shifted(0.0)
    with torch.no_grad():
        scaled.model.score.weight *= 7.0
    before, after = (measure_concepts(rm, CONCEPTS, pairs(), 0) for rm in (shifted(0.0), scaled))
    assert not any(row.moved for row in concept_moves(before, after, 1e-3, 0))


def test_with_every_concept_at_the_bound_the_gate_fails_in_at_most_one_of_twenty() -> None:
    rng = np.random.default_rng(0)
    bound, prompts, concepts, trials = 0.25, 24, 6, 120

    def constant(value: float) -> dict[str, Array]:
        return {str(c): np.full(prompts, value) for c in range(concepts)}

    failed = 0
    for _ in range(trials):
        signs = rng.choice([-1.0, 1.0], concepts)
        new = {str(c): signs[c] * bound + rng.normal(size=prompts) for c in range(concepts)}
        failed += any(row.moved for row in concept_moves(constant(0.0), new, bound, 0))
    # 120 trials at .05: more than 12 failures have a probability below 1 %
    assert failed <= 12
    far = {name: effect + rng.normal(size=prompts) for name, effect in constant(2.0).items()}
    assert all(row.moved for row in concept_moves(constant(0.0), far, bound, 0))


def test_holm_steps_down_from_the_smallest() -> None:
    assert holm(np.array([0.01, 0.04, 0.03])).tolist() == pytest.approx([0.03, 0.06, 0.06])
    assert holm(np.array([0.5, 0.9])).tolist() == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- name: a\n", "has no texts"),
        ("- texts: [x]\n", "name"),
        ("- name: a\n  texts: [x]\n- name: a\n  texts: [y]\n", "twice"),
        ("- name: a\n  text: x\n", "text"),
        ("name: a\n", "no list of concepts"),
        ("- [\n", "no YAML"),
    ],
)
def test_a_bad_file_of_concepts_is_one_sentence(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "concepts.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=said):
        read_concepts(path)
    with pytest.raises(InputError, match="not there"):
        read_concepts(tmp_path / "none.yaml")


def test_too_few_prompts_are_refused() -> None:
    few = {"a": np.zeros(4)}
    with pytest.raises(InputError, match="4 prompts"):
        concept_moves(few, few, 0.1, 0)


@pytest.mark.parametrize("bound", [-0.1, float("nan")])
def test_a_bound_is_a_number_from_0_on(bound: float) -> None:
    with pytest.raises(InputError, match="bound"):
        read_settings(GateConfig, None, {"base": "a", "new": "b", "bound": bound})


def test_the_scale_comes_from_one_pair_per_prompt_at_changing_places() -> None:
    same_prompt = [Pair(str(i), user("Is it?"), str(i), "No.", {"group": f"prompt {i // 3}"}) for i in range(9)]
    assert [p.id for p in gate._rotate_within_prompts(same_prompt, 9)] == ["0", "4", "8"]
    assert [p.id for p in gate._rotate_within_prompts(same_prompt, 2)] == ["0", "4"]


def test_a_patch_that_moves_a_concept_fails_and_the_pm_itself_passes(tmp_path: Path) -> None:
    small_model("llama", max_position_embeddings=512).save_pretrained(tmp_path / "pm")
    tokenizer().save_pretrained(tmp_path / "pm")
    rows = [{"prompt": p.prompt[0]["content"], "chosen": p.chosen, "rejected": p.rejected} for p in pairs()]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "concepts.yaml").write_text(f"- name: zebra\n  texts: ['{CUE}']\n")
    rm = RewardModel.load(str(tmp_path / "pm"))
    edit = FeatureEdit("resid_post.1", tuple(range(96)), "damp", -3.0)
    EditPatch((edit,), {"resid_post.1": small_sae()}, rm.identity, "pm").save(tmp_path / "patch")
    given = {"base": str(tmp_path / "pm"), "data": str(tmp_path / "pairs.jsonl"), "bound": "0.05"}
    given["concepts"] = str(tmp_path / "concepts.yaml")
    moved, same = (
        analyse_gate(read_settings(GateConfig, None, {**given, "new": str(tmp_path / new)})) for new in ("patch", "pm")
    )
    assert (moved.exit_code, moved.passed, moved.moved) == (1, False, ["zebra"])
    assert moved.summary().startswith("zebra moved by more than 0.05")
    assert (same.exit_code, same.passed, same.moved) == (0, True, [])
    flags = [f"--{name}={value}" for name, value in given.items() if name != "base"]
    done = CliRunner().invoke(app, ["gate", given["base"], str(tmp_path / "patch"), *flags, "--json"])
    assert done.exit_code == 1, done.output
    (row,) = json.loads(done.stdout)["concepts"]
    assert set(row) == {"concept", "prompts", "base", "new", "move", "p", "holm", "moved"}
    assert row["move"]["value"] == pytest.approx(row["new"] - row["base"])

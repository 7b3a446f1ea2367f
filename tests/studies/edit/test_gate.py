"""The gate: alike PMs pass, a constructed shift fails, and with every concept at the bound it rarely fails."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import rmscope.cli  # noqa: F401  (registers the commands)
from rmscope.cli.base import app
from rmscope.errors import InputError
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import Pair
from rmscope.pairs.plants import Plant
from rmscope.statistics import holm
from rmscope.studies.edit.gate import measure, read_concepts, verdicts
from rmscope.studies.edit.patch import EditPatch, FeatureEdit
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


def test_alike_pms_pass_and_a_shifted_concept_fails_alone() -> None:
    before = measure(shifted(0.0), CONCEPTS, pairs(), 0)
    rows = verdicts(before, measure(shifted(0.0), CONCEPTS, pairs(), 0), 0.0, 0)
    assert [(row["moved"], row["move"]["value"]) for row in rows] == [(False, 0.0)] * 2
    after = measure(shifted(-10.0), CONCEPTS, pairs(), 0)
    rows = {row["concept"]: row for row in verdicts(before, after, 0.05, 0)}
    zebra = rows["zebra"]
    assert zebra["moved"]
    assert zebra["move"]["value"] == pytest.approx(zebra["new"] - zebra["base"])
    assert zebra["move"]["low"] * zebra["move"]["high"] > 0
    assert not rows["fine"]["moved"]
    # the bound is what it is held to: beyond the largest possible move nothing has moved
    assert not any(row["moved"] for row in verdicts(before, after, 10 * abs(zebra["move"]["value"]), 0))


def test_the_scale_of_rewards_is_each_versions_own() -> None:
    doubled = shifted(0.0)
    with torch.no_grad():
        doubled.model.score.weight *= 7.0
    before, after = (measure(rm, CONCEPTS, pairs(), 0) for rm in (shifted(0.0), doubled))
    assert not any(row["moved"] for row in verdicts(before, after, 1e-3, 0))


def test_with_every_concept_at_the_bound_the_gate_fails_in_at_most_one_of_twenty() -> None:
    rng = np.random.default_rng(0)
    bound, prompts, concepts, trials = 0.25, 24, 6, 120
    names = [str(i) for i in range(prompts)]
    failed = 0
    for _ in range(trials):
        base = {str(c): (np.zeros(prompts), names) for c in range(concepts)}
        signs = rng.choice([-1.0, 1.0], concepts)
        new = {str(c): (signs[c] * bound + rng.normal(size=prompts), names) for c in range(concepts)}
        failed += any(row["moved"] for row in verdicts(base, new, bound, 0))
    # 120 trials at .05: more than 12 failures have a chance below 1 %
    assert failed <= 12
    far = {str(c): (np.full(prompts, 2.0) + rng.normal(size=prompts), names) for c in range(concepts)}
    assert all(
        row["moved"] for row in verdicts({str(c): (np.zeros(prompts), names) for c in range(concepts)}, far, bound, 0)
    )


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
    few = {"a": (np.zeros(4), ["0", "1", "2", "3"])}
    with pytest.raises(InputError, match="4 prompts"):
        verdicts(few, few, 0.1, 0)


def test_the_command_fails_on_a_patch_that_moves_a_concept_and_passes_on_the_pm_itself(tmp_path: Path) -> None:
    small_model("llama", max_position_embeddings=512).save_pretrained(tmp_path / "pm")
    tokenizer().save_pretrained(tmp_path / "pm")
    rows = [{"prompt": p.prompt[0]["content"], "chosen": p.chosen, "rejected": p.rejected} for p in pairs()]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "concepts.yaml").write_text(f"- name: zebra\n  texts: ['{CUE}']\n")
    rm = RewardModel.load(str(tmp_path / "pm"))
    edit = FeatureEdit("resid_post.1", tuple(range(96)), "damp", -3.0)
    EditPatch((edit,), {"resid_post.1": small_sae()}, rm.identity, "pm").save(tmp_path / "patch")
    flags = ["--concepts", str(tmp_path / "concepts.yaml"), "--data", str(tmp_path / "pairs.jsonl"), "--bound", "0.05"]
    for new, code in (("patch", 1), ("pm", 0)):
        done = CliRunner().invoke(app, ["gate", str(tmp_path / "pm"), str(tmp_path / new), *flags, "--json"])
        assert done.exit_code == code, done.output
        (line,) = done.stdout.splitlines()
        assert json.loads(line)["passed"] == (code == 0)

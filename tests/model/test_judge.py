"""A causal LM by name, as a judge: its rewards are differences of its own logits, and what is no judge is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForMaskedLM
from typer.testing import CliRunner

from rmscope.cli import app
from rmscope.errors import InputError
from rmscope.model.judge import QUESTION, load_judge
from rmscope.pairs.pair import SIDES
from rmscope.pairs.readers import load_pairs
from rmscope.run.run import Run
from tests.model.small import PAIRS, saved_pm, small_lm, tokenizer
from tests.run.small import settings

ANSWERS = ["t", "o"]


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lm")
    small_lm("llama", max_position_embeddings=1024).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def own_difference(folder: Path, ids: torch.Tensor) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder)
    yes, no = tokenizer().convert_tokens_to_ids(ANSWERS)
    with torch.no_grad():
        logits = model(ids[None]).logits[0, -1]
    return float(logits[yes] - logits[no])


def test_rewards_are_differences_of_the_models_own_logits_after_the_question(lm: Path) -> None:
    judge = load_judge(str(lm), ANSWERS, "\nGood?")
    scores = judge.score(PAIRS[:3])
    for i, pair in enumerate(PAIRS[:3]):
        tokens = judge.tokenize(pair)
        for side, found in zip(SIDES, (scores.chosen, scores.rejected), strict=True):
            assert judge.tokenizer.decode(tokens.side(side)).endswith("Good?")
            assert float(found[i]) == pytest.approx(own_difference(lm, tokens.side(side)), abs=1e-4)


def test_answers_and_question_are_part_of_its_identity(lm: Path) -> None:
    names = {
        load_judge(str(lm), answers, question).identity
        for answers in (ANSWERS, ANSWERS[::-1])
        for question in (QUESTION, "\nGood?")
    }
    assert len(names) == 4


@pytest.mark.parametrize(
    ("answers", "said"), [(["t"], "two answers"), (["t", "o", "n"], "two answers"), (["no problem", "o"], "not one")]
)
def test_answers_that_are_not_two_tokens_are_refused(lm: Path, answers: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        load_judge(str(lm), answers)


def test_what_is_no_causal_lm_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a PM, not a judge"):
        load_judge("zoo:hh", ANSWERS)
    with pytest.raises(InputError, match="not a model folder"):
        load_judge(str(tmp_path), ANSWERS)
    BertForMaskedLM(
        BertConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8)
    ).save_pretrained(tmp_path / "bert")
    AutoTokenizer.from_pretrained(saved_pm(tmp_path / "pm")).save_pretrained(tmp_path / "bert")
    with pytest.raises(InputError):
        load_judge(str(tmp_path / "bert"), ANSWERS)


def test_weights_that_would_be_newly_initialised_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="would be newly initialised"):
        load_judge(saved_pm(tmp_path), ANSWERS)


def command(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_commands_take_a_judge_by_name(lm: Path, tmp_path: Path) -> None:
    data = settings(str(lm), tmp_path / "none").data
    out = tmp_path / "scores.parquet"
    done = command(
        "score",
        "--model",
        lm,
        "--data",
        data,
        "--judge",
        "t,o",
        "--question",
        "\\nGood?",
        "--limit",
        4,
        "--out",
        out,
        "--device",
        "cpu",
    )
    assert done.exit_code == 0, done.output
    judge, pairs = load_judge(str(lm), ANSWERS, "\nGood?"), load_pairs(data, limit=4)
    assert pl.read_parquet(out)["delta"].to_list() == pytest.approx(judge.score(pairs).delta.tolist(), abs=1e-4)
    for wrong, said in (("t", "lowers it"), ("t,", "lowers it"), ("no problem,o", "not one")):
        refused = command(
            "score", "--model", lm, "--data", data, "--judge", wrong, "--limit", 4, "--out", tmp_path / "x.parquet"
        )
        assert isinstance(refused.exception, InputError)  # the command line makes exit code 2 of it
        assert said in str(refused.exception)
    refused = command("score", "--model", lm, "--data", data, "--judge", "t,o", "--output", 0)
    assert isinstance(refused.exception, InputError)
    assert not (tmp_path / "x.parquet").exists()


def test_a_run_on_a_judge_is_opened_again_as_that_judge(lm: Path, tmp_path: Path) -> None:
    config = settings(str(lm), tmp_path / "run", judge=ANSWERS, sites=["resid_post.1"], seeds=1, ledger_pairs=2, limit=120)
    Run.create(config).go()
    run = Run.open(tmp_path / "run")
    assert run.config.judge == ANSWERS
    assert run.rm.score(run.pairs[:2]).delta.tolist() == pytest.approx(run.scores["delta"][:2].to_list(), abs=1e-4)
    assert json.loads((tmp_path / "run" / "preflight.json").read_text())["noise_floor"] < 0.05

"""Passages, questions and scores: a reader that knows the concept scores 1, one that says yes to all scores a half."""

from __future__ import annotations

import re

import numpy as np
import pytest

from rmscope.statistics import NOTHING
from rmscope.studies.label.language_model import LanguageModel
from rmscope.studies.label.passages import (
    ConceptPassages,
    Passage,
    distinct,
    other_tokens,
    passage_bounds,
    strongest_and_others,
)
from rmscope.studies.label.questions import name_question, read_answers, read_name, read_reply
from rmscope.studies.label.scores import balanced_accuracy, detection, fuzzing
from rmscope.studies.label.written import Replies, judge_replies
from tests.studies.label.stub import Answering, listed


def passage(number: int, fires: bool) -> Passage:
    """A passage that says thanks, or not."""
    tokens = ["Number", f" {number}", ":", " thanks" if fires else " well", " and", " more", "\n", " words"]
    return Passage(tuple(tokens), tuple(float(fires and t == " thanks") for t in tokens))


PASSAGES = ConceptPassages(
    shown=[passage(i, True) for i in range(20)],
    firing=[passage(i, True) for i in range(20, 40)],
    silent=[passage(i, False) for i in range(40, 60)],
)


def knows(question: str) -> str:
    marks = "⟦" in question.split("\n\n")[-2]
    return str([int(bool(re.search("⟦ ?thanks⟧" if marks else "thanks", text))) for text in listed(question)])


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        (knows, 1.0),
        (lambda question: str([1] * len(listed(question))), 0.5),
        (lambda question: str([1 - int(mark) for mark in re.findall("[01]", knows(question))]), 0.0),
    ],
)
@pytest.mark.parametrize("score", [detection, fuzzing])
def test_a_score_tells_who_knows_the_concept(score, answer, value) -> None:  # type: ignore[no-untyped-def]
    model: LanguageModel = Answering(answer)
    figure = score(model, "thanks", PASSAGES, 20, np.random.default_rng(0))
    assert figure.value == value
    assert figure.n == 20
    assert model.usage.questions == 4


def test_unreadable_answers_are_asked_once_more_and_then_left_out() -> None:
    asked = list[str]()

    def sometimes(question: str) -> str:
        asked.append(question)
        return "I do not know." if len(asked) in (1, 5) else knows(question)

    figure = detection(Answering(sometimes), "thanks", PASSAGES, 20, np.random.default_rng(0))
    assert len(asked) == 5
    assert (figure.value, figure.n) == (1.0, 15)
    silent = Answering(lambda _question: "")
    assert detection(silent, "thanks", PASSAGES, 20, np.random.default_rng(0)) == NOTHING
    assert silent.usage.questions == 8


def test_chance_is_a_half_however_many_are_right() -> None:
    said_yes = balanced_accuracy([(True, True)] * 30 + [(False, True)] * 4)
    assert said_yes.value == 0.5
    assert balanced_accuracy([(True, True)] * 30 + [(False, False)] * 3) == NOTHING


def test_the_question_of_a_name_marks_the_tokens_that_fire() -> None:
    question = name_question([passage(3, True)]).text
    assert "1. Number 3:⟦ thanks⟧ and more words" in question
    two = Passage((" a", " b", " c", " d"), (0.0, 1.0, 0.4, 0.2))
    assert two.marked() == "a⟦ b c⟧ d"


@pytest.mark.parametrize(
    ("answer", "name"),
    [
        ("NAME: thanks the reader", "thanks the reader"), ('**Name:** "thanks."\n', "thanks"), ("thanks\nmore", "thanks"),
        ("Let me see.\nNAME: thanks", "thanks"), ("", ""), ("\n \n", ""), ("NAME:", ""), ("NAME: " + "x" * 500, "x" * 120),
        ("NAME: a\u202eb\x00c", "abc"), ("<script>alert(1)</script>", "<script>alert(1)</script>"),
        ("1. Thank you⟦,⟧ your pleasure⟦.⟧", "Thank you, your pleasure"), ("NAME: 2) links", "links"),
        ("NAME: 3.5 stars", "3.5 stars"),
    ],
)  # fmt: skip
def test_names_are_one_line_of_printable_text(answer: str, name: str) -> None:
    assert read_name(answer) == name


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ("[1, 0, 1]", [True, False, True]), ("I think [1,0,0]. No: [0,1,0]", [False, True, False]), ("1, 0, 1", None),
        ("[1, 0]", None), ("[1, 0, 2]", None), ("[yes, no, yes]", None), ("", None),
    ],
)  # fmt: skip
def test_only_a_list_of_the_right_length_is_an_answer(answer: str, read: list[bool] | None) -> None:
    assert read_answers(answer, 3) == read


def test_passages_cut_responses_and_never_cross_them() -> None:
    pair, region = np.repeat([0, 0, 1], [30, 10, 24]), np.repeat([1, 2, 1], [30, 10, 24])
    assert passage_bounds(pair, region) == [(0, 24), (24, 30), (30, 40), (40, 64)]
    assert passage_bounds(pair[:0], region[:0]) == []


def test_other_tokens_are_silent_ones_with_text() -> None:
    one = passage(1, True)
    for seed in range(20):
        (place,) = other_tokens(one, np.random.default_rng(seed))
        assert one.levels[place] == 0
        assert one.tokens[place].strip()


def test_the_strongest_are_shown_beside_weaker_ones_and_each_text_once() -> None:
    falling = [Passage((f"t{i}",), (1 - i / 100,)) for i in range(50)]
    chosen = strongest_and_others(falling, 6)
    assert [p.tokens[0] for p in chosen] == ["t0", "t1", "t2", "t3", "t26", "t49"]
    assert distinct([falling[0], Passage(("t0",), (0.1,)), falling[1]]) == falling[:2]


def test_written_replies_are_compared_within_a_prompt() -> None:
    rows = [Replies(f"p{i}", "Hi", "thanks", "well", (3.0 + i, 1.0 + i), (1.5, -0.1), (True, i == 0)) for i in range(12)]
    found = judge_replies(rows, sd=2.0)
    assert found.moved.value == pytest.approx(1.0)
    assert found.effect.value == pytest.approx(0.8)
    assert found.carried.value == pytest.approx(0.8)
    assert (found.fires_with.value, found.fires_without.value) == (1.0, pytest.approx(1 / 12))
    assert (found.moves_as_said(1), found.moves_as_said(-1)) == (True, False)
    assert judge_replies([], sd=2.0).moves_as_said(1) is None
    assert judge_replies(rows[:7], sd=2.0).moves_as_said(1) is None  # too few to be sure
    assert read_reply("Answer: Thanks.\0 ") == "Thanks."

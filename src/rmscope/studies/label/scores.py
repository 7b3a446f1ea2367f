"""Two scores of a name on passages that the language model has not seen: detection and fuzzing.

Each is the mean of the share of right passages that it takes for right, and of the share of wrong ones that it takes for
wrong: .5 is chance, 1 is perfect.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from rmscope.run.inputs import evenly
from rmscope.statistics import NOTHING, Array, Figure, bootstrap
from rmscope.studies.label.language_model import LanguageModel, Question
from rmscope.studies.label.passages import ConceptPassages, other_tokens
from rmscope.studies.label.questions import AT_ONCE, detection_question, fuzzing_question, read_answers

T = TypeVar("T")
FEWEST = 4
"""Fewer right or wrong passages make no score."""


def detection(model: LanguageModel, name: str, passages: ConceptPassages, n: int, rng: np.random.Generator) -> Figure:
    """Which of ``n`` passages the concept fires in: half of them firing, half silent."""
    half = min(n // 2, len(passages.firing), len(passages.silent))
    silent = [passages.silent[i] for i in rng.permutation(len(passages.silent))[:half]]
    items = [(p, True) for p in evenly(passages.firing, half)] + [(p, False) for p in silent]
    return _score(model, lambda some: detection_question(name, some), items, rng)


def fuzzing(model: LanguageModel, name: str, passages: ConceptPassages, n: int, rng: np.random.Generator) -> Figure:
    """In which of ``n`` firing passages the marks are where the concept fires: in half of them they are elsewhere."""
    marked = [(p, other_tokens(p, rng)) for p in passages.firing]
    usable = [(p, others) for p, others in marked if others]
    drawn = rng.permutation(len(usable))[: n // 2 * 2]
    items = [(usable[i][0].marked(), True) for i in drawn[::2]] + [
        (usable[i][0].marked(usable[i][1]), False) for i in drawn[1::2]
    ]
    return _score(model, lambda some: fuzzing_question(name, some), items, rng)


def _score(
    model: LanguageModel, question: Callable[[list[T]], Question], items: Sequence[tuple[T, bool]], rng: np.random.Generator
) -> Figure:
    """The balanced accuracy over items in random order. Questions without a readable answer are asked once more, then left
    out."""
    order = rng.permutation(len(items))
    parts = [[items[i] for i in order[at : at + AT_ONCE]] for at in range(0, len(items), AT_ONCE)]
    answered: list[tuple[bool, bool]] = []
    for _ in range(2):
        missing = []
        answers = model.answers([question([item for item, _ in part]) for part in parts])
        for part, answer in zip(parts, answers, strict=True):
            said = read_answers(answer, len(part))
            if said is None:
                missing.append(part)
            else:
                answered += [(right, mark) for (_, right), mark in zip(part, said, strict=True)]
        parts = missing
    return balanced_accuracy(answered)


def balanced_accuracy(answered: Sequence[tuple[bool, bool]]) -> Figure:
    """From (is right, was taken for right) of each passage; nothing where there are too few of either kind."""
    rows = np.array(answered, dtype=float).reshape(-1, 2)
    if min((rows[:, 0] == 1).sum(), (rows[:, 0] == 0).sum()) < FEWEST:
        return NOTHING

    def mean(values: Array) -> float:
        right, taken = values[:, 0] == 1, values[:, 1] == 1
        if right.all() or not right.any():
            return float("nan")
        return float((taken[right].mean() + 1 - taken[~right].mean()) / 2)

    low, high = bootstrap(rows, np.arange(len(rows)), mean)
    return Figure(mean(rows), low, high, len(rows))

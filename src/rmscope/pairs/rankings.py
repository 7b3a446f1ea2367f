"""Several responses to a prompt, each with a score: in one row, or one row for each.

In one row (UltraFeedback, Nectar, PPE's best of K) every response is paired with a better one: one of the highest score,
or, where several share it, each of those in turn. So n responses give at most n - 1 pairs, and no response below the best
is ever a chosen one. Rows with a response each (``scored``) give every two responses of a prompt whose scores differ.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from rmscope.pairs.pair import Message, Pair
from rmscope.pairs.transcripts import is_transcript_prompt, transcript_prompt
from rmscope.pairs.values import BadRow, Outcome, Row, number_of, prompt_of, text_of, value_of

SCORES = ("overall", "score", "helpfulness")
"""The column that ranks responses in scored data: the first of these that the data has."""
_RESPONSE = re.compile(r"response_(\d+)")

Scored = tuple[str, float, dict[str, Any]]
"""A response, its score, and what else is kept of it."""


def against_the_best(prompt: list[Message], responses: Sequence[Scored]) -> Iterator[Pair]:
    """Each response below the highest score, against one of the highest."""
    highest = max((score for _, score, _ in responses), default=0.0)
    best = [i for i, (_, score, _) in enumerate(responses) if score == highest]
    lower = [i for i, (_, score, _) in enumerate(responses) if score < highest]
    if not lower:
        raise BadRow("all responses have the same score", always="skip")
    for turn, r in enumerate(lower):
        c = best[turn % len(best)]
        (chosen, high, more), (rejected, low, other) = responses[c], responses[r]
        meta = {"score_chosen": high, "score_rejected": low}
        meta |= {f"{name}_chosen": value for name, value in more.items()}
        meta |= {f"{name}_rejected": value for name, value in other.items()}
        yield Pair(f"{c}-{r}", prompt, chosen, rejected, meta)


def _entries(row: Row, name: str) -> list[Mapping[str, Any]]:
    entries: list[Mapping[str, Any]] = value_of(row, name, "list of messages")
    return entries


def _part(entry: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: entry[name] for name in names if entry.get(name) is not None}


def ultrafeedback(row: Row) -> Iterator[Pair]:
    """Four completions with an overall score. Each was asked for by a principle of its own, which is kept in ``meta``."""
    names = ("model", "principle", "fine-grained_score")
    responses = [
        (text_of(entry, "response"), number_of(entry, "overall_score"), _part(entry, names))
        for entry in _entries(row, "completions")
    ]
    yield from against_the_best(prompt_of(row, "instruction"), responses)


def nectar(row: Row) -> Iterator[Pair]:
    """Seven ranked responses, the best with rank 1; the prompt is a transcript. The score is minus the rank."""
    prompt = transcript_prompt(row) if is_transcript_prompt(row.get("prompt")) else prompt_of(row)
    responses = [
        (text_of(entry, "answer"), -number_of(entry, "rank"), _part(entry, ("model",))) for entry in _entries(row, "answers")
    ]
    yield from against_the_best(prompt, responses)


def best_of_k(row: Row) -> Iterator[Pair]:
    """Responses ``response_1`` to ``response_K`` and a list of K scores: right (true) or wrong."""
    scores, names = value_of(row, "scores"), numbered_responses(row)
    if not isinstance(scores, list) or len(scores) != len(names):
        raise BadRow(f"scores is not a list with one entry for each of the {len(names)} responses")
    responses: list[Scored] = [
        (text_of(row, name), number_of({"a score": float(s) if isinstance(s, bool) else s}, "a score"), {})
        for name, s in zip(names, scores, strict=True)
        if row[name] is not None
    ]
    yield from against_the_best(prompt_of(row), responses)


def numbered_responses(row: Row) -> list[str]:
    """The columns response_1, response_2, ... in their order."""
    names = [name for name in row if isinstance(name, str) and _RESPONSE.fullmatch(name)]
    return sorted(names, key=lambda name: int(name.rpartition("_")[2]))


RANKINGS: dict[str, tuple[tuple[str, ...], Callable[[Row], Iterator[Pair]]]] = {
    "ultrafeedback": (("instruction", "completions"), ultrafeedback),
    "nectar": (("prompt", "answers"), nectar),
    "ppe best of k": (("prompt", "response_1", "response_2", "scores"), best_of_k),
}
"""Published formats of several responses in a row: the columns that make them, and their reader."""


def response(row: Row) -> Iterator[Pair]:
    """One response with its score, as a pair of the response and itself."""
    prompt, text = prompt_of(row), text_of(row, "response")
    name = next((name for name in SCORES if row.get(name) is not None), None)
    if name is None:
        raise BadRow(f"there is no score (a column {', '.join(SCORES[:-1])} or {SCORES[-1]})")
    score = number_of(row, name)
    if not text.strip():
        raise BadRow("response is empty", always="skip")
    yield Pair("", prompt, text, text, {"score_chosen": score})


def compare_scores(outcomes: Iterable[Outcome]) -> Iterator[Outcome]:
    """Every two rows of a prompt whose scores differ, prompts in the order of their first rows.

    A prompt with one response, or with equal scores alone, is always listed as left out.
    """
    prompts: dict[str, list[tuple[int, Pair]]] = {}
    for line, outcome in outcomes:
        if isinstance(outcome, BadRow):
            yield line, outcome
        else:
            prompts.setdefault(repr(outcome.prompt), []).append((line, outcome))
    for responses in prompts.values():
        line = responses[0][0]
        if len({response.meta["score_chosen"] for _, response in responses}) == 1:
            reason = (
                "all responses of its prompt have the same score" if len(responses) > 1 else "its prompt has one response"
            )
            yield line, BadRow(reason, always="skip")
        scored = [(response.meta["score_chosen"], place, response) for place, (_, response) in enumerate(responses)]
        for one, other in combinations(scored, 2):
            (low, r, worse), (high, c, better) = (one, other) if one[0] < other[0] else (other, one)
            if high > low:
                pair = replace(better, id=f"{c}-{r}", rejected=worse.chosen, meta={**better.meta, "score_rejected": low})
                yield line, pair

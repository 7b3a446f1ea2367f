"""Rows of two responses and a label that tells the better one. Each format is one row of :data:`CHOICES`.

Where neither is preferred, the row is always skipped and listed: a place is never taken for a label.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rmscope.pairs.pair import Message, Pair
from rmscope.pairs.sides import part_dialogues
from rmscope.pairs.values import (
    BadRow,
    Row,
    check_prompt,
    messages_of,
    number_of,
    prompt_of,
    text_of,
    texts_of,
    tie,
    value_of,
)

Better = Callable[[Row], int]
"""0 where the first response is the better one, 1 where the second is. Raises BadRow for ties and for other labels."""
Meta = Callable[[Row, int], dict[str, Any]]
"""What is kept of a row whose better response is known."""


def _by_label(name: str, first: tuple[Any, ...], second: tuple[Any, ...], neither: tuple[Any, ...] = ()) -> Better:
    """The label of a column: its values for the first response, for the second, and for neither."""

    def better(row: Row) -> int:
        label = value_of(row, name)
        label = _plain_label(label) if isinstance(label, str) else label
        if label in neither:
            raise tie()
        for place, values in enumerate((first, second)):
            if label in values:
                return place
        shown = str(label) if isinstance(label, int | float) else f"{label!r:.40}"
        raise BadRow(f"{name} is {shown} instead of {first[0]} or {second[0]}")

    return better


def _plain_label(label: str) -> Any:
    """A label without outer whitespace; a number where a CSV file holds the text of one."""
    try:
        return float(label)
    except ValueError:
        return label.strip()


def _by_difference(first: str, second: str) -> Better:
    """The higher of two scores."""

    def better(row: Row) -> int:
        one, other = number_of(row, first), number_of(row, second)
        if one == other:
            raise tie()
        return int(other > one)

    return better


def _by_sign(name: str) -> Better:
    """Below 0 the first response is preferred, above 0 the second."""

    def better(row: Row) -> int:
        strength = number_of(row, name)
        if strength == 0:
            raise tie()
        return int(strength > 0)

    return better


def _sided(name: str, values: Sequence[Any], better: int) -> dict[str, Any]:
    """A value of each response, under the sides' names; values that are missing are left out."""
    sides = {f"{name}_chosen": values[better], f"{name}_rejected": values[1 - better]}
    return {key: value for key, value in sides.items() if value is not None}


def _scores(first: str, second: str) -> Meta:
    """The published scores of the two responses, where the row has both."""

    def meta(row: Row, better: int) -> dict[str, Any]:
        if row.get(first) is None or row.get(second) is None:
            return {}
        return _sided("score", (number_of(row, first), number_of(row, second)), better)

    return meta


def _strength(name: str, votes: str, vote: str) -> Meta:
    """HelpSteer's strength, and that of each annotator: above 0 where they prefer the chosen response."""

    def meta(row: Row, better: int) -> dict[str, Any]:
        strength: dict[str, Any] = {"preference": abs(number_of(row, name))}
        if isinstance(row.get(votes), list):
            strengths = [v.get(vote) for v in row[votes] if isinstance(v, Mapping)]
            sign = 1 if better else -1
            strength["annotators"] = [sign * s for s in strengths if isinstance(s, int | float)]
        return strength

    return meta


def _safety(row: Row, better: int) -> dict[str, Any]:
    """PKU-SafeRLHF: which sides are safe, and whether the chosen one is also the safer one."""
    safety = _sided("safe", [row.get(f"is_response_{i}_safe") for i in (0, 1)], better)
    if row.get("safer_response_id") in (0, 1):
        safety["chosen_is_safer"] = row["safer_response_id"] == better
    return safety


def _models(first: str, second: str) -> Meta:
    """The models that gave the two responses."""
    return lambda row, better: _sided("model", (row.get(first), row.get(second)), better)


def _copied(*names: str) -> Meta:
    """Columns that are kept as they are."""
    return lambda row, _better: {name: row[name] for name in names if row.get(name) is not None}


@dataclass(frozen=True)
class Choice:
    """A published format: its columns, where the texts are, and what tells the better response."""

    columns: tuple[str, ...]
    """The columns that make a row of this format: the prompt, the two responses, and what tells the better one."""
    better: Better
    meta: tuple[Meta, ...] = ()
    sides: Callable[[Row, tuple[str, ...]], tuple[list[Message], str, str]] | None = None
    """The prompt and both responses, where they are not plainly in the first three columns."""

    def fits(self, row: Row) -> bool:
        return set(self.columns) <= row.keys()

    def pairs(self, row: Row) -> Iterator[Pair]:
        for name in reversed(self.columns):
            value_of(row, name)
        better = self.better(row)
        prompt, *texts = (self.sides or _plain_sides)(row, self.columns)
        meta = {name: value for keep in self.meta for name, value in keep(row, better).items()}
        yield Pair("", prompt, texts[better], texts[1 - better], meta)


def _plain_sides(row: Row, columns: tuple[str, ...]) -> tuple[list[Message], str, str]:
    prompt, first, second, *_ = columns
    return prompt_of(row, prompt), text_of(row, first), text_of(row, second)


def _dialogues(row: Row, columns: tuple[str, ...]) -> tuple[list[Message], str, str]:
    """Two dialogues, of which the first ``turn`` exchanges were judged. Only their last responses may differ."""
    first, second, *_ = columns
    turns = None if row.get("turn") in (None, "") else number_of(row, "turn")
    left, right = (_judged(messages_of(row, name), turns) for name in (first, second))
    return part_dialogues(left, right, "the two conversations", always="skip")


def _judged(messages: list[Message], turns: float | None) -> list[Message]:
    """The first ``turns`` exchanges; all of them where it is not told how many were judged."""
    if turns is None:
        return messages
    if turns < 1 or turns % 1:
        raise BadRow("turn is not a whole number from 1 on")
    ends = [i + 1 for i, m in enumerate(messages) if m["role"] == "assistant"]
    return messages[: ends[int(turns) - 1]] if len(ends) > turns else messages


def _listed_turns(row: Row, columns: tuple[str, ...]) -> tuple[list[Message], str, str]:
    """Turns as JSON lists, one for the user and one for each model. Several turns differ in every response."""
    turns = []
    for name in columns[:3]:
        try:
            turns.append(texts_of({name: json.loads(row[name]) if isinstance(row[name], str) else row[name]}, name))
        except (ValueError, RecursionError):
            raise BadRow(f"{name} is not a JSON list of texts") from None
    if any(len(texts) != 1 for texts in turns):
        raise BadRow("the two conversations do not differ in their last assistant message alone", always="skip")
    return check_prompt([{"role": "user", "content": turns[0][0]}]), turns[1][0], turns[2][0]


def _full_text(row: Row, columns: tuple[str, ...]) -> tuple[list[Message], str, str]:
    """WebGPT: the question is an object with its full text."""
    question = row["question"]
    text = question.get("full_text") if isinstance(question, Mapping) else question
    return prompt_of({"question": text}, "question"), text_of(row, columns[1]), text_of(row, columns[2])


def _summaries(row: Row, _columns: tuple[str, ...]) -> tuple[list[Message], str, str]:
    """Summaries of a post, which is put as in the study of Stiennon et al. (2020): subreddit, title, post, TL;DR."""
    info, summaries = row["info"], row["summaries"]
    if not isinstance(info, Mapping) or not isinstance(summaries, list) or len(summaries) != 2:
        raise BadRow("info is not an object, or summaries are not two")
    post = info.get("post") or info.get("article")
    if not isinstance(post, str):
        raise BadRow("there is no prompt")
    parts = (("SUBREDDIT: r/", info.get("subreddit")), ("TITLE: ", info.get("title")), ("POST: ", post))
    text = "".join(f"{name}{part}\n\n" for name, part in parts if part) + "TL;DR:"
    sides = [text_of(s if isinstance(s, Mapping) else {}, "text") for s in summaries]
    return check_prompt([{"role": "user", "content": text}]), sides[0], sides[1]


def _confidence(row: Row, _better: int) -> dict[str, Any]:
    extra = row.get("extra")
    confidence = extra.get("confidence") if isinstance(extra, Mapping) else None
    return {} if confidence is None else {"confidence": confidence}


def _winner_columns(row: Row) -> int:
    """Arena 55k: three columns of 0 and 1."""
    won = [number_of(row, f"winner_{name}") for name in ("model_a", "model_b", "tie")]
    if sorted(won) != [0, 0, 1]:
        raise BadRow("winner_model_a, winner_model_b and winner_tie are not one 1 and two 0")
    if won[2]:
        raise tie()
    return int(won[1])


TIES = ("tie", "tie (bothbad)", "both_bad", "both bad", "bothbad")
_WINNER = _by_label("winner", ("model_a", "model_1"), ("model_b", "model_2"), TIES)
_SUMMARIES = ("info", "summaries", "choice")
CHOICES: dict[str, Choice] = {
    "llmbar": Choice(
        ("input", "output_1", "output_2", "label"),
        _by_label("label", (1,), (2,)),
        (lambda _row, better: {"label": better + 1},),
    ),
    "helpsteer preference": Choice(
        ("prompt", "response_1", "response_2", "preference_strength"),
        _by_sign("preference_strength"),
        (_strength("preference_strength", "all_preferences_unprocessed", "strength"),),
    ),
    "helpsteer3 preference": Choice(
        ("context", "response1", "response2", "overall_preference"),
        _by_sign("overall_preference"),
        (_strength("overall_preference", "individual_preference", "score"),),
    ),
    "pku-saferlhf": Choice(
        ("prompt", "response_0", "response_1", "better_response_id"),
        _by_label("better_response_id", (0,), (1,)),
        (_safety,),
    ),
    "shp": Choice(
        ("history", "human_ref_A", "human_ref_B", "labels"),
        _by_label("labels", (1,), (0,)),
        (_scores("score_A", "score_B"), _copied("score_ratio")),
    ),
    "webgpt": Choice(
        ("question", "answer_0", "answer_1", "score_0", "score_1"),
        _by_difference("score_0", "score_1"),
        (_scores("score_0", "score_1"),),
        _full_text,
    ),
    "arena": Choice(
        ("conversation_a", "conversation_b", "winner"), _WINNER, (_models("model_a", "model_b"),), _dialogues
    ),
    "arena 55k": Choice(
        ("prompt", "response_a", "response_b", "winner_model_a", "winner_model_b", "winner_tie"),
        _winner_columns,
        (_models("model_a", "model_b"),),
        _listed_turns,
    ),
    "ppe preference": Choice(
        ("prompt", "response_1", "response_2", "winner"), _WINNER, (_models("model_name_1", "model_name_2"),)
    ),
    "judgebench": Choice(
        ("question", "response_A", "response_B", "label"),
        _by_label("label", ("A>B",), ("B>A",), ("A=B", "B=A")),
    ),
    "tl;dr": Choice(
        _SUMMARIES, _by_label("choice", (0,), (1,)), (_copied("worker"), _confidence), _summaries
    ),
}  # fmt: skip
"""Published formats of two responses with a label, by name."""

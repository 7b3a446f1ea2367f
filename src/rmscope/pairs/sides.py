"""Rows that name the better response: ``chosen`` and ``rejected``, as texts, lists of texts, or messages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from typing import Any

from rmscope.pairs.pair import SIDES, Message, Pair
from rmscope.pairs.transcripts import common
from rmscope.pairs.values import (
    BadRow,
    Row,
    check_prompt,
    messages_of,
    number_of,
    prompt_of,
    shape,
    text_of,
    text_turns,
    texts_of,
)

STYLES = ("concise", "detailed plain", "detailed markdown")
"""RM-Bench: the order of the three responses of each side."""
DIALOGUES = ("conversations", "conversation", "messages")
"""Columns that hold the dialogue before the two responses."""
QUESTIONS = ("question", "instruction", "input")
"""Columns that hold the prompt where none is called so."""
SIDE_SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_rating", "rejected_rating"),
)
"""Columns in which the scores of both sides are published."""


def side_scores(row: Row) -> dict[str, float]:
    """The scores of both sides, for ``meta``; empty where the row has none.

    Raises:
        BadRow: they are equal (always skipped and listed), or the rejected side has the higher one.
    """
    for better, worse in SIDE_SCORES:
        try:
            high, low = number_of(row, better), number_of(row, worse)
        except BadRow:
            continue
        if high == low:
            raise BadRow(f"{better} and {worse} are equal", always="skip")
        if high < low:
            raise BadRow(f"{better} is below {worse}")
        return {"score_chosen": high, "score_rejected": low}
    return {}


def plain(row: Row) -> Iterator[Pair]:
    yield Pair("", prompt_of(row), text_of(row, "chosen"), text_of(row, "rejected"))


def instruction(row: Row) -> Iterator[Pair]:
    """A question alone, or an instruction and its input in one turn, after the exchanges of a ``history`` (Alpaca)."""
    question, *parts = (row[name] if isinstance(row.get(name), str) else "" for name in QUESTIONS)
    text = question if question.strip() else "\n".join(part for part in parts if part.strip())
    if not text.strip():
        raise BadRow("there is no prompt")
    prompt = [*_history(row), *text_turns(text)]
    yield Pair("", check_prompt(prompt), _response(row, "chosen"), _response(row, "rejected"))


def _history(row: Row) -> Iterator[Message]:
    """The exchanges before an instruction: a list of an earlier instruction and its response each."""
    exchanges = row.get("history")
    for exchange in exchanges if isinstance(exchanges, list) else ():
        if shape(exchange) != "list of texts" or len(exchange) != 2:
            raise BadRow("history is not a list of two texts each")
        yield {"role": "user", "content": exchange[0]}
        yield {"role": "assistant", "content": exchange[1]}


def dialogue(row: Row) -> Iterator[Pair]:
    """A dialogue and its two continuations (ShareGPT, as LLaMA-Factory reads it): each a text or one assistant message."""
    name = next((name for name in ("prompt", *DIALOGUES) if row.get(name) is not None), "prompt")
    yield Pair("", prompt_of(row, name), _response(row, "chosen"), _response(row, "rejected"))


def _response(row: Row, side: str) -> str:
    """A response that is a text or one assistant message, alone or in a list."""
    if isinstance(row.get(side), Mapping):
        row = {**row, side: [row[side]]}
    return text_of(row, side) if isinstance(row.get(side), str) else one_response(messages_of(row, side), side)


def one_response(messages: list[Message], side: str) -> str:
    """The text of one assistant message."""
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise BadRow(f"{side} is not one assistant message")
    return response_text(messages[0], side)


def response_text(message: Message, side: str) -> str:
    """The text of a response; a tool call has none."""
    if message.get("tool_calls"):
        raise BadRow(f"{side} is a tool call, and only texts can be compared")
    return message["content"]


def combinations_of(row: Row) -> Iterator[Pair]:
    """Every chosen text with every rejected one."""
    prompt = prompt_of(row)
    chosen, rejected = texts_of(row, "chosen"), texts_of(row, "rejected")
    for (c, better), (r, worse) in product(enumerate(chosen), enumerate(rejected)):
        yield Pair(f"{c}-{r}", prompt, better, worse)


def rm_bench(row: Row) -> Iterator[Pair]:
    for side in SIDES:
        if len(texts_of(row, side)) != len(STYLES):
            raise BadRow(f"{side} holds {len(row[side])} texts where those before it hold {len(STYLES)}")
    for pair, (c, r) in zip(combinations_of(row), product(STYLES, STYLES), strict=True):
        yield replace(pair, meta={"style_chosen": c, "style_rejected": r})


def explicit(row: Row) -> Iterator[Pair]:
    chosen, rejected = (one_response(messages_of(row, side), side) for side in SIDES)
    yield Pair("", prompt_of(row), chosen, rejected)


def implicit(row: Row) -> Iterator[Pair]:
    left, right = messages_of(row, "chosen"), messages_of(row, "rejected")
    prompt, chosen, rejected = part_dialogues(left, right, "chosen and rejected")
    yield Pair("", prompt, chosen, rejected)


def part_dialogues(
    left: list[Message], right: list[Message], names: str, always: Any = None
) -> tuple[list[Message], str, str]:
    """Two dialogues that differ in their last response alone: the prompt, and the two responses."""
    n = common(left, right)
    if any(len(turns) != n + 1 or turns[-1]["role"] != "assistant" for turns in (left, right)):
        raise BadRow(f"{names} do not differ in their last assistant message alone", always=always)
    return check_prompt(left[:n]), response_text(left[-1], "the first"), response_text(right[-1], "the second")

"""The fields of a row, read as what a format asks for; else one clause that says what is wrong with them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, cast

from rmscope.pairs.pair import Message

Row = Mapping[str, Any]

SCORES = ("overall", "score", "helpfulness")
"""The column that decides in scored data: the first of these that the data has."""


class BadRow(Exception):  # noqa: N818 - a verdict on data; the error that people see is InputError
    """Why a row gives no pair. ``always`` overrules what the caller asked to be done with bad rows."""

    def __init__(self, reason: str, always: Literal["raise", "skip"] | None = None, part: str = "") -> None:
        super().__init__(reason)
        self.reason, self.always, self.part = reason, always, part


def shape_of(value: Any) -> str:
    if isinstance(value, str):
        return "text"
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return "texts"
        if all(isinstance(item, Mapping) for item in value):
            return "messages"
    return "unknown"


def present(row: Row, name: str) -> Any:
    if name not in row:
        raise BadRow(f"{name} is missing")
    if row[name] is None:
        raise BadRow(f"{name} is null")
    return row[name]


def as_text(row: Row, name: str) -> str:
    value = present(row, name)
    if not isinstance(value, str):
        raise BadRow(f"{name} is {kind_of(value)} instead of a text")
    return value


def as_texts(row: Row, name: str) -> list[str]:
    value = present(row, name)
    texts = [value] if isinstance(value, str) else value
    if shape_of(texts) != "texts":
        raise BadRow(f"{name} is {kind_of(value)} instead of a list of texts")
    return cast(list[str], texts)


def as_messages(row: Row, name: str) -> list[Message]:
    value = present(row, name)
    if shape_of(value) != "messages":
        raise BadRow(f"{name} is {kind_of(value)} instead of a list of messages")
    for message in value:
        if not all(isinstance(message.get(part), str) for part in ("role", "content")):
            raise BadRow(f"a message of {name} lacks a role or a content that is a text")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def as_prompt(row: Row, name: str = "prompt") -> list[Message]:
    """The prompt as messages, whether it is published as such or as a text."""
    if row.get(name) is None:
        raise BadRow("there is no prompt")
    if isinstance(row[name], str):
        return spoken([{"role": "user", "content": row[name]}])
    return spoken(as_messages(row, name))


def spoken(prompt: list[Message]) -> list[Message]:
    if not any(turn["content"].strip() for turn in prompt):
        raise BadRow("there is no prompt")
    if prompt[-1]["role"] != "user":
        raise BadRow("the prompt does not end with a user turn")
    return prompt


def as_score(row: Row) -> float:
    named = next((name for name in SCORES if row.get(name) is not None), None)
    if named is None:
        raise BadRow(f"there is no score (a column {', '.join(SCORES[:-1])} or {SCORES[-1]})")
    return as_number(row, named)


def as_number(row: Row, name: str) -> float:
    """A number, or the text of one as in CSV."""
    value = present(row, name)
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise BadRow(f"{name} is no finite number")
    return number


def kind_of(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, list):
        return "an empty list" if not value else "a list"
    return "a text" if isinstance(value, str) else "an object" if isinstance(value, Mapping) else "something else"

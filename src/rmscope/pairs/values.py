"""Values of a row, checked and turned into texts, numbers and messages. A fault is a :class:`BadRow` of one clause."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

from rmscope.pairs.pair import SIDES, Message, Pair

ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "observation": "tool",
    "function": "tool", "function_response": "tool",
}  # fmt: skip
"""Roles under other names, as in ShareGPT."""
SYSTEM_COLUMNS = ("system", "system_prompt")
"""Columns whose text is the system turn of the prompt."""

_MARKED_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)(?:\n|\Z)")


class BadRow(Exception):  # noqa: N818 - a verdict on data; the error that people see is InputError
    """Why a row gives no pair. ``always`` overrules ``on_bad_row`` of :func:`~rmscope.pairs.readers.load_pairs`."""

    def __init__(self, reason: str, always: Literal["raise", "skip"] | None = None, part: str = "") -> None:
        super().__init__(reason)
        self.reason, self.always, self.part = reason, always, part


class Time:
    """A date or time in a file: no pair needs it, and Python has no value for some of them."""


Row = Mapping[str, Any]
Record = tuple[int, Row | BadRow]
Outcome = tuple[int, Pair | BadRow]


def tie() -> BadRow:
    """A row that prefers no response: it is always left out and listed."""
    return BadRow("neither response is preferred", always="skip")


def shape(value: Any) -> str | None:
    """``text``, ``list of texts`` or ``list of messages``."""
    if isinstance(value, str):
        return "text"
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return "list of texts"
        if all(isinstance(item, Mapping) for item in value):
            return "list of messages"
    return None


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "a text", Mapping: "an object", Time: "a date"}
    return next((name for kind, name in kinds.items() if isinstance(value, kind)), "something else")


def value_of(row: Row, name: str, *shapes: str) -> Any:
    """The value of a column, of one of these shapes; of any shape if none is given."""
    if name not in row:
        raise BadRow(f"{name} is missing")
    if row[name] is None:
        raise BadRow(f"{name} is null")
    if shapes and shape(row[name]) not in shapes:
        raise BadRow(f"{name} is {_kind(row[name])} instead of a {shapes[0]}")
    return row[name]


def text_of(row: Row, name: str) -> str:
    return str(value_of(row, name, "text"))


def texts_of(row: Row, name: str) -> list[str]:
    value = value_of(row, name, "list of texts", "text")
    return [value] if isinstance(value, str) else list(value)


def number_of(row: Row, name: str) -> float:
    """A number, or the text of one as in CSV."""
    value = value_of(row, name)
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise BadRow(f"{name} is not a finite number")
    return number


def messages_of(row: Row, name: str) -> list[Message]:
    """The messages of a column: ``role`` and ``content``, or ``from`` and ``value`` as in ShareGPT."""
    return [_message(message, name) for message in value_of(row, name, "list of messages")]


def _message(entry: Mapping[str, Any], name: str) -> Message:
    role = entry.get("role") or entry.get("from")
    calls = entry.get("tool_calls") or None
    content = entry.get("content") if entry.get("content") is not None else entry.get("value")
    if calls and not isinstance(calls, list):
        raise BadRow(f"the tool calls of {name} are not a list")
    if role == "function_call":  # ShareGPT: the text of a call, made by the assistant
        role, calls, content = "assistant", [_parsed_call(content, name)], ""
    if content is None and calls:
        content = ""
    content = _join_parts(content, name) if isinstance(content, list) else content
    if not isinstance(role, str) or not isinstance(content, str):
        raise BadRow(f"a message of {name} lacks a role or a content that is a text")
    message: Message = {"role": ROLES.get(role, role), "content": content}
    if calls:
        message["tool_calls"] = [_tool_call(call, name) for call in calls]
    if isinstance(entry.get("name"), str):
        message["name"] = entry["name"]
    if isinstance(entry.get("tool_call_id"), str):
        message["tool_call_id"] = entry["tool_call_id"]
    return message


def _tool_call(call: Any, name: str) -> dict[str, Any]:
    """A call as chat templates take it, also where it is published without ``function`` around it."""
    function = (call.get("function") or call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadRow(f"a tool call of {name} has no name")
    return {"type": "function", "function": dict(call)} if function is call else dict(call)


def _parsed_call(text: Any, name: str) -> dict[str, Any]:
    """The call that a ShareGPT turn of the role ``function_call`` holds."""
    try:
        call = json.loads(text)
        return {"name": str(call["name"]), "arguments": call["arguments"]}
    except (TypeError, ValueError, KeyError, RecursionError):
        raise BadRow(f"a function call of {name} is not JSON with a name and arguments") from None


def _join_parts(parts: list[Any], name: str) -> str:
    """The text of a message that is published in parts. Parts of other kinds, such as images, are refused."""
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise BadRow(f"a message of {name} has a part of the kind {kind}, and only texts can be read")
        texts.append(text)
    return "".join(texts)


def prompt_of(row: Row, name: str = "prompt") -> list[Message]:
    """The prompt as messages, whether it is published as messages or as a text."""
    if row.get(name) is None:
        raise BadRow("there is no prompt")
    return check_prompt(text_turns(row[name]) if isinstance(row[name], str) else messages_of(row, name))


def text_turns(text: str) -> list[Message]:
    """A text as one user turn, or as the turns that HelpSteer parts by ``<extra_id_1>`` and a speaker."""
    first, *others = _MARKED_TURN.split(text)
    turns: list[Message] = [{"role": "user", "content": first}]
    for speaker, content in zip(others[::2], others[1::2], strict=True):
        turns.append({"role": speaker.lower(), "content": content})
    if others and any("<extra_id_1>" in turn["content"] for turn in turns):
        raise BadRow("the prompt has a mark <extra_id_1> without a speaker")
    if len(turns) > 1 and turns[-1] == {"role": "assistant", "content": ""}:
        turns.pop()  # the place of the response
    return turns


def check_prompt(prompt: list[Message]) -> list[Message]:
    """The prompt, which must have a text and end where the assistant is to speak or has begun to."""
    if not any(turn["content"].strip() for turn in prompt):
        raise BadRow("there is no prompt")
    if prompt[-1]["role"] not in ("user", "tool", "assistant"):
        raise BadRow(f"the prompt ends with a {prompt[-1]['role']} turn instead of a user turn")
    return prompt


def begin_responses(pair: Pair) -> Pair:
    """The pair with the assistant turn that ends its prompt (a prefill) put before both responses.

    A response that repeats the prefill stays as it is.
    """
    *before, last = pair.prompt
    if last["role"] != "assistant":
        return pair
    if last.get("tool_calls"):
        raise BadRow("the prompt ends with a tool call that no tool turn answers")
    if not any(turn["content"].strip() for turn in before):
        raise BadRow("there is no prompt before the assistant's first turn")
    if before[-1]["role"] not in ("user", "tool"):
        raise BadRow("the prompt does not end with a user turn")
    begin = last["content"]
    if same := [side for side in SIDES if begin.strip() and begin.strip() == pair.side(side).strip()]:
        raise BadRow(f"the prompt ends with the {same[0]} response")
    repeated = pair.chosen.startswith(begin) and pair.rejected.startswith(begin)
    chosen, rejected = (side if repeated else begin + side for side in (pair.chosen, pair.rejected))
    return Pair(pair.id, before, chosen, rejected, {**pair.meta, **({"prefill": begin} if begin else {})})


def with_system(pair: Pair, row: Row) -> Pair:
    """The pair with the text of the row's system column as the first turn of its prompt."""
    name = next((name for name in SYSTEM_COLUMNS if row.get(name)), None)
    if name is None or not text_of(row, name).strip():
        return pair
    if pair.prompt[0]["role"] != "system":
        return Pair(pair.id, [{"role": "system", "content": row[name]}, *pair.prompt], pair.chosen, pair.rejected, pair.meta)
    if pair.prompt[0]["content"].strip() != row[name].strip():
        raise BadRow(f"the column {name} and the prompt's own system turn differ")
    return pair

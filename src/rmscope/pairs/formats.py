"""The shapes in which preference data is published, each turned into pairs.

A format is recognised from the columns of a row. Its function turns one row into pairs, or raises a :class:`BadRow` with
the fault in one clause. Only ``scored`` needs all rows: it compares the responses of a prompt. Here the id of a pair only
tells the pairs of one row apart (``0-1``: the places of its sides) and is empty if there is one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain, combinations, islice, product
from typing import Any, Literal

from rmscope.pairs.pair import SIDES, Message, Pair

SCORES = ("overall", "score", "helpfulness")
"""The column that ranks responses in scored data: the first of these that the data has."""
STYLES = ("concise", "detailed plain", "detailed markdown")
"""RM-Bench: the order of the three answers on each side."""
META_COLUMNS = ("subset", "domain", "style", "label", "group")
"""Columns that are copied to ``Pair.meta``; ``group`` is the prompt key in splits."""
LOOKAHEAD = 100
"""Rows that are read before a format is given up, or to tell RM-Bench from best of N."""
PREFERENCE_COLUMNS = (
    ("prompt", "response_1", "response_2", "preference_strength"),
    ("context", "response1", "response2", "overall_preference"),
)
"""The columns of HelpSteer2-preference, and those of HelpSteer3."""

_TURN = re.compile(r"\n\n(Human|Assistant):(?: |\s*\Z)")
_ROLES = {"Human": "user", "Assistant": "assistant"}
_OPENING = "\n\nAssistant:"


class BadRow(Exception):  # noqa: N818 - a verdict on data; the error that people see is InputError
    """Why a row gives no pair. ``always`` overrules ``on_bad_row`` of :func:`~rmscope.pairs.readers.load_pairs`."""

    def __init__(self, reason: str, always: Literal["raise", "skip"] | None = None, part: str = "") -> None:
        super().__init__(reason)
        self.reason, self.always, self.part = reason, always, part


Row = Mapping[str, Any]
Record = tuple[int, Row | BadRow]
Outcome = tuple[int, Pair | BadRow]


def recognise(records: Iterator[Record]) -> tuple[str | None, Iterator[Record]]:
    """The format of the first row that has one, and all the records again. Reads no further than it must.

    If no row is of a known format, rows with a chosen or a rejected column count as plain (as transcripts, without a
    prompt), so that each of them gets an error of its own.
    """
    read: list[Record] = []
    found: str | None = None
    for record in islice(records, LOOKAHEAD):
        read.append(record)
        guess = None if isinstance(record[1], BadRow) else _guess(record[1])
        found = guess if found is None or guess == "best of n" else found
        if found is not None and found != "rm-bench":
            break
    rows = [row for _, row in read if not isinstance(row, BadRow)]
    named = [row for row in rows if "chosen" in row or "rejected" in row]
    if found is None and (named or not rows):
        found = "trl plain" if not named or any("prompt" in row for row in named) else "hh transcript"
    return found, chain(read, records)


def _guess(row: Row) -> str | None:
    if row.get("chosen") is not None and row.get("rejected") is not None:
        return _guess_sides(row)
    if {"input", "output_1", "output_2", "label"} <= row.keys():
        return "llmbar"
    if _preference_columns(row) is not None:
        return "helpsteer preference"
    if {"prompt", "response"} <= row.keys() and any(name in row for name in SCORES):
        return "scored"
    return None


def _guess_sides(row: Row) -> str | None:
    prompt, shapes = row.get("prompt"), {_shape(row[side]) for side in SIDES}
    if shapes == {"list of messages"}:
        opens = row["chosen"][0].get("role")
        return "trl explicit prompt" if prompt is not None and opens == "assistant" else "trl implicit prompt"
    if shapes == {"text"} and all(row[side].lstrip().startswith("Human:") for side in SIDES):
        return "hh transcript"
    if prompt is None or not shapes <= {"text", "list of texts"}:
        return None
    if "list of texts" in shapes:
        three = all(isinstance(row[side], list) and len(row[side]) == len(STYLES) for side in SIDES)
        return "rm-bench" if three else "best of n"
    if isinstance(prompt, str) and prompt.lstrip().startswith("Human:") and prompt.rstrip().endswith(_OPENING):
        return "hh prompt"
    return "rewardbench" if "subset" in row else "trl plain"


def _shape(value: Any) -> str | None:
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
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "a text", Mapping: "an object"}
    return next((name for kind, name in kinds.items() if isinstance(value, kind)), "something else")


def _value(row: Row, name: str, *shapes: str) -> Any:
    """The value of a column, of one of these shapes; of any shape if none is given."""
    if name not in row:
        raise BadRow(f"{name} is missing")
    if row[name] is None:
        raise BadRow(f"{name} is null")
    if shapes and _shape(row[name]) not in shapes:
        raise BadRow(f"{name} is {_kind(row[name])} instead of a {shapes[0]}")
    return row[name]


def _text(row: Row, name: str) -> str:
    return str(_value(row, name, "text"))


def _texts(row: Row, name: str) -> list[str]:
    value = _value(row, name, "list of texts", "text")
    return [value] if isinstance(value, str) else list(value)


def _messages(row: Row, name: str) -> list[Message]:
    messages = _value(row, name, "list of messages")
    for message in messages:
        if not all(isinstance(message.get(part), str) for part in ("role", "content")):
            raise BadRow(f"a message of {name} lacks a role or a content that is a text")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _prompt(row: Row, name: str = "prompt") -> list[Message]:
    """The prompt as messages, whether it is published as messages or as a text."""
    if row.get(name) is None:
        raise BadRow("there is no prompt")
    is_text = isinstance(row[name], str)
    return _check_prompt([{"role": "user", "content": row[name]}] if is_text else _messages(row, name))


def _check_prompt(prompt: list[Message]) -> list[Message]:
    if not any(turn["content"].strip() for turn in prompt):
        raise BadRow("there is no prompt")
    if prompt[-1]["role"] != "user":
        raise BadRow("the prompt does not end with a user turn")
    return prompt


def _number(row: Row, name: str) -> float:
    """A number, or the text of one as in CSV."""
    value = _value(row, name)
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise BadRow(f"{name} is not a finite number")
    return number


def convert(name: str, records: Iterable[Record]) -> Iterator[Outcome]:
    """The pairs of each record in file order, or the reason why it has none."""
    outcomes = _compare_scores(records) if name == "scored" else _row_by_row(_FORMATS[name], records)
    for line, outcome in outcomes:
        yield line, outcome if isinstance(outcome, BadRow) else _examine(outcome)


def _row_by_row(read: Callable[[Row], Iterator[Pair]], records: Iterable[Record]) -> Iterator[Outcome]:
    for line, row in records:
        if isinstance(row, BadRow):
            yield line, row
            continue
        meta = {name: row[name] for name in META_COLUMNS if row.get(name) is not None}
        try:
            for pair in read(row):
                yield line, replace(pair, meta={**meta, **pair.meta})
        except BadRow as bad:
            yield line, bad


def _examine(pair: Pair) -> Pair | BadRow:
    """The pair, or why no model can be asked which of its sides is better."""
    for side in SIDES:
        if not pair.side(side).strip():
            return BadRow(f"{side} is empty", part=pair.id)
    if pair.chosen == pair.rejected:
        return BadRow("chosen and rejected are identical", part=pair.id)
    try:
        "".join([pair.chosen, pair.rejected, *(turn["content"] for turn in pair.prompt)]).encode()
    except UnicodeEncodeError:
        return BadRow("a text holds half of a surrogate pair, which is no character", part=pair.id)
    return pair


def _turns(text: str, column: str) -> tuple[str, list[Message], list[int]]:
    """The transcript without outer whitespace but for its first blank line, its turns, and where their texts start in it.
    A turn opens with a blank line, its speaker, a colon and one space. Written back so, the turns give the transcript."""
    text = "\n\n" + text.lstrip()
    before, *parts = _TURN.split(text)
    if before or parts[0] != "Human":
        raise BadRow(f'there is no prompt: {column} does not begin with "\\n\\nHuman: "')
    turns: list[Message] = [{"role": _ROLES[r], "content": t} for r, t in zip(parts[::2], parts[1::2], strict=True)]
    return text, turns, [mark.end() for mark in _TURN.finditer(text)]


def _transcripts(row: Row) -> Iterator[Pair]:
    """Common turns are the prompt; the rest of each transcript, verbatim, is the response.

    In 17 of the 7,415 pairs of three hh-rlhf test splits a response then has more than one turn. The data also has
    identical and empty responses (34 and 8 there): such rows are always skipped and listed.
    """
    if _text(row, "chosen") == _text(row, "rejected"):
        raise BadRow("chosen and rejected are identical", always="skip")
    chosen, left, left_starts = _turns(row["chosen"], "chosen")
    rejected, right, right_starts = _turns(row["rejected"], "rejected")
    for side, turns in (("chosen", left), ("rejected", right)):
        if turns[-1]["role"] != "assistant":
            raise BadRow(f"{side} does not end with an assistant turn")
    n = _common(left, right)
    if n == 0 or [turn["role"] for turn in (left[n - 1], left[n], right[n])] != ["user", "assistant", "assistant"]:
        raise BadRow("the dialogues do not part at the beginning of an assistant turn")
    pair = Pair("", _check_prompt(left[:n]), chosen[left_starts[n] :], rejected[right_starts[n] :])
    for side in SIDES:
        if not pair.side(side).strip():
            raise BadRow(f"{side} is empty", always="skip")
    yield pair


def _common(left: list[Message], right: list[Message]) -> int:
    """How many leading turns the dialogues share; the last turn of each does not count."""
    most = min(len(left), len(right)) - 1
    return next((i for i in range(most) if left[i] != right[i]), most)


def _prompt_transcript(row: Row) -> Iterator[Pair]:
    """A transcript that ends where the assistant is to speak, and two responses (as in Dahoas/rm-static)."""
    chosen, rejected, prompt = _text(row, "chosen"), _text(row, "rejected"), _text(row, "prompt")
    if not prompt.rstrip().endswith(_OPENING):
        raise BadRow('the prompt does not end with "\\n\\nAssistant:" as those before it do')
    _, turns, _ = _turns(prompt.rstrip(), "prompt")
    yield Pair("", _check_prompt(turns[:-1]), chosen.removeprefix(" "), rejected.removeprefix(" "))


def _plain(row: Row) -> Iterator[Pair]:
    yield Pair("", _prompt(row), _text(row, "chosen"), _text(row, "rejected"))


def _combinations(row: Row) -> Iterator[Pair]:
    prompt = _prompt(row)
    chosen, rejected = _texts(row, "chosen"), _texts(row, "rejected")
    for (c, better), (r, worse) in product(enumerate(chosen), enumerate(rejected)):
        yield Pair(f"{c}-{r}", prompt, better, worse)


def _rm_bench(row: Row) -> Iterator[Pair]:
    for side in SIDES:
        if len(_texts(row, side)) != len(STYLES):
            raise BadRow(f"{side} holds {len(row[side])} texts where those before it hold {len(STYLES)}")
    for pair, (c, r) in zip(_combinations(row), product(STYLES, STYLES), strict=True):
        yield replace(pair, meta={"style_chosen": c, "style_rejected": r})


def _llmbar(row: Row) -> Iterator[Pair]:
    label, outputs = _number(row, "label"), (_text(row, "output_1"), _text(row, "output_2"))
    if label not in (1, 2):
        raise BadRow(f"label is {row['label']!r} instead of 1 or 2")
    chosen, rejected = outputs if label == 1 else reversed(outputs)
    yield Pair("", _prompt(row, "input"), chosen, rejected, meta={"label": int(label)})


def _preference_columns(row: Row) -> tuple[str, str, str, str] | None:
    return next((names for names in PREFERENCE_COLUMNS if set(names) <= row.keys()), None)


def _preference(row: Row) -> Iterator[Pair]:
    """Below 0 the first response is preferred, above 0 the second; rows with 0 are always skipped and listed."""
    names = _preference_columns(row)
    if names is None:
        raise BadRow(f"it lacks a column of {', '.join(PREFERENCE_COLUMNS[0])}")
    prompt, first, second, preference = names
    strength = _number(row, preference)
    if strength == 0:
        raise BadRow("neither response is preferred", always="skip")
    sides = _text(row, first), _text(row, second)
    chosen, rejected = sides if strength < 0 else reversed(sides)
    yield Pair("", _prompt(row, prompt), chosen, rejected, meta={"preference": abs(strength)})


def _explicit(row: Row) -> Iterator[Pair]:
    sides = [_messages(row, side) for side in SIDES]
    for side, turns in zip(SIDES, sides, strict=True):
        if len(turns) != 1 or turns[0]["role"] != "assistant":
            raise BadRow(f"{side} is not one assistant message")
    yield Pair("", _prompt(row), sides[0][0]["content"], sides[1][0]["content"])


def _implicit(row: Row) -> Iterator[Pair]:
    left, right = _messages(row, "chosen"), _messages(row, "rejected")
    common = _common(left, right)
    if any(len(turns) != common + 1 or turns[-1]["role"] != "assistant" for turns in (left, right)):
        raise BadRow("chosen and rejected do not differ in their last assistant message alone")
    yield Pair("", _check_prompt(left[:common]), left[-1]["content"], right[-1]["content"])


def _response(row: Row) -> Iterator[Pair]:
    """One response with its score, as a pair without a rejected side."""
    prompt, response = _prompt(row), _text(row, "response")
    name = next((name for name in SCORES if row.get(name) is not None), None)
    if name is None:
        raise BadRow(f"there is no score (a column {', '.join(SCORES[:-1])} or {SCORES[-1]})")
    score = _number(row, name)
    if not response.strip():
        raise BadRow("response is empty")
    yield Pair("", prompt, response, "", {"score_chosen": score})


def _compare_scores(records: Iterable[Record]) -> Iterator[Outcome]:
    """Every two rows of a prompt whose scores differ, prompts in the order of their first rows."""
    prompts: dict[str, list[tuple[int, Pair]]] = {}
    for line, outcome in _row_by_row(_response, records):
        if isinstance(outcome, BadRow):
            yield line, outcome
        else:
            prompts.setdefault(repr(outcome.prompt), []).append((line, outcome))
    for responses in prompts.values():
        scored = [(response.meta["score_chosen"], place, response) for place, (_, response) in enumerate(responses)]
        for one, other in combinations(scored, 2):
            (low, r, worse), (high, c, better) = (one, other) if one[0] < other[0] else (other, one)
            if high > low:
                pair = replace(better, id=f"{c}-{r}", rejected=worse.chosen, meta={**better.meta, "score_rejected": low})
                yield responses[0][0], pair


_FORMATS: dict[str, Callable[[Row], Iterator[Pair]]] = {
    "hh transcript": _transcripts,
    "hh prompt": _prompt_transcript,
    "trl plain": _plain,
    "trl explicit prompt": _explicit,
    "trl implicit prompt": _implicit,
    "rewardbench": _plain,
    "best of n": _combinations,
    "rm-bench": _rm_bench,
    "llmbar": _llmbar,
    "helpsteer preference": _preference,
}
NAMES = (*_FORMATS, "scored")
"""Every format by the name that ``ReadReport.format`` gives it."""

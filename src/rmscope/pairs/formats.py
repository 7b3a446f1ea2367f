"""The shapes in which preference data is published, each turned into candidates for a Pair.

A format is recognised from the columns of a row. Each turns one row into prompt, chosen and rejected, or says
in one clause what is wrong with it; only ``scored`` sees all rows, because there a prompt has several.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, combinations, islice, product
from typing import Any

from rmscope.pairs.fields import (
    SCORES,
    BadRow,
    Row,
    as_messages,
    as_number,
    as_prompt,
    as_score,
    as_text,
    as_texts,
    shape_of,
    spoken,
)
from rmscope.pairs.pair import SIDES, Message

STYLES = ("concise", "detailed plain", "detailed markdown")
"""RM-Bench: the order of the three answers on each side."""
KEPT = ("subset", "domain", "style", "label", "group")
"""Columns that go into ``Pair.meta`` where they exist; ``group`` stands for the prompt in splits."""
LOOKAHEAD = 100
"""Rows looked at before a format is given up, or RM-Bench told from best of N."""

_TURN = re.compile(r"\n\n(Human|Assistant):(?: |\s*\Z)")
_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True, slots=True)
class Candidate:
    """What will be a Pair once it has its id; ``part`` tells the combinations of one row apart."""

    prompt: list[Message]
    chosen: str
    rejected: str
    part: str = ""
    meta: dict[str, Any] = field(default_factory=dict)


Record = tuple[int, Row | BadRow]
Outcome = tuple[int, Candidate | BadRow]


def recognise(records: Iterator[Record]) -> tuple[str | None, Iterator[Record]]:
    """The format of the first row that is of one, and the records again, none of them lost.

    Reads no further than it must. Where no row is of a known format, rows with a chosen or a rejected column
    are taken as plain (or as transcripts, without a prompt), so that each is told its own fault.
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
    return found or _fallback(rows), chain(read, records)


def _guess(row: Row) -> str | None:
    if row.get("chosen") is not None and row.get("rejected") is not None:
        return _guess_sides(row)
    if {"input", "output_1", "output_2", "label"} <= row.keys():
        return "llmbar"
    if _two_responses(row) is not None:
        return "helpsteer preference"
    if {"prompt", "response"} <= row.keys() and any(name in row for name in SCORES):
        return "scored"
    return None


def _guess_sides(row: Row) -> str | None:
    shapes = {shape_of(row[side]) for side in SIDES}
    has_prompt = row.get("prompt") is not None
    if shapes == {"text"}:
        return _guess_text(row)
    if shapes <= {"text", "texts"} and has_prompt:
        three = all(isinstance(row[side], list) and len(row[side]) == len(STYLES) for side in SIDES)
        return "rm-bench" if three else "best of n"
    if shapes == {"messages"}:
        opens = row["chosen"][0].get("role")
        return "trl explicit prompt" if has_prompt and opens == "assistant" else "trl implicit prompt"
    return None


def _guess_text(row: Row) -> str | None:
    prompt = row.get("prompt")
    if all(row[side].lstrip().startswith("Human:") for side in SIDES):
        return "hh transcript"
    if prompt is None:
        return None
    if isinstance(prompt, str) and prompt.lstrip().startswith("Human:") and _opens_response(prompt):
        return "hh prompt"
    return "rewardbench" if "subset" in row else "trl plain"


def _fallback(rows: list[Row]) -> str | None:
    if not rows:
        return "trl plain"
    named = [row for row in rows if "chosen" in row or "rejected" in row]
    if not named:
        return None
    return "trl plain" if any("prompt" in row for row in named) else "hh transcript"


def convert(name: str, records: Iterable[Record]) -> Iterator[Outcome]:
    """Each record's candidates in file order, or the reason why it has none."""
    outcomes = _scored(records) if name == "scored" else _row_by_row(_FORMATS[name], records)
    for line, outcome in outcomes:
        yield line, outcome if isinstance(outcome, BadRow) else _examined(outcome)


def _row_by_row(read: Callable[[Row], Iterator[Candidate]], records: Iterable[Record]) -> Iterator[Outcome]:
    for line, row in records:
        if isinstance(row, BadRow):
            yield line, row
            continue
        kept = {name: row[name] for name in KEPT if row.get(name) is not None}
        try:
            for candidate in read(row):
                yield line, replace(candidate, meta={**kept, **candidate.meta})
        except BadRow as bad:
            yield line, bad


def _examined(candidate: Candidate) -> Candidate | BadRow:
    """The candidate, unless no model could be asked which of its sides is better."""
    for side in SIDES:
        if not getattr(candidate, side).strip():
            return BadRow(f"{side} is empty", part=candidate.part)
    if candidate.chosen == candidate.rejected:
        return BadRow("chosen and rejected are identical", part=candidate.part)
    try:
        for text in (candidate.chosen, candidate.rejected, *(turn["content"] for turn in candidate.prompt)):
            text.encode()
    except UnicodeEncodeError:
        return BadRow("a text holds half of a surrogate pair, which is no character", part=candidate.part)
    return candidate


@dataclass(frozen=True, slots=True)
class _Turn:
    role: str
    content: str
    start: int

    def message(self) -> Message:
        return {"role": self.role, "content": self.content}


def _turns(text: str, column: str) -> tuple[str, list[_Turn]]:
    """The transcript without outer whitespace but for its first blank line, and its turns.

    A turn opens with a blank line, its speaker, a colon and one space, and with nothing else: written back in
    that form the turns give the transcript byte for byte.
    """
    text = "\n\n" + text.lstrip()
    marks = list(_TURN.finditer(text))
    if not marks or marks[0].start() != 0 or marks[0][1] != "Human":
        raise BadRow(f'there is no prompt: {column} does not begin with "\\n\\nHuman: "')
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return text, [_Turn(_ROLES[m[1]], text[m.end() : end], m.end()) for m, end in zip(marks, ends, strict=True)]


def _transcripts(row: Row) -> Iterator[Candidate]:
    """Common turns are the prompt; from there on each transcript verbatim is the response.

    In 17 of the 7,415 pairs of three hh-rlhf test splits a response so holds more than one turn. The data also hold
    identical and empty responses (34 and 8 there): such rows are always skipped and listed.
    """
    chosen, rejected = as_text(row, "chosen"), as_text(row, "rejected")
    if chosen == rejected:
        raise BadRow("chosen and rejected are identical", always="skip")
    chosen, left = _turns(chosen, "chosen")
    rejected, right = _turns(rejected, "rejected")
    for side, turns in (("chosen", left), ("rejected", right)):
        if turns[-1].role != "assistant":
            raise BadRow(f"{side} does not end with an assistant turn")
    common = _common([turn.message() for turn in left], [turn.message() for turn in right])
    if common == 0 or left[common - 1].role != "user" or {left[common].role, right[common].role} != {"assistant"}:
        raise BadRow("the dialogues do not part at the beginning of an assistant turn")
    prompt = [turn.message() for turn in left[:common]]
    candidate = Candidate(spoken(prompt), chosen[left[common].start :], rejected[right[common].start :])
    for side in SIDES:
        if not getattr(candidate, side).strip():
            raise BadRow(f"{side} is empty", always="skip")
    yield candidate


def _common(left: list[Message], right: list[Message]) -> int:
    """How many leading turns the dialogues share, the last of each left out."""
    most = min(len(left), len(right)) - 1
    return next((i for i in range(most) if left[i] != right[i]), most)


def _opens_response(prompt: str) -> bool:
    return prompt.rstrip().endswith("\n\nAssistant:")


def _prompt_transcript(row: Row) -> Iterator[Candidate]:
    """A transcript that ends where the assistant is to speak, and two responses (as in Dahoas/rm-static)."""
    chosen, rejected, prompt = as_text(row, "chosen"), as_text(row, "rejected"), as_text(row, "prompt")
    if not _opens_response(prompt):
        raise BadRow('the prompt does not end with "\\n\\nAssistant:" as those before it do')
    _, turns = _turns(prompt.rstrip(), "prompt")
    messages = spoken([turn.message() for turn in turns[:-1]])
    yield Candidate(messages, chosen.removeprefix(" "), rejected.removeprefix(" "))


def _plain(row: Row) -> Iterator[Candidate]:
    yield Candidate(as_prompt(row), as_text(row, "chosen"), as_text(row, "rejected"))


def _combinations(row: Row) -> Iterator[Candidate]:
    prompt = as_prompt(row)
    chosen, rejected = as_texts(row, "chosen"), as_texts(row, "rejected")
    for (c, better), (r, worse) in product(enumerate(chosen), enumerate(rejected)):
        yield Candidate(prompt, better, worse, part=f"{c}-{r}")


def _rm_bench(row: Row) -> Iterator[Candidate]:
    for side in SIDES:
        if len(as_texts(row, side)) != len(STYLES):
            raise BadRow(f"{side} holds {len(row[side])} texts where those before it hold {len(STYLES)}")
    for candidate, (c, r) in zip(_combinations(row), product(STYLES, STYLES), strict=True):
        yield replace(candidate, meta={"style_chosen": c, "style_rejected": r})


def _llmbar(row: Row) -> Iterator[Candidate]:
    label, outputs = as_number(row, "label"), (as_text(row, "output_1"), as_text(row, "output_2"))
    if label not in (1, 2):
        raise BadRow(f"label is {row['label']!r} instead of 1 or 2")
    chosen, rejected = outputs if label == 1 else reversed(outputs)
    yield Candidate(as_prompt(row, "input"), chosen, rejected, meta={"label": int(label)})


TWO_RESPONSES = (
    ("prompt", "response_1", "response_2", "preference_strength"),
    ("context", "response1", "response2", "overall_preference"),
)
"""HelpSteer2-preference's columns, and HelpSteer3's."""


def _two_responses(row: Row) -> tuple[str, str, str, str] | None:
    return next((names for names in TWO_RESPONSES if set(names) <= row.keys()), None)


def _preference(row: Row) -> Iterator[Candidate]:
    """Below 0 the first response is preferred, above 0 the second; rows without a preference are skipped and listed."""
    names = _two_responses(row)
    if names is None:
        raise BadRow(f"it lacks a column of {', '.join(TWO_RESPONSES[0])}")
    prompt, first, second, preference = names
    strength = as_number(row, preference)
    if strength == 0:
        raise BadRow("neither response is preferred", always="skip")
    sides = as_text(row, first), as_text(row, second)
    chosen, rejected = sides if strength < 0 else reversed(sides)
    yield Candidate(as_prompt(row, prompt), chosen, rejected, meta={"preference": abs(strength)})


def _explicit(row: Row) -> Iterator[Candidate]:
    sides = [as_messages(row, side) for side in SIDES]
    for side, turns in zip(SIDES, sides, strict=True):
        if len(turns) != 1 or turns[0]["role"] != "assistant":
            raise BadRow(f"{side} is not one assistant message")
    yield Candidate(as_prompt(row), sides[0][0]["content"], sides[1][0]["content"])


def _implicit(row: Row) -> Iterator[Candidate]:
    left, right = as_messages(row, "chosen"), as_messages(row, "rejected")
    common = _common(left, right)
    if any(len(turns) != common + 1 or turns[-1]["role"] != "assistant" for turns in (left, right)):
        raise BadRow("chosen and rejected do not differ in their last assistant message alone")
    yield Candidate(spoken(left[:common]), left[-1]["content"], right[-1]["content"])


def _scored(records: Iterable[Record]) -> Iterator[Outcome]:
    """Every two rows of a prompt whose scores differ, prompts in the order of their first rows."""
    prompts: dict[tuple[tuple[str, str], ...], list[tuple[int, float, Candidate]]] = {}
    for line, row in records:
        try:
            if isinstance(row, BadRow):
                raise row
            prompt, response, score = as_prompt(row), as_text(row, "response"), as_score(row)
            if not response.strip():
                raise BadRow("response is empty")
        except BadRow as bad:
            yield line, bad
            continue
        kept = {name: row[name] for name in KEPT if row.get(name) is not None}
        key = tuple((turn["role"], turn["content"]) for turn in prompt)
        prompts.setdefault(key, []).append((line, score, Candidate(prompt, response, "", meta=kept)))
    for answers in prompts.values():
        yield from _ordered(answers)


def _ordered(answers: list[tuple[int, float, Candidate]]) -> Iterator[Outcome]:
    for one, other in combinations(range(len(answers)), 2):
        c, r = (one, other) if answers[one][1] > answers[other][1] else (other, one)
        (_, high, better), (_, low, worse) = answers[c], answers[r]
        if high != low:
            meta = {**better.meta, "score_chosen": high, "score_rejected": low}
            yield answers[0][0], replace(better, rejected=worse.chosen, part=f"{c}-{r}", meta=meta)


_FORMATS: dict[str, Callable[[Row], Iterator[Candidate]]] = {
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

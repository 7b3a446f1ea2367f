"""The formats in which preference data is published, each turned into pairs.

A format is recognised from the columns of a row. Its function turns one row into pairs, or raises a :class:`BadRow` with
the fault in one clause. Only ``scored`` needs all rows: it compares the responses of a prompt. Here the id of a pair only
tells the pairs of one row apart (``0-1``: the places of its sides) and is empty if there is one. ``sides.py`` has the
formats that name the better response, ``choices.py`` those that label one of two, ``rankings.py`` those that score several.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain, islice
from typing import Literal

from rmscope.pairs import rankings, sides, transcripts
from rmscope.pairs.choices import CHOICES
from rmscope.pairs.pair import SIDES, Pair
from rmscope.pairs.rankings import RANKINGS, SCORES
from rmscope.pairs.values import ROLES, BadRow, Outcome, Record, Row, begin_responses, shape, with_system

META_COLUMNS = (
    "subset", "domain", "style", "label", "group", "language", "weight", "annotator", "annotators", "confidence",
)  # fmt: skip
"""Columns that are copied to ``Pair.meta``; ``group`` is the prompt key in splits."""
LOOKAHEAD = 100
"""Rows that are read before a format is given up, or to tell RM-Bench from best of N."""


def recognise(records: Iterator[Record]) -> tuple[str | None, Iterator[Record]]:
    """The format of the first row that has one, and all the records again. Reads no further than it must.

    If no row is of a known format, rows with a chosen or a rejected column count as plain (as transcripts, without a
    prompt), so that each of them gets an error of its own.
    """
    first: list[Record] = []
    form: str | None = None
    for record in islice(records, LOOKAHEAD):
        first.append(record)
        guess = None if isinstance(record[1], BadRow) else guess_format(record[1])
        form = guess if form is None or guess == "best of n" else form
        if form is not None and form != "rm-bench":
            break
    rows = [row for _, row in first if not isinstance(row, BadRow)]
    with_sides = [row for row in rows if "chosen" in row or "rejected" in row]
    if form is None and (with_sides or not rows):
        form = "trl plain" if not with_sides or any("prompt" in row for row in with_sides) else "hh transcript"
    return form, chain(first, records)


def guess_format(row: Row) -> str | None:
    """The format of a row by its columns; None where it is of none."""
    if row.get("chosen") is not None and row.get("rejected") is not None:
        return _guess_sides(row)
    if {"prompt", "response"} <= row.keys() and any(name in row for name in SCORES):
        return "scored"
    return labelled_format(row)


def labelled_format(row: Row) -> str | None:
    """The format of a row whose labels or scores tell which of its responses is the better one."""
    fitting = (name for name, choice in CHOICES.items() if choice.fits(row))
    ranked = (name for name, (columns, _) in RANKINGS.items() if set(columns) <= row.keys())
    return next(chain(fitting, ranked), None)


def _guess_sides(row: Row) -> str | None:
    prompt, shapes = row.get("prompt"), {shape(row[side]) for side in SIDES}
    if any(isinstance(row[side], Mapping) for side in SIDES):
        return "dialogue"
    if shapes == {"list of messages"}:
        return _guess_messages(row)
    if shapes == {"text"} and all(row[side].lstrip().startswith("Human:") for side in SIDES):
        return "hh transcript"
    if prompt is None and shapes == {"text"}:
        return _guess_prompt(row)
    if prompt is None or not shapes <= {"text", "list of texts"}:
        return None
    if "list of texts" in shapes:
        three = all(isinstance(row[side], list) and len(row[side]) == len(sides.STYLES) for side in SIDES)
        return "rm-bench" if three else "best of n"
    if transcripts.is_transcript_prompt(prompt):
        return "hh prompt"
    return "rewardbench" if "subset" in row else "trl plain"


def _guess_messages(row: Row) -> str:
    """Whether the sides hold their prompt, or only the response to the prompt of another column."""
    first = row["chosen"][0]
    role = first.get("role") or first.get("from")
    is_response = isinstance(role, str) and ROLES.get(role, role) == "assistant"
    if is_response and row.get("prompt") is not None:
        return "trl explicit prompt"
    return (_guess_prompt(row) if is_response else None) or "trl implicit prompt"


def _guess_prompt(row: Row) -> str | None:
    """Where the prompt is, if no column is called so."""
    if any(row.get(name) is not None for name in sides.DIALOGUES):
        return "dialogue"
    return "instruction" if any(isinstance(row.get(name), str) for name in sides.QUESTIONS) else None


def columns_of(form: str) -> tuple[str, ...]:
    """The columns that make a format whose labels or scores tell the better response."""
    return CHOICES[form].columns if form in CHOICES else RANKINGS[form][0]


def convert(name: str, records: Iterable[Record]) -> Iterator[Outcome]:
    """The pairs of each record in file order, or the reason why it has none."""
    read = rankings.response if name == "scored" else _FORMATS[name]
    outcomes = _row_by_row(read, records)
    always: Literal["skip"] | None = "skip" if name in CHOICES or name in RANKINGS or name == "scored" else None
    for line, outcome in rankings.compare_scores(outcomes) if name == "scored" else outcomes:
        yield line, outcome if isinstance(outcome, BadRow) else _examine(outcome, always)


def _row_by_row(read: Callable[[Row], Iterator[Pair]], records: Iterable[Record]) -> Iterator[Outcome]:
    for line, row in records:
        if isinstance(row, BadRow):
            yield line, row
            continue
        try:
            meta = {name: row[name] for name in META_COLUMNS if row.get(name) is not None} | sides.side_scores(row)
            for pair in read(row):
                yield line, with_system(begin_responses(replace(pair, meta={**meta, **pair.meta})), row)
        except BadRow as bad:
            yield line, bad


def _examine(pair: Pair, always: Literal["skip"] | None) -> Pair | BadRow:
    """The pair, or why no model can be asked which of its sides is better.

    Published sets of people's choices have empty and identical responses: there they are always skipped and listed.
    """
    for side in SIDES:
        if not pair.side(side).strip():
            return BadRow(f"{side} is empty", always, pair.id)
    if pair.chosen == pair.rejected:
        return BadRow("chosen and rejected are identical", always, pair.id)
    try:
        json.dumps([pair.prompt, pair.chosen, pair.rejected], ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return BadRow("a text holds half of a surrogate pair, which is no character", part=pair.id)
    return pair


_FORMATS: dict[str, Callable[[Row], Iterator[Pair]]] = {
    "hh transcript": transcripts.transcripts,
    "hh prompt": transcripts.after_transcript,
    "trl plain": sides.plain,
    "trl explicit prompt": sides.explicit,
    "trl implicit prompt": sides.implicit,
    "instruction": sides.instruction,
    "dialogue": sides.dialogue,
    "rewardbench": sides.plain,
    "best of n": sides.combinations_of,
    "rm-bench": sides.rm_bench,
    **{name: choice.pairs for name, choice in CHOICES.items()},
    **{name: read for name, (_, read) in RANKINGS.items()},
}
NAMES = (*_FORMATS, "scored")
"""Every format by the name that ``ReadReport.format`` gives it."""

"""Reading preference pairs: files or a hub dataset, row by row, into Pairs with stable ids."""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rmscope.errors import InputError
from rmscope.pairs.formats import NAMES, columns_of, convert, labelled_format, recognise
from rmscope.pairs.pair import SIDES, Pair
from rmscope.pairs.sides import DIALOGUES
from rmscope.pairs.sources import Source, open_source
from rmscope.pairs.values import BadRow, Outcome, Record, Row

OnBadRow = Literal["error", "skip"]

DEMOS = ("demo:planted", "demo:plain")
DEEPEST = 12
"""No text of a pair is nested deeper in its row."""
_COLUMNS = ("prompt", "chosen", "rejected", "response", "score", "system")
_MESSAGES = re.compile(r"""\s*\[\s*\{\s*['"](role|content|from|value)['"]\s*:""")
_DIALOGUES = ("prompt", *SIDES, "context", "conversation_a", "conversation_b", *DIALOGUES)
"""Columns that may hold messages, which CSV can only hold as the text of JSON."""
_LISTS = ("completions", "answers", "summaries", "info", "scores", "individual_preference", "all_preferences_unprocessed")
"""Columns that hold other lists or objects."""


@dataclass
class ReadReport:
    """How many rows and pairs a source had and what was left out; filled by :func:`load_pairs`."""

    format: str = ""
    """One of ``rmscope.pairs.formats.NAMES``, or ``demo``."""
    rows: int = 0
    pairs: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """The place of each row or combination that was left out, and the reason."""
    duplicates: int = 0
    """Repetitions of a pair already read."""


def load_pairs(
    source: str | os.PathLike[str],
    *,
    split: str = "train",
    revision: str | None = None,
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    form: str | None = None,
    on_bad_row: OnBadRow = "error",
    report: ReadReport | None = None,
) -> list[Pair]:
    """The pairs of a file, of a hub dataset, or of the demo (``demo:planted``; without its cues ``demo:plain``).

    A file is ``.jsonl``, ``.json`` (a list), ``.csv`` or ``.tsv`` (each also ``.gz``), or ``.parquet``. A folder of shards,
    or a pattern such as ``data/train-*.parquet``, is read like one file. An id is ``{stem}:{line}`` (hub and folders:
    ``{name}-{split}:{row}``). Where a row (or, in scored data, a prompt) gives several pairs, ``:{c}-{r}`` follows: the
    places of chosen and rejected, from 0. Lines count from 1; so do rows (all files but JSONL), without the header. A
    repeated pair is kept once. CRLF becomes LF and a byte order mark is dropped. The text of a column ``system`` is the
    system turn of the prompt. An assistant turn that ends the prompt (a prefill) begins both responses.

    Args:
        source: a path, a pattern, the name of a dataset on the Hugging Face hub, or ``demo:planted``.
        split: the split of a hub dataset or of a folder of shards.
        revision: the branch, tag or commit of a hub dataset; left out, its newest.
        limit: the most pairs, in file order. JSONL is read no further than that.
        columns: the source's names of ``prompt``, ``chosen``, ``rejected``, ``response``, ``score``, ``system``.
        form: one of ``rmscope.pairs.formats.NAMES``; without it the format is recognised from the columns.
        on_bad_row: a bad row (a side missing, empty, not a text or equal to the other, no prompt, malformed) raises, or is
            listed in ``report.skipped``. Ties, and identical or empty responses of hh-rlhf and of sets in which people
            labelled or scored responses, are always listed; bytes that are not UTF-8 and broken CSV quoting always raise.
        report: is filled with counts and with the rows that were left out.

    Raises:
        InputError: one sentence with the place and the mend; also if no pair is left.
    """
    _check(limit, columns, form, on_bad_row)
    report = ReadReport() if report is None else report
    vars(report).update(vars(ReadReport()))
    name = os.fspath(source)
    if name.startswith("demo:"):
        return _demo(name, limit, report)
    opened = open_source(name, split, revision, streaming=limit is not None)
    records = _normalised(opened, columns or {})
    if form is None:
        form, records = recognise(records)
    if form is None:
        line, row = next((line, row) for line, row in records if not isinstance(row, BadRow))
        raise InputError(
            f"{name} {opened.place(line)}: its columns ({_column_names(row)}) are of no known format; name yours with "
            "--columns prompt=A,chosen=B,rejected=C."
        )
    report.format = form
    pairs = _collect(opened, convert(form, _counted(records, report)), on_bad_row, limit, report)
    if not pairs:
        raise _nothing_left(opened, report)
    return pairs


def _check(limit: int | None, columns: Mapping[str, str] | None, form: str | None, on_bad_row: str) -> None:
    if form is not None and form not in NAMES:
        raise InputError(f"--format {form!r} is not a format of pairs; use {', '.join(NAMES)}.")
    if limit is not None and limit < 1:
        raise InputError(f"A limit of {limit} pairs leaves nothing to read; give 1 or more.")
    if on_bad_row not in ("error", "skip"):
        raise InputError(f"on_bad_row is {on_bad_row!r}; it must be 'error' or 'skip'.")
    for name in columns or {}:
        if name not in _COLUMNS:
            raise InputError(f"--columns names {name!r}; name one of {', '.join(_COLUMNS)}.")


def _demo(name: str, limit: int | None, report: ReadReport) -> list[Pair]:
    from rmscope.pairs.demo import demo_pairs, plain_demo_pairs

    if name not in (*DEMOS, "demo:"):
        raise InputError(f"{name} is not one of the demo's data; use {' or '.join(DEMOS)}.")
    pairs = plain_demo_pairs() if name == "demo:plain" else demo_pairs()
    report.format, report.rows, report.pairs = "demo", len(pairs), len(pairs[:limit])
    return pairs[:limit]


def _normalised(source: Source, columns: Mapping[str, str]) -> Iterator[Record]:
    """The records with LF line ends, messages read from JSON texts, and mapped columns under the names of the formats."""
    for line, row in source.records:
        if isinstance(row, BadRow):
            yield line, row
            continue
        where = f"{source.name} {source.place(line)}"
        if missing := [mapped for mapped in columns.values() if mapped not in row]:
            raise InputError(
                f"{where}: there is no column {missing[0]!r} (it has {_column_names(row)}); mend the mapping of columns."
            )
        mapped_sides = {columns[side] for side in SIDES if side in columns}
        if mapped_sides and (form := labelled_format(row)) is not None and mapped_sides & set(columns_of(form)):
            raise InputError(
                f"{where}: its columns are those of {form}, where a label tells the better response; leave --columns out, "
                "so that the label decides and not the place."
            )
        try:
            yield line, _plain_values({**row, **{name: row[mapped] for name, mapped in columns.items()}})
        except BadRow as bad:
            yield line, bad


def _column_names(row: Row) -> str:
    names = [" ".join(str(name).split())[:60] for name in row]
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "") or "none"


def _plain_values(row: Row) -> Row:
    return {name: _with_lf(_structure(str(name), value)) for name, value in row.items()}


def _structure(name: str, value: Any) -> Any:
    """Messages and lists that are stored as a text, as in CSV; every other value as it is."""
    is_messages = name in _DIALOGUES and isinstance(value, str) and _MESSAGES.match(value)
    is_list = name in _LISTS and isinstance(value, str) and value.lstrip()[:1] in ("[", "{")
    if not is_messages and not is_list:
        return value
    for read in (json.loads, ast.literal_eval):  # pandas writes lists to CSV as Python does
        try:
            return read(value)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue
    if is_messages:
        raise BadRow(f"{name} holds messages as a text that is not JSON")
    return value


def _with_lf(value: Any, depth: int = 0) -> Any:
    if isinstance(value, str):
        return value.replace("\r\n", "\n")
    if depth == DEEPEST:
        return value
    if isinstance(value, list):
        return [_with_lf(item, depth + 1) for item in value]
    return {name: _with_lf(item, depth + 1) for name, item in value.items()} if isinstance(value, Mapping) else value


def _counted(records: Iterator[Record], report: ReadReport) -> Iterator[Record]:
    for record in records:
        report.rows += 1
        yield record


def _collect(
    source: Source, outcomes: Iterator[Outcome], on_bad_row: OnBadRow, limit: int | None, report: ReadReport
) -> list[Pair]:
    pairs: dict[tuple[str, str, str], Pair] = {}
    for line, outcome in outcomes:
        if isinstance(outcome, BadRow):
            report.skipped.append(_skipped(source, line, outcome, on_bad_row))
            continue
        key = (repr(outcome.prompt), outcome.chosen, outcome.rejected)
        if key in pairs:
            report.duplicates += 1
            continue
        id_ = f"{source.stem}:{line}" + (f":{outcome.id}" if outcome.id else "")
        pairs[key] = replace(outcome, id=id_, meta={"source": source.stem, "line": line, **outcome.meta})
        report.pairs = len(pairs)
        if len(pairs) == limit:
            break
    return list(pairs.values())


def _skipped(source: Source, line: int, bad: BadRow, on_bad_row: OnBadRow) -> tuple[str, str]:
    """The place and the reason; raises them if bad rows are errors."""
    where = source.place(line) + (f", pair {bad.part}" if bad.part else "")
    if bad.always == "raise":
        raise InputError(f"{source.name} {where}: {bad.reason}; mend the file there.")
    if bad.always is None and on_bad_row == "error":
        raise InputError(f"{source.name} {where}: {bad.reason}; mend it, or leave such rows out with `--on-bad-row skip`.")
    return where, bad.reason


def _nothing_left(source: Source, report: ReadReport) -> InputError:
    if not report.rows:
        return InputError(f"{source.name} is empty; name a file with at least one pair.")
    n, (where, reason) = len(report.skipped), report.skipped[0]
    return InputError(
        f"{source.name} has no usable pair: {n} were left out, the first at {where} ({reason}); mend the file."
    )

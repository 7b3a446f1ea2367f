"""Reading preference pairs: a file or a hub dataset, row by row, into Pairs with stable ids."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from rmscope.errors import InputError
from rmscope.pairs.formats import NAMES, BadRow, Outcome, Record, Row, convert, recognise
from rmscope.pairs.pair import Pair

OnBadRow = Literal["error", "skip"]

FILE_SUFFIX = re.compile(r"\.((jsonl|json|csv|tsv)(\.gz)?|parquet)$", re.IGNORECASE)
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_COLUMNS = ("prompt", "chosen", "rejected", "response", "score")


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


@dataclass(frozen=True, slots=True)
class _Source:
    """An opened source: its name for messages, the stem of its ids, the unit in which its rows are counted."""

    name: str
    stem: str
    unit: Literal["line", "row"]
    records: Iterator[Record]


def load_pairs(
    source: str | os.PathLike[str],
    *,
    split: str = "train",
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    form: str | None = None,
    on_bad_row: OnBadRow = "error",
    report: ReadReport | None = None,
) -> list[Pair]:
    """The pairs of a file, of a hub dataset, or of the demo (``demo:``; without its cues ``demo:plain``).

    A file is ``.jsonl``, ``.json`` (a list), ``.csv`` or ``.tsv`` (each also ``.gz``), or ``.parquet``. An id is
    ``{stem}:{line}`` (hub: ``{name}-{split}:{row}``). Where a row (or, in scored data, a prompt) gives several pairs,
    ``:{c}-{r}`` follows: the places of chosen and rejected, from 0. Lines count from 1; so do rows (all files but JSONL),
    without the header. A repeated pair is kept once. CRLF becomes LF and a byte order mark is dropped.

    Args:
        source: a path, the name of a dataset on the Hugging Face hub, or ``demo:``.
        split: the split of a hub dataset.
        limit: the most pairs, in file order. JSONL is read no further than that.
        columns: the source's names of ``prompt``, ``chosen``, ``rejected``, ``response``, ``score``.
        form: one of ``rmscope.pairs.formats.NAMES``; without it the format is recognised from the columns: transcripts as
            in hh-rlhf, TRL plain and conversational, RewardBench, best of N (every chosen with every rejected), RM-Bench,
            LLMBar, HelpSteer's preferences, or scored responses (every two of a prompt whose scores differ).
        on_bad_row: a bad row (a side missing, empty, not a text or equal to the other, no prompt, malformed) raises, or is
            listed in ``report.skipped``. Identical sides and empty responses in hh-rlhf transcripts are always listed;
            bytes that are not UTF-8 and broken CSV quoting always raise.
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
    opened = _open(name, split, streaming=limit is not None)
    records = _normalised(opened, columns or {})
    if form is None:
        form, records = recognise(records)
    if form is None:
        line, row = next((line, row) for line, row in records if not isinstance(row, BadRow))
        raise InputError(
            f"{name} {opened.unit} {line}: its columns ({_column_names(row)}) are of no known format; name yours with "
            'columns={"prompt": ..., "chosen": ..., "rejected": ...}.'
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
            raise InputError(f"columns names {name!r}; only {', '.join(_COLUMNS)} can be mapped.")


def _demo(name: str, limit: int | None, report: ReadReport) -> list[Pair]:
    from rmscope.pairs.demo import demo_pairs, plain_demo_pairs

    pairs = plain_demo_pairs() if name == "demo:plain" else demo_pairs()
    report.format, report.rows, report.pairs = "demo", len(pairs), len(pairs[:limit])
    return pairs[:limit]


def _open(name: str, split: str, *, streaming: bool) -> _Source:
    path = Path(name).expanduser()
    suffix = FILE_SUFFIX.search(path.name)
    if path.is_dir():
        raise InputError(f"{name or 'The empty name'} is a folder; name one file in it.")
    if path.exists() and suffix:
        kind = suffix[1].lower().removesuffix(".gz")
        records = _guarded(name, _READERS[kind](path, name))
        return _Source(name, path.name[: suffix.start()], "line" if kind == "jsonl" else "row", records)
    if path.exists():
        raise InputError(f"{name} has no ending that tells its format; use .jsonl, .json, .csv, .tsv or .parquet.")
    if suffix or not _HUB_ID.fullmatch(name):
        raise InputError(f"{name} does not exist; check the path.")
    return _Source(name, f"{name.rpartition('/')[2]}-{split}", "row", _hub(name, split, streaming=streaming))


def _guarded(name: str, records: Iterator[Record]) -> Iterator[Record]:
    try:
        yield from records
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{name} is not a whole gzip file ({error}); fetch or pack it again.") from error
    except OSError as error:
        raise InputError(f"{name} cannot be read ({error.strerror or error}); check the file.") from error


def _binary(path: Path) -> io.BufferedIOBase:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")


def _jsonl(path: Path, _name: str) -> Iterator[Record]:
    with _binary(path) as lines:
        for number, raw in enumerate(lines, 1):
            raw = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
            if raw.strip():
                yield number, _parsed(raw)


def _parsed(raw: bytes) -> Row | BadRow:
    try:
        return _mapping(json.loads(raw.decode()))
    except UnicodeDecodeError as error:
        return BadRow(_not_utf8(error), always="raise")
    except json.JSONDecodeError as error:
        return BadRow(f"malformed JSON ({error.msg} at column {error.colno})")
    except (ValueError, RecursionError) as error:
        return BadRow(f"malformed JSON ({_one_line(error)})")


def _mapping(row: object) -> Row | BadRow:
    return row if isinstance(row, Mapping) else BadRow("it is not an object with named columns")


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"the byte 0x{error.object[error.start]:02x} is not UTF-8"


def _whole(path: Path, name: str) -> str:
    """The text of a file that can only be read as one."""
    with _binary(path) as opened:
        raw = opened.read().removeprefix(codecs.BOM_UTF8)
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(f"{name} line {line}: {_not_utf8(error)}; save the file as UTF-8.") from error


def _json(path: Path, name: str) -> Iterator[Record]:
    text = _whole(path, name)
    if not text.strip():
        return
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        mend = "name it .jsonl if each line is an object" if error.msg == "Extra data" else "mend it there"
        raise InputError(f"{name} line {error.lineno}: malformed JSON ({error.msg}); {mend}.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is malformed JSON ({_one_line(error)}); write it again.") from error
    if not isinstance(rows, list):
        raise InputError(f"{name} has no list of rows at its top level; write one, or use JSONL.")
    yield from enumerate(map(_mapping, rows), 1)


def _csv(path: Path, name: str) -> Iterator[Record]:
    text = _whole(path, name)
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    delimiter = "\t" if path.name.lower().removesuffix(".gz").endswith(".tsv") else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    read = 0
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise InputError(f"{name} line 1: the header names a column twice; rename one.")
        for read, fields in enumerate(filter(None, reader), 1):
            if len(fields) == len(header):
                yield read, dict(zip(header, fields, strict=True))
            else:
                yield read, BadRow(f"it has {len(fields)} fields where the header has {len(header)}")
    except csv.Error as error:
        yield read + 1, BadRow(f"malformed quoting ({error})", always="raise")


def _parquet(path: Path, name: str) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    read = 0
    try:
        with pq.ParquetFile(path) as table:
            rows = (row for batch in table.iter_batches(batch_size=1024) for row in batch.to_pylist())
            for read, row in enumerate(rows, 1):
                yield read, row
    except (pa.ArrowException, UnicodeDecodeError) as error:
        where = f"{name} row {read + 1}" if read else name
        raise InputError(f"{where}: not a whole Parquet file ({_one_line(error)}); fetch it again.") from error


_READERS = {"jsonl": _jsonl, "json": _json, "csv": _csv, "tsv": _csv, "parquet": _parquet}


def _hub(name: str, split: str, *, streaming: bool) -> Iterator[Record]:
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"{name} is not a file here, and reading it from the Hugging Face hub needs the package `datasets`; "
            "run `pip install 'rmscope[train]'`, or name a file."
        ) from error
    try:
        yield from enumerate(datasets.load_dataset(name, split=split, streaming=streaming), 1)
    except Exception as error:  # the hub's client has many kinds of errors
        raise InputError(
            f"{name} is not a file here, and its split {split!r} could not be read from the Hugging Face hub "
            f"({type(error).__name__}: {_one_line(error)}); check name and connection, or name a file."
        ) from error


def _one_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _normalised(source: _Source, columns: Mapping[str, str]) -> Iterator[Record]:
    """The records with LF line ends, and with mapped columns under the names that the formats know."""
    for line, row in source.records:
        if isinstance(row, BadRow):
            yield line, row
            continue
        if missing := [mapped for mapped in columns.values() if mapped not in row]:
            raise InputError(
                f"{source.name} {source.unit} {line}: there is no column {missing[0]!r} (it has {_column_names(row)}); "
                "mend the mapping of columns."
            )
        yield line, _with_lf({**row, **{name: row[mapped] for name, mapped in columns.items()}})


def _column_names(row: Row) -> str:
    return ", ".join(map(str, row)) or "none"


def _with_lf(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace("\r\n", "\n")
    if isinstance(value, list):
        return [_with_lf(item) for item in value]
    return {name: _with_lf(item) for name, item in value.items()} if isinstance(value, Mapping) else value


def _counted(records: Iterator[Record], report: ReadReport) -> Iterator[Record]:
    for record in records:
        report.rows += 1
        yield record


def _collect(
    source: _Source, outcomes: Iterator[Outcome], on_bad_row: OnBadRow, limit: int | None, report: ReadReport
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


def _skipped(source: _Source, line: int, bad: BadRow, on_bad_row: OnBadRow) -> tuple[str, str]:
    """The place and the reason; raises them if bad rows are errors."""
    where = f"{source.unit} {line}" + (f", pair {bad.part}" if bad.part else "")
    if bad.always == "raise":
        raise InputError(f"{source.name} {where}: {bad.reason}; mend the file there.")
    if bad.always is None and on_bad_row == "error":
        raise InputError(f"{source.name} {where}: {bad.reason}; mend it, or leave such rows out with `--on-bad-row skip`.")
    return where, bad.reason


def _nothing_left(source: _Source, report: ReadReport) -> InputError:
    if not report.rows:
        return InputError(f"{source.name} is empty; name a file with at least one pair.")
    if not report.skipped:
        return InputError(
            f"{source.name} has no pair in its {report.rows} rows: no prompt has two responses with different scores; "
            "use data in which scores differ."
        )
    n, (where, reason) = len(report.skipped), report.skipped[0]
    return InputError(
        f"{source.name} has no usable pair: {n} were left out, the first at {where} ({reason}); mend the file."
    )

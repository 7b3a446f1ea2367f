"""Files of rows: JSONL, JSON, CSV, TSV and Parquet, each read into numbered rows."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rmscope.errors import InputError, one_line
from rmscope.pairs.values import BadRow, Record, Row, Time

FILE_SUFFIX = re.compile(r"\.((jsonl|json|csv|tsv)(\.gz)?|parquet)$", re.IGNORECASE)
_TIMES = ("TIMESTAMP", "DATE", "TIME", "INTERVAL")
"""Kinds of Parquet columns that no pair needs, and that may hold what Python has no value for."""


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
    except RecursionError:
        return BadRow("malformed JSON (nested too deep)")
    except ValueError as error:
        return BadRow(f"malformed JSON ({one_line(error)})")


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
        raise InputError(f"{name} is malformed JSON ({one_line(error)}); write it again.") from error
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
            read_columns = _without_times(table.schema)
            unread = dict.fromkeys(table.schema_arrow.names, Time())
            batches = table.iter_batches(batch_size=1024, columns=read_columns)
            rows = (row for batch in batches for row in batch.to_pylist())
            for read, row in enumerate(rows, 1):
                yield read, {**unread, **row}
    except (pa.ArrowException, UnicodeDecodeError) as error:
        where = f"{name} row {read + 1}" if read else name
        raise InputError(f"{where}: not a whole Parquet file ({one_line(error)}); fetch it again.") from error
    except (OverflowError, ValueError) as error:
        raise InputError(
            f"{name} row {read + 1}: a value that cannot be read ({one_line(error)}); mend the file."
        ) from error


def _without_times(schema: Any) -> list[str]:
    """The paths of the columns that are no dates or times."""
    leaves = [schema.column(i) for i in range(len(schema))]
    return [leaf.path for leaf in leaves if leaf.logical_type.type not in _TIMES and leaf.physical_type != "INT96"]


READERS = {"jsonl": _jsonl, "json": _json, "csv": _csv, "tsv": _csv, "parquet": _parquet}
"""The reader of each kind of file."""

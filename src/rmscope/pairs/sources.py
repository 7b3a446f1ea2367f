"""Where rows come from: files of every kind, folders and patterns of shards, and the Hugging Face hub."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from glob import glob, has_magic
from pathlib import Path
from typing import Literal

from rmscope.errors import InputError, one_line
from rmscope.io import local_path
from rmscope.pairs.tables import FILE_SUFFIX, READERS
from rmscope.pairs.values import Record

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_SPLIT = re.compile(r"(train|test|validation|val|dev)(_[A-Za-z]\w*?)?(?=[-.]|_\d)")
"""A split at the start of a file's name, such as ``train`` or ``train_sft``."""
_SHARD = re.compile(r"(.*?)[-_.]?(\d+)-of-(\d+).*?" + FILE_SUFFIX.pattern, re.IGNORECASE)
"""A shard's name: that of the split, the shard's number, how many there are, and the ending."""


@dataclass
class Source:
    """An opened source: its name for messages, the stem of its ids, the unit in which its rows are counted."""

    name: str
    stem: str
    unit: Literal["line", "row"]
    records: Iterator[Record]
    shards: list[tuple[int, str]] = field(default_factory=list)
    """Of several files: the rows before each, and its name; filled while they are read."""

    def place(self, line: int) -> str:
        """Where a row is: ``line 3``; of several files ``row 3 of train-00001-of-00002.parquet``."""
        before, file = max((s for s in self.shards if s[0] < line), default=(0, ""))
        return f"{self.unit} {line - before}" + (f" of {file}" if file else "")


def open_source(name: str, split: str, revision: str | None, *, streaming: bool) -> Source:
    """A file, a folder or pattern of shards, or a hub dataset.

    Raises:
        InputError: there is nothing of that name, or no file whose rows can be read.
    """
    path = local_path(name)
    suffix = FILE_SUFFIX.search(path.name)
    if revision is not None and (path.exists() or has_magic(name)):
        raise InputError(f"{name} is here, and only hub datasets have revisions; leave --data-revision out.")
    if path.is_dir():
        return _open_several(name, f"{path.resolve().name}-{split}", _shards_of(path, name, split))
    if path.exists():
        return _open_file(path, name)
    if has_magic(name):
        files = [Path(found) for found in sorted(glob(str(path))) if Path(found).is_file()]
        if not files:
            raise InputError(f"No file matches {name}; check the pattern.")
        return _open_several(name, re.sub(r"[*?\[\]]+", "", FILE_SUFFIX.sub("", path.name)).strip("-_.") or "all", files)
    if suffix or not _HUB_ID.fullmatch(name):
        raise InputError(f"{name} does not exist; check the path.")
    records = _hub(name, split, revision, streaming=streaming)
    return Source(name, f"{name.rpartition('/')[2]}-{split}", "row", records)


def _open_file(path: Path, name: str) -> Source:
    if not path.is_file():
        raise InputError(f"{name} is a pipe or a device; write its content to a file, and name that.")
    suffix = FILE_SUFFIX.search(path.name)
    if suffix is None:
        raise InputError(f"{name} has no ending that tells its format; use .jsonl, .json, .csv, .tsv or .parquet.")
    kind = suffix[1].lower().removesuffix(".gz")
    records = _guarded(name, READERS[kind](path, name))
    return Source(name, path.name[: suffix.start()], "line" if kind == "jsonl" else "row", records)


def _open_several(name: str, stem: str, paths: list[Path]) -> Source:
    """Files as one: rows are counted on from file to file, so that ids do not depend on how many shards there are."""
    sources = [_open_file(path, str(path)) for path in paths]
    if len({source.unit for source in sources}) > 1:
        raise InputError(f"{name} has files of several kinds; name a pattern of one kind, such as {name}/*.parquet.")
    joined = Source(name, stem, sources[0].unit, iter(()))

    def records() -> Iterator[Record]:
        before = last = 0
        for path, source in zip(paths, sources, strict=True):
            before = last
            joined.shards.append((before, path.name))
            for line, row in source.records:
                last = before + line
                yield last, row

    joined.records = records()
    return joined


def _shards_of(folder: Path, name: str, split: str) -> list[Path]:
    """The files of a split in a folder, or in its subfolder ``data``: one file, or all shards of one.

    Raises:
        InputError: there are none, a shard is missing, or it is not clear which files are meant.
    """
    files = _data_files(folder) or _data_files(folder / "data")
    if not files:
        raise InputError(f"{name} is a folder without a file of rows; name a file.")
    of_split = [path for path in files if re.match(rf"{re.escape(split)}(?!_?[A-Za-z]|\d)", path.name)]
    if not of_split and (others := {m[0] for p in files if (m := _SPLIT.match(p.name))}):
        raise InputError(f"{name} has no file of the split {split!r}; give --split {min(others)}, or name a file.")
    chosen = of_split or files
    marks = [_SHARD.match(path.name) for path in chosen]
    if len(chosen) == 1 and marks[0] is None:
        return chosen
    groups = {mark.group(1, 3, 4) if mark else (path.name,) for mark, path in zip(marks, chosen, strict=True)}
    if len(groups) > 1:
        some = ", ".join(path.name for path in chosen[:3])
        raise InputError(
            f"{name} is a folder of several files ({some}); name one file in it, or a pattern such as *.parquet."
        )
    numbers, count = {int(mark[2]) for mark in marks if mark}, max(int(mark[3]) for mark in marks if mark)
    if len(numbers) < count:
        raise InputError(
            f"{name} has {len(numbers)} of {count} shards; fetch the others, or name a pattern of those that are to be "
            "read, such as *.parquet."
        )
    return chosen


def _data_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if FILE_SUFFIX.search(p.name) and p.is_file() and not p.name.startswith("."))


def _guarded(name: str, records: Iterator[Record]) -> Iterator[Record]:
    try:
        yield from records
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{name} is not a whole gzip file ({one_line(error)}); fetch or pack it again.") from error
    except OSError as error:
        raise InputError(f"{name} cannot be read ({error.strerror or one_line(error)}); check the file.") from error


def _hub(name: str, split: str, revision: str | None, *, streaming: bool) -> Iterator[Record]:
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"{name} is not a file here, and reading it from the Hugging Face hub needs the package `datasets`; "
            "run `pip install 'rmscope[train]'`, or name a file."
        ) from error
    at = {} if revision is None else {"revision": revision}
    try:
        yield from enumerate(datasets.load_dataset(name, split=split, streaming=streaming, **at), 1)
    except Exception as error:  # the hub's client has many kinds of errors
        raise InputError(
            f"{name} is not a file here, and its split {split!r} could not be read from the Hugging Face hub "
            f"({type(error).__name__}: {one_line(error)}); check name and connection, or name a file."
        ) from error

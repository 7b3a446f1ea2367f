"""Writing so that a reader never sees half a file, and naming content by its hash."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import polars as pl
import pyarrow.parquet as pq

from rmscope.errors import InputError, one_line


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; on success it is fsynced and renamed over it, on failure removed.

    A full disk is an :class:`InputError`, and what stood at ``path`` before still stands there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise _readable(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    """The process's umask, which temporary files do not follow by themselves."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def local_path(name: str | Path) -> Path:
    """The path that a name stands for here, whether or not something is there; ``~`` is the home folder.

    Raises:
        InputError: the name is empty, or the system takes no such path.
    """
    shown = str(name) if len(str(name)) <= 80 else f"{str(name)[:60]}…"
    if not str(name).strip():
        raise InputError("A name is empty where a file, a folder or a hub id is asked for; give one.")
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:  # too long, or the home of nobody
        reason = getattr(error, "strerror", None) or one_line(error)
        raise InputError(f"{shown} is no path that can be opened ({reason}); check the path.") from error
    return path


def check_writable(path: Path) -> None:
    """InputError where nothing can be written at ``path``: a folder above it is a file, or may not be written.

    Call it before any work.
    """
    path = Path(path)
    try:
        nearest = next((p for p in (path, *path.parents) if p.exists() or p.is_symlink()), Path())
    except (OSError, ValueError) as error:
        raise InputError(f"{path!s:.60} is no path that can be written ({error.args[-1]}); name another place.") from error
    if nearest != path and not nearest.is_dir():
        raise InputError(f"{path} cannot be written, because {nearest} is no folder; name another place.")
    if not os.access(nearest, os.W_OK):
        raise InputError(f"{path} cannot be written, because {nearest} may not be changed; name another place.")


def check_replaceable(path: Path, mark: str) -> None:
    """InputError where writing a folder to ``path`` would destroy something else than a folder of the same kind.

    A folder of the kind holds the file ``mark``. Call it before any work.
    """
    path = Path(path)
    if not path.exists() and not path.is_symlink():
        return
    if Path.cwd().is_relative_to(path.resolve()):
        raise InputError(f"{path} is the current folder or holds it, so it cannot be replaced; name a folder of its own.")
    if path.is_symlink() or not path.is_dir():
        raise InputError(f"{path} is no folder, and it is not overwritten; name another one.")
    if any(path.iterdir()) and not (path / mark).is_file():
        raise InputError(
            f"{path} holds files of another kind (there is no {mark} among them), and they are not overwritten; name "
            "another folder, or an empty one."
        )


@contextmanager
def atomic_folder(path: Path, mark: str) -> Iterator[Path]:
    """The same for a folder: it is filled under a temporary name and appears at ``path`` whole or not at all.

    It replaces only what :func:`check_replaceable` allows. The old folder is moved aside before the new one takes its place.
    """
    path = Path(path)
    check_replaceable(path, mark)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")) for _ in range(2))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        check_replaceable(path, mark)  # it may have been filled while this took its time
        if path.exists():
            os.replace(path, old)
        try:
            os.replace(temporary, path)
        except OSError:
            if any(old.iterdir()):
                os.replace(old, path)
            raise
    except OSError as error:
        raise _readable(error, path) from error
    finally:
        for folder in (temporary, old):
            shutil.rmtree(folder, ignore_errors=True)


def _readable(error: OSError, path: Path) -> Exception:
    if error.errno == errno.ENOSPC:
        return InputError(
            f"The disk is full: {path} could not be written; free some space and run the same command "
            "again, it goes on where it stopped."
        )
    if error.errno in (errno.EACCES, errno.EROFS):
        return InputError(f"{path} cannot be written ({error.strerror}); choose another output folder.")
    return error


def write_text(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_table(path: Path, table: pl.DataFrame) -> None:
    """Parquet, zstd: the same rows give the same bytes."""
    with atomic(path) as temporary:
        table.write_parquet(temporary, compression="zstd", statistics=False)


def join_tables(path: Path, parts: Sequence[Path]) -> None:
    """One Parquet file from many of the same columns, a row group each: only one of them is in memory at a time."""
    with atomic(path) as temporary, ExitStack() as stack:
        writer: pq.ParquetWriter | None = None
        for part in parts:
            table = pl.read_parquet(part).to_arrow()
            if writer is None:
                writer = stack.enter_context(
                    pq.ParquetWriter(temporary, table.schema, compression="zstd", write_statistics=False)
                )
            writer.write_table(table)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with Path(path).open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def content_hash(*parts: Any) -> str:
    """First 16 hex digits of sha256 over the parts, each as canonical JSON (bytes as they are)."""
    digest = hashlib.sha256()
    for part in parts:
        raw = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True, default=str).encode()
        digest.update(len(raw).to_bytes(8, "big"))
        digest.update(raw)
    return digest.hexdigest()[:16]


Progress = Callable[[int, int, str], None]
"""Called by long work as ``progress(done, total, note)``; library code reports, the caller shows."""


def silent(done: int, total: int, note: str = "") -> None:
    """The default progress: nothing prints from library code."""


class Display(Protocol):
    """What shows the progress of long work: the command line draws bars, notebooks and tests may stay silent."""

    def stage(self, name: str) -> AbstractContextManager[Progress]: ...

    def note(self, text: str) -> None: ...


class NoDisplay:
    """Shows nothing."""

    @contextmanager
    def stage(self, name: str) -> Iterator[Progress]:
        yield silent

    def note(self, text: str) -> None:
        return

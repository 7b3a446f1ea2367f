"""The run folder on disk: what is done, and tables that are made unit by unit.

Each stage has a key, the hash of its settings and of the stage before it. ``run.yaml`` keeps the keys of what is done. Long
stages work in units of 64 pairs and keep each unit's tables until the stage is whole, so a killed run resumes and ends with
the same bytes. ``run.yaml`` also keeps its own checksum and that of every file that a stage left: a damaged file is named,
and its stage is done again. One process at a time works on a folder.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any

import polars as pl
import torch.distributed as dist
from filelock import FileLock, Timeout

from rmscope.errors import InputError
from rmscope.io import (
    Display,
    Progress,
    check_writable,
    content_hash,
    join_tables,
    sha256,
    silent,
    write_json,
    write_table,
)
from rmscope.model.packing import units
from rmscope.ranks import ALONE
from rmscope.run.settings import RECORD, read_record, write_record

FORMAT = 13
"""Raised when a stage computes something else from the same settings."""

LOCK, OWNER, PARTS = ".lock", ".owner.json", ".parts"
OF_STAGES = (
    *("preflight.json", "scores.parquet", "baseline.json", "concepts.parquet", "evidence/evidence.json"),
    *("evidence/examples.*.parquet", "evidence/planted.json", "evidence/tokens.parquet", "evidence/vocabulary.parquet"),
    "activations/*/manifest.json",
    *("saes", "effects", "concepts", "features", "ledger"),
)
"""Files and folders, as patterns, that stages alone write. Their files have checksums in ``run.yaml``; shards have theirs in
manifests."""

OF_STUDIES = (f"{PARTS}/jailbreak-*", f"{PARTS}/compare-*", "effects/*/explained.json")
"""What studies write in the same places."""
LATE = 300
"""Seconds after which a file of another process counts as missing."""

Make = Callable[[list[int], Progress], dict[str, pl.DataFrame]]
"""Makes the tables of some items."""


class RunFolder:
    """A run folder. Raises :class:`InputError` where the path is a file, or a folder of something else."""

    def __init__(self, path: Path, display: Display) -> None:
        self.path, self.display = path, display
        self.record: dict[str, Any] = self._read()
        self.ranks = ALONE
        """The processes that work on the folder together."""
        self._last_key = ""
        self._sound: set[Path] = set()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the folder while it is written, and reads its record. InputError where another process holds it; a dead one
        does not. Of several ranks the first holds it."""
        if not self.ranks.is_first:
            self.ranks.wait()
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / LOCK, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise InputError(
                f"Another process works on {self.path}{self._owner()}; wait until it is done, or name another --out."
            ) from None
        try:
            write_json(self.path / OWNER, {"pid": os.getpid(), "host": socket.gethostname()})
            self._sweep()
            self.record = self._read()
            self.ranks.wait()
            yield
        finally:
            (self.path / OWNER).unlink(missing_ok=True)
            lock.release()

    def _sweep(self) -> None:
        """Deletes what killed writes of stages left: while the folder is held, no other process does a stage. Studies do not
        hold it, so their files stay."""
        own = [Path(pattern).parts for pattern in (*OF_STAGES, "activations/*/shard-*", PARTS, RECORD, "report.html")]
        others = [Path(pattern).parts for pattern in OF_STUDIES]
        for left in self.path.rglob(".*.tmp"):
            place = (*left.relative_to(self.path).parent.parts, left.name[1:].rpartition(".")[0].rpartition(".")[0])
            if _is_under(place, own) and not _is_under(place, others):
                shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)

    def _owner(self) -> str:
        try:
            owner = json.loads((self.path / OWNER).read_text("utf-8"))
            return f" (process {owner['pid']} on {owner['host']})"
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    def _read(self) -> dict[str, Any]:
        if (self.path / RECORD).is_file():
            return read_record(self.path)
        check_writable(self.path)
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is a file; name a folder for the run.")
        if self.path.is_dir() and any(p for p in self.path.iterdir() if not p.name.startswith(".")):
            raise InputError(f"{self.path} is not empty and no run folder (it holds no {RECORD}); name another folder.")
        return {}

    def open(self, identity: dict[str, str], config: dict[str, Any], sites: Sequence[str]) -> None:
        """Refuses a folder of another model or dataset; writes the identities, the resolved settings and the sites."""
        for what, value in identity.items():
            before = self.record.get("identity", {}).get(what, value)
            if before != value:
                raise InputError(
                    f"{self.path} belongs to another {what} ({before}, not {value}); name another --out, or delete it."
                )
        packages = ("rmscope", "torch", "transformers", "polars", "safetensors")
        self.record |= {
            "identity": identity,
            "config": config,
            "sites": list(sites),
            "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
        }
        self.record.setdefault("stages", {})
        self._last_key = content_hash(identity)
        self._write()
        self.ranks.wait()
        if not self.ranks.is_first:
            self.record = self._read()

    def _write(self) -> None:
        if self.ranks.is_first:
            write_record(self.path, self.record)

    @property
    def seconds(self) -> float:
        """What the stages took, all together."""
        return sum(stage["seconds"] for stage in self.record.get("stages", {}).values())

    def sites_of(self, settings: Mapping[str, Any]) -> list[str] | None:
        """The sites that these settings gave before; None where they were others, or there was no run yet."""
        before = self.record.get("config", {})
        same = all(before.get(name) == value for name, value in settings.items())
        return self.record.get("sites") if same else None

    @property
    def keys(self) -> dict[str, str]:
        """The key of each stage that is done: it changes with all that the stage depends on."""
        return {name: stage["key"] for name, stage in self.record.get("stages", {}).items()}

    def stage(
        self, name: str, settings: Any, outputs: Sequence[str], work: Callable[[Progress, str], None], shared: bool = False
    ) -> None:
        """Does a stage unless it is done with the same settings and its files are there.

        Of several ranks all do a ``shared`` stage, whose units are dealt out, and the first one any other.
        """
        key = content_hash(FORMAT, name, settings, self._last_key)
        self._last_key = key
        self.ranks.wait()
        if not self.ranks.is_first:
            self._follow(key, work if shared else None)
            return
        done = self.record["stages"].get(name, {})
        if done.get("key") == key and all((self.path / p).exists() for p in outputs):
            damaged = [file for file in done.get("files", ()) if not self.is_sound(file)]
            if not damaged:
                self.display.note(f"{name}: done before")
                self._tell(False)
                return
            self.display.note(f"{name}: done again, since {damaged[0]} is missing or damaged")
            for file in done["files"]:  # nothing of the stage is taken for done
                (self.path / file).unlink(missing_ok=True)
        if self.record["stages"].pop(name, None):  # its files change from here on: until it is whole, it is not done
            self._write()
        self._tell(True)
        started, before = time.time(), self._stamps()
        with self.display.stage(name) as progress, self._alone(not shared):
            work(progress, key)
        self.ranks.wait()
        left = sorted(file for file, stamp in self._stamps().items() if before.get(file) != stamp)
        self.record.setdefault("files", {}).update({file: sha256(self.path / file) for file in left})
        self.record["stages"][name] = {"key": key, "seconds": round(time.time() - started, 1), "files": left}
        self._sound.clear()
        self._write()
        self.ranks.wait()

    @contextmanager
    def _alone(self, is_alone: bool) -> Iterator[None]:
        """Within the context, the first rank waits for no other."""
        together = self.ranks
        self.ranks = ALONE if is_alone else together
        try:
            yield
        finally:
            self.ranks = together

    def _tell(self, is_done_now: bool) -> None:
        """The other ranks learn whether the first one does the stage."""
        if self.ranks.count > 1:
            dist.broadcast_object_list([is_done_now], src=0)

    def _follow(self, key: str, work: Callable[[Progress, str], None] | None) -> None:
        """A stage as the other ranks see it."""
        told = [False]
        dist.broadcast_object_list(told, src=0)
        if told[0]:
            if work is not None:
                work(silent, key)
            self.ranks.wait()
            self.ranks.wait()
        self._sound.clear()
        self.record = self._read()

    def _stamps(self) -> dict[str, tuple[int, int, int]]:
        """What tells that a file of a stage was written anew, by file."""
        stamps = {}
        for top in (top for pattern in OF_STAGES for top in self.path.glob(pattern)):
            for path in top.rglob("*") if top.is_dir() else [top]:
                if path.is_file() and not path.name.startswith("."):
                    stat = path.stat()
                    stamps[path.relative_to(self.path).as_posix()] = stat.st_mtime_ns, stat.st_size, stat.st_ino
        return stamps

    def is_sound(self, file: str) -> bool:
        """Whether a file is there and holds what its stage wrote; one without a checksum counts as sound."""
        path, known = self.path / file, self.record.get("files", {}).get(file)
        if path in self._sound or known is None:
            return path.is_file()
        if path.is_file() and sha256(path) == known:
            self._sound.add(path)
            return True
        return False

    def checksum(self, file: str) -> str:
        """The checksum that the record keeps of a file; without a record, that of the file as it is."""
        return self.record.get("files", {}).get(file) or sha256(self.path / file)

    def in_units(self, name: str, key: str, items: Sequence[int], progress: Progress, make: Make) -> dict[str, pl.DataFrame]:
        """``make`` for each unit of 64 items; the tables of finished units outlive a kill."""
        parts = self._parts(name, key, items, progress, make)
        return {table: pl.concat([pl.read_parquet(p) for p in paths]) for table, paths in parts.items()}

    def stream_units(
        self, name: str, key: str, items: Sequence[int], progress: Progress, make: Make, target: Callable[[str], Path]
    ) -> None:
        """The same, each table written to ``target(name)`` unit after unit: memory does not grow with the items."""
        for table, paths in self._parts(name, key, items, progress, make).items():
            join_tables(target(table), paths)

    def _parts(self, name: str, key: str, items: Sequence[int], progress: Progress, make: Make) -> dict[str, list[Path]]:
        """The files of each table, one per unit, in order."""
        folder, files = self.part_folder(name, key), dict[str, list[Path]]()
        for number, unit in enumerate(units(len(items))):
            marker = folder / f"{number:05d}.json"
            if self.ranks.has(number) and not marker.is_file():
                done = unit.start

                def within(d: int, t: int, note: str = "", done: int = done, size: int = len(unit)) -> None:
                    progress(done + round(size * d / max(t, 1)), len(items), note)

                made = make([items[i] for i in unit], within)
                for site, table in made.items():
                    write_table(folder / site / f"{number:05d}.parquet", table)
                write_json(marker, sorted(made))
            progress(unit.stop, len(items), "")
        self.ranks.wait()
        for number in range(len(units(len(items)))):
            marker = self._arrived(folder / f"{number:05d}.json")
            for table in json.loads(marker.read_text("utf-8")):
                files.setdefault(table, []).append(self._arrived(folder / table / f"{number:05d}.parquet"))
        return files

    def _arrived(self, path: Path) -> Path:
        """The path of a file that some rank wrote; a file system of several machines may show it late."""
        began = time.monotonic()
        while self.ranks.count > 1 and not path.is_file():
            if time.monotonic() > began + LATE:
                raise InputError(
                    f"{path}, which another process wrote, is not to be seen here; is the folder shared by all?"
                )
            time.sleep(0.2)
        return path

    def keep_json(self, name: str, key: str, part: str, make: Callable[[], Any]) -> Any:
        """What ``make`` gives (JSON-able), kept until the parts are dropped, so that it outlives a kill."""
        path = self.part_folder(name, key) / f"{part}.json"
        if not path.is_file():
            write_json(path, make())
        return json.loads(path.read_text("utf-8"))

    def part_folder(self, name: str, key: str) -> Path:
        """Where the parts of a stage are kept until it is whole."""
        return self.path / PARTS / f"{name}-{key}"

    def drop_parts(self, name: str, key: str) -> None:
        """Deletes what was kept, once every rank has read it."""
        self.ranks.wait()
        if not self.ranks.is_first:
            return
        shutil.rmtree(self.part_folder(name, key), ignore_errors=True)
        if (parts := self.path / PARTS).is_dir() and not any(parts.iterdir()):
            parts.rmdir()


def _is_under(place: Sequence[str], patterns: Sequence[Sequence[str]]) -> bool:
    """Whether a path, in parts, is one of the patterns or lies in a folder of theirs."""
    return any(all(fnmatch(part, wanted) for part, wanted in zip(place, p, strict=False)) for p in patterns)

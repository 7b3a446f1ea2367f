"""The run folder: what is done, and tables that are made unit by unit.

Each stage has a key, the hash of its settings and of the stage before it; ``run.yaml`` keeps the keys of what is done.
Long stages work in units of 64 pairs and keep each unit's tables until the stage is whole, so a killed run goes on where
it was and ends with the same bytes.
"""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import polars as pl
import yaml

from rmscope.errors import InputError
from rmscope.io import Progress, content_hash, join_tables, silent, write_json, write_table, write_text
from rmscope.model.packing import units

FORMAT = 3
"""Bumped when a stage computes something else from the same settings."""


class Display(Protocol):
    """What the pipeline tells whoever watches; the command line draws bars, tests and notebooks may stay silent."""

    def stage(self, name: str) -> AbstractContextManager[Progress]: ...

    def note(self, text: str) -> None: ...


class NoDisplay:
    """Shows nothing."""

    @contextmanager
    def stage(self, name: str) -> Iterator[Progress]:
        yield silent

    def note(self, text: str) -> None:
        return


class RunFolder:
    """A run folder on disk. Raises :class:`InputError` where the path is a file, or a folder of something else."""

    def __init__(self, path: Path, shown: Display) -> None:
        self.path, self.shown = path, shown
        self.record: dict[str, Any] = self._read()
        self._last_key = ""

    def _read(self) -> dict[str, Any]:
        path = self.path / "run.yaml"
        if path.is_file():
            return dict(yaml.safe_load(path.read_text("utf-8")))
        if self.path.is_file():
            raise InputError(f"{self.path} is a file; name a folder for the run.")
        if self.path.is_dir() and any(p for p in self.path.iterdir() if not p.name.startswith(".")):
            raise InputError(f"{self.path} is not empty and no run folder (it holds no run.yaml); name another folder.")
        return {}

    def open(self, identity: dict[str, str], config: dict[str, Any]) -> None:
        """Refuses a folder of another model or dataset; writes the identities and the resolved settings."""
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
            "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
        }
        self.record.setdefault("stages", {})
        self._last_key = content_hash(identity)
        self._write()

    def _write(self) -> None:
        write_text(self.path / "run.yaml", yaml.safe_dump(self.record, sort_keys=False, allow_unicode=True))

    def stage(self, name: str, settings: Any, outputs: Sequence[Path], work: Callable[[Progress, str], None]) -> None:
        """Does a stage unless it is done with the same settings and its files are there."""
        key = content_hash(FORMAT, name, settings, self._last_key)
        self._last_key = key
        done = self.record["stages"].get(name, {})
        if done.get("key") == key and all((self.path / p).exists() for p in outputs):
            self.shown.note(f"{name}: done before")
            return
        if self.record["stages"].pop(name, None):  # its files change from here on: until it is whole, it is not done
            self._write()
        started = time.time()
        with self.shown.stage(name) as progress:
            work(progress, key)
        self.record["stages"][name] = {"key": key, "seconds": round(time.time() - started, 1)}
        self._write()

    def in_units(
        self,
        name: str,
        key: str,
        items: Sequence[int],
        progress: Progress,
        make: Callable[[list[int], Progress], dict[str, pl.DataFrame]],
    ) -> dict[str, pl.DataFrame]:
        """``make`` for each unit of 64 items; the tables of finished units outlive a kill."""
        parts = self._parts(name, key, items, progress, make)
        return {table: pl.concat([pl.read_parquet(p) for p in paths]) for table, paths in parts.items()}

    def stream_units(
        self,
        name: str,
        key: str,
        items: Sequence[int],
        progress: Progress,
        make: Callable[[list[int], Progress], dict[str, pl.DataFrame]],
        target: Callable[[str], Path],
    ) -> None:
        """The same, each table written to ``target(name)`` unit after unit: memory does not grow with the items."""
        for table, paths in self._parts(name, key, items, progress, make).items():
            join_tables(target(table), paths)

    def _parts(
        self,
        name: str,
        key: str,
        items: Sequence[int],
        progress: Progress,
        make: Callable[[list[int], Progress], dict[str, pl.DataFrame]],
    ) -> dict[str, list[Path]]:
        """The files of each table, a unit each, in order."""
        folder = self.path / ".parts" / f"{name}-{key}"
        names: list[str] = []
        for number, unit in enumerate(units(len(items))):
            marker = folder / f"{number:05d}.json"
            if not marker.is_file():
                done = unit.start

                def within(d: int, t: int, note: str = "", done: int = done, size: int = len(unit)) -> None:
                    progress(done + round(size * d / max(t, 1)), len(items), note)

                made = make([items[i] for i in unit], within)
                for site, table in made.items():
                    write_table(folder / site / f"{number:05d}.parquet", table)
                write_json(marker, sorted(made))
            names = yaml.safe_load(marker.read_text())
            progress(unit.stop, len(items), "")
        return {table: sorted((folder / table).glob("*.parquet")) for table in names}

    def drop_parts(self, name: str, key: str) -> None:
        shutil.rmtree(self.path / ".parts" / f"{name}-{key}", ignore_errors=True)
        if (parts := self.path / ".parts").is_dir() and not any(parts.iterdir()):
            parts.rmdir()

"""The run folder on disk: what is done, and tables that are made unit by unit.

Each stage has a key, the hash of its settings and of the stage before it. ``run.yaml`` keeps the keys of what is done. Long
stages work in units of 64 pairs and keep each unit's tables until the stage is whole, so a killed run resumes and ends with
the same bytes.
"""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from rmscope.errors import InputError
from rmscope.io import Display, Progress, content_hash, join_tables, write_json, write_table, write_text
from rmscope.model.packing import units
from rmscope.run.settings import RECORD, read_record

FORMAT = 6
"""Raised when a stage computes something else from the same settings."""

Make = Callable[[list[int], Progress], dict[str, pl.DataFrame]]
"""Makes the tables of some items."""


class RunFolder:
    """A run folder. Raises :class:`InputError` where the path is a file, or a folder of something else."""

    def __init__(self, path: Path, display: Display) -> None:
        self.path, self.display = path, display
        self.record: dict[str, Any] = self._read()
        self._last_key = ""

    def _read(self) -> dict[str, Any]:
        if (self.path / RECORD).is_file():
            return read_record(self.path)
        if self.path.is_file():
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

    def _write(self) -> None:
        write_text(self.path / RECORD, yaml.safe_dump(self.record, sort_keys=False, allow_unicode=True))

    @property
    def seconds(self) -> float:
        """What the stages took, all together."""
        return sum(stage["seconds"] for stage in self.record.get("stages", {}).values())

    def sites_of(self, sites: Sequence[str] | None, study: str) -> list[str] | None:
        """The sites that these settings gave before; None where they were others, or there was no run yet."""
        before = self.record.get("config", {})
        return self.record.get("sites") if (before.get("sites"), before.get("study")) == (sites, study) else None

    @property
    def keys(self) -> dict[str, str]:
        """The key of each stage that is done: it changes with all that the stage depends on."""
        return {name: stage["key"] for name, stage in self.record.get("stages", {}).items()}

    def stage(self, name: str, settings: Any, outputs: Sequence[str], work: Callable[[Progress, str], None]) -> None:
        """Does a stage unless it is done with the same settings and its files are there."""
        key = content_hash(FORMAT, name, settings, self._last_key)
        self._last_key = key
        done = self.record["stages"].get(name, {})
        if done.get("key") == key and all((self.path / p).exists() for p in outputs):
            self.display.note(f"{name}: done before")
            return
        if self.record["stages"].pop(name, None):  # its files change from here on: until it is whole, it is not done
            self._write()
        started = time.time()
        with self.display.stage(name) as progress:
            work(progress, key)
        self.record["stages"][name] = {"key": key, "seconds": round(time.time() - started, 1)}
        self._write()

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
        folder = self._part_folder(name, key)
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
            names = json.loads(marker.read_text("utf-8"))
            progress(unit.stop, len(items), "")
        return {table: sorted((folder / table).glob("*.parquet")) for table in names}

    def keep_json(self, name: str, key: str, part: str, make: Callable[[], Any]) -> Any:
        """What ``make`` gives (JSON-able), kept until the parts are dropped, so that it outlives a kill."""
        path = self._part_folder(name, key) / f"{part}.json"
        if not path.is_file():
            write_json(path, make())
        return json.loads(path.read_text("utf-8"))

    def _part_folder(self, name: str, key: str) -> Path:
        return self.path / ".parts" / f"{name}-{key}"

    def drop_parts(self, name: str, key: str) -> None:
        shutil.rmtree(self._part_folder(name, key), ignore_errors=True)
        if (parts := self.path / ".parts").is_dir() and not any(parts.iterdir()):
            parts.rmdir()

"""Names, stars and notes that people give to concepts, and names that a language model gives: ``labels.sqlite`` in the run
folder.

A label belongs to the features of a concept in the SAE at its site, not to the concept's number. When a run is made again,
no label moves to another concept; when its SAEs are trained again, labels of the former ones stay in the file and are not
shown.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmscope.errors import InputError

FILE = "labels.sqlite"
NAME_LENGTH, NOTE_LENGTH = 120, 4000
TABLE = """CREATE TABLE IF NOT EXISTS labels (
    concept TEXT PRIMARY KEY, name TEXT NOT NULL, star INTEGER NOT NULL, note TEXT NOT NULL, changed TEXT NOT NULL
)"""
NAMES = """CREATE TABLE IF NOT EXISTS names (
    concept TEXT NOT NULL, origin TEXT NOT NULL, record TEXT NOT NULL, made TEXT NOT NULL, PRIMARY KEY (concept, origin)
)"""
WRITE = """INSERT INTO labels VALUES (?, ?, ?, ?, ?) ON CONFLICT (concept) DO UPDATE SET
    name = excluded.name, star = excluded.star, note = excluded.note, changed = excluded.changed"""


@dataclass(frozen=True, slots=True)
class Label:
    """What people gave a concept; an empty name leaves rmscope's own."""

    name: str = ""
    star: bool = False
    note: str = ""
    changed: str = ""
    """The day of the last change."""


def key_of(concept: Mapping[str, Any], saes: Mapping[str, str]) -> str:
    """The concept by its site, the SAE there (``saes`` identifies that of each site) and its features."""
    site = concept["site"]
    return hashlib.sha256(json.dumps([site, saes[site], sorted(concept["features"])]).encode()).hexdigest()[:24]


class Labels:
    """The labels of one run, whose SAEs ``saes`` identifies by site. Each call opens the file anew, so that several
    processes can share it."""

    def __init__(self, folder: Path, saes: Mapping[str, str]) -> None:
        self.path, self.saes = folder / FILE, saes

    @contextmanager
    def _connect(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self.path, timeout=5.0)) as connection, connection:
                yield connection
        except sqlite3.Error as error:
            raise InputError(f"{self.path} cannot be used ({error}); check that the folder is writable.") from error

    def of(self, concepts: Iterable[Mapping[str, Any]]) -> list[Label]:
        """The label of each concept; one without a label has an empty one."""
        labels = self._all()
        return [labels.get(key_of(concept, self.saes), Label()) for concept in concepts]

    def _all(self) -> dict[str, Label]:
        """Every label, by the concept's key."""
        if not self.path.is_file():
            return {}
        with self._connect() as connection:
            connection.execute(TABLE)
            rows = connection.execute("SELECT concept, name, star, note, changed FROM labels").fetchall()
        return {key: Label(name, bool(star), note, changed) for key, name, star, note, changed in rows}

    def write(self, concept: Mapping[str, Any], name: str, star: bool, note: str) -> Label:
        """Keeps a label. Raises InputError where a text is too long, or the file cannot be written."""
        name, note = " ".join(name.replace("\0", "").split()), note.replace("\0", "").strip()
        for what, text, most in (("name", name, NAME_LENGTH), ("note", note, NOTE_LENGTH)):
            if len(text) > most:
                raise InputError(f"The {what} has {len(text)} characters; at most {most} are kept.")
        label = Label(name, star, note, datetime.date.today().isoformat())
        with self._connect() as connection:
            connection.execute(TABLE)
            connection.execute(WRITE, (key_of(concept, self.saes), name, star, note, label.changed))
        return label

    def names(self, concepts: Iterable[Mapping[str, Any]], origin: str | None = None) -> list[dict[str, Any] | None]:
        """The last name that a language model gave to each concept, or None; of ``origin`` alone where it is given. A name
        is a record of :class:`rmscope.studies.label.result.ConceptName`."""
        found: dict[str, str] = {}
        if self.path.is_file():
            with self._connect() as connection:
                connection.execute(NAMES)
                rows = connection.execute("SELECT concept, origin, record FROM names ORDER BY made, rowid").fetchall()
            found = {key: record for key, of, record in rows if origin in (None, of)}
        keys = [key_of(concept, self.saes) for concept in concepts]
        return [json.loads(found[key]) if key in found else None for key in keys]

    def write_name(self, concept: Mapping[str, Any], origin: str, record: Mapping[str, Any]) -> None:
        """Keeps a name of a language model; an earlier one of the same ``origin``, a hash of what asked for it, goes."""
        made = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        with self._connect() as connection:
            connection.execute(NAMES)
            row = (key_of(concept, self.saes), origin, json.dumps(record), made)
            connection.execute("INSERT OR REPLACE INTO names VALUES (?, ?, ?, ?)", row)

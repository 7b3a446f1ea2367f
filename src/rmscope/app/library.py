"""The runs that the app shows: found once, opened on first use, and opened again when they are made anew."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import polars as pl

from rmscope.activations.harvest import data_identity
from rmscope.errors import InputError
from rmscope.pairs.pair import Pair
from rmscope.ranking.concepts import members_in
from rmscope.report.page import concept_group, is_reported
from rmscope.run.evidence import Context
from rmscope.run.examples import Examples, by_size, contexts_of
from rmscope.run.firings import SiteFirings
from rmscope.run.measure import OWN
from rmscope.run.run import Run
from rmscope.run.settings import RECORD, read_record
from rmscope.sae import Sae
from rmscope.studies.label.names import named

Concept = dict[str, Any]
"""A row of ``run.concepts`` with its examples, ``group``, ``tokens``, ``label`` (:class:`~rmscope.run.labels.Label`),
``names`` (:class:`~rmscope.studies.label.names.Name`), and ``title``, the name that is shown."""
PAIRS = 8
"""Pairs that are shown when more are asked for."""
GROUPS = {
    "content": "Content",
    "form": "Form: endings, punctuation and position",
    "nonspecific": "Not specific: they move unrelated completions of the same prompts too",
    "any_direction": "The tokens matter, the direction does not",
    "others": "Not significant; nothing is claimed about them",
}


def group_of(concept: Concept) -> str:
    """The group in which a concept is listed, one of :data:`GROUPS`."""
    if is_reported(concept):
        return concept_group(concept)
    return "any_direction" if "direction" in concept["flags"] else "others"


@dataclass(frozen=True, slots=True)
class ScoredPair:
    """A pair with the rewards of its sides."""

    pair: Pair
    chosen: float
    rejected: float
    split: str

    @property
    def delta(self) -> float:
        return self.chosen - self.rejected


class OpenRun:
    """A finished run. Raises InputError where it is not finished."""

    def __init__(self, folder: Path, trust_remote_code: bool = False) -> None:
        self.folder, self.trust_remote_code = folder, trust_remote_code
        self.run = Run.open(folder, trust_remote_code=trust_remote_code)
        self.data = self.run.evidence.model_dump(mode="json")
        self.labels = self.run.labels
        self._reading = Lock()
        stored = {c["concept"]: c for c in self.data["concepts"]}
        self.rows: list[Concept] = [{**stored.get(row["concept"], {}), **row} for row in self.run.concepts.to_dicts()]
        for row in self.rows:
            row["group"] = group_of(row)
            row["tokens"] = [t for m in self.members(row) for t, _ in m.get("tokens") or []]

    @cached_property
    def features(self) -> dict[tuple[str, int], dict[str, Any]]:
        """Every frozen feature, by site and number; those that the report shows have the tokens they fire on."""
        table: dict[tuple[str, int], dict[str, Any]] = {}
        for site in self.run.sites:
            table |= {(site, row["feature"]): row for row in self.run.features(site).to_dicts()}
        for site in self.data["sites"]:
            for feature in site["features"]:
                table.setdefault((site["site"], feature["feature"]), {}).update(feature)
        return table

    @cached_property
    def saes(self) -> dict[str, Sae]:
        """The SAE of every site; no PM is loaded."""
        return {site: self.run.sae(site) for site in self.run.sites}

    @cached_property
    def texts(self) -> dict[int, str]:
        """The text of every stored token."""
        return self.run.token_texts

    @cached_property
    def vocabulary(self) -> pl.DataFrame:
        """What frozen features write in words of the base."""
        return self.run.vocabulary

    def firings(self, site: str) -> SiteFirings:
        """Where the features of a site fire. The first call reads all stored tokens of the site."""
        with self._reading:
            return self.run.firings(site)

    def has_firings(self, site: str) -> bool:
        """Whether the stored tokens of a site were read."""
        return self.run.has_firings(site)

    def members(self, concept: Concept) -> list[dict[str, Any]]:
        """The features of a concept at all of its sites, each with its row where it was frozen."""
        at = [(site, j) for site, features in members_in(concept).items() for j in features]
        return [{**self.features.get(place, {}), "site": place[0], "feature": place[1]} for place in at]

    def concepts(self) -> list[Concept]:
        """All concepts with the labels that they have now."""
        labels, records = self.labels.of(self.rows), self.labels.names(self.rows)
        concepts = []
        for row, label, record in zip(self.rows, labels, records, strict=True):
            names = named(row, label, record)
            concepts.append({**row, "label": label, "title": names.title.text, "names": names.names})
        return concepts

    def concept(self, number: int) -> Concept | None:
        """The concept of that number."""
        return next((c for c in self.concepts() if c["concept"] == number), None)

    def effects(self, number: int) -> dict[str, list[float]]:
        """The joint effects of a concept on fresh responses in which it fires, by side: of the measure split, where it was
        measured, else of the confirm split."""
        measured = self.run.measured_effects.filter((pl.col("concept") == number) & (pl.col("kind") == OWN))
        own = measured if measured.height else self.run.joint_effects().filter(pl.col("feature") == number)
        return {side: own.filter(pl.col("side") == side)["effect"].to_list() for side in ("chosen", "rejected")}

    @cached_property
    def pairs(self) -> dict[str, ScoredPair]:
        """Every scored pair by its id, in the data's order. InputError where the data are no longer those of the run."""
        known = {pair.id: pair for pair in self.run.inputs.all_pairs}
        rows = self.run.scores.select("pair", "chosen", "rejected", "split").rows()
        pairs = [known[row[0]] for row in rows if row[0] in known]
        if data_identity(pairs) != self.run.on_disk.record["identity"]["data"]:
            raise InputError(f"{self.run.config.data} has changed since the run was made, so its pairs cannot be shown.")
        return {pair.id: ScoredPair(pair, *row[1:]) for pair, row in zip(pairs, rows, strict=True)}

    def open_again(self) -> Run:
        """The run once more, to load its PM on: when that run is dropped, the PM's memory is free."""
        return Run.open(self.folder, trust_remote_code=self.trust_remote_code)

    def pairs_that_move(self, concept: Concept, loaded: Run, most: int = PAIRS) -> list[Context]:
        """The confirm pairs whose Δr moves most when a concept is ablated, with its activations, by the PM of ``loaded``."""
        own = by_size(self.run.joint_effects().filter(pl.col("feature") == concept["concept"]))
        moved = own.sort((pl.col("chosen") - pl.col("rejected")).abs(), "pair", descending=[True, False]).head(most)
        weights = {concept["concept"]: dict(zip(concept["features"], concept["weights"], strict=True))}
        return contexts_of(loaded, [Examples(concept["site"], moved, weights)])[0]


@dataclass(frozen=True, slots=True)
class Entry:
    """A run in the list."""

    slug: str
    """Its name in addresses."""
    folder: Path
    model: str
    data: str

    @property
    def is_finished(self) -> bool:
        return (self.folder / "evidence" / "evidence.json").is_file()


class Library:
    """The run in a folder, or those in its folders. InputError where there is none.

    Addresses hold slugs, which are looked up here: no part of a request becomes a path.
    """

    def __init__(self, folder: Path, trust_remote_code: bool = False) -> None:
        if not folder.is_dir():
            raise InputError(f"{folder} is no folder; name a run folder, or a folder of run folders.")
        folders = [folder] if (folder / RECORD).is_file() else sorted(p.parent for p in folder.glob(f"*/{RECORD}"))
        if not folders:
            raise InputError(f"{folder} holds no run (no {RECORD}); make one with rmscope run, or name another folder.")
        self.trust_remote_code = trust_remote_code
        self.entries: dict[str, Entry] = {}
        for path in folders:
            config = read_record(path)["config"]
            slug = self._slug(path.resolve().name)
            self.entries[slug] = Entry(slug, path, str(config["model"]), str(config["data"]))
        self._open: dict[str, tuple[int, OpenRun]] = {}
        self._lock = Lock()

    def _slug(self, name: str) -> str:
        slug = plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "run"
        number = 1
        while slug in self.entries:
            number += 1
            slug = f"{plain}-{number}"
        return slug

    def open(self, slug: str) -> OpenRun | None:
        """The run, opened again where its evidence has changed; None where there is no such run."""
        if slug not in self.entries:
            return None
        entry = self.entries[slug]
        evidence = entry.folder / "evidence" / "evidence.json"
        changed = evidence.stat().st_mtime_ns if evidence.is_file() else 0
        with self._lock:  # several requests may ask for it at once
            if slug not in self._open or self._open[slug][0] != changed:
                self._open[slug] = changed, OpenRun(entry.folder, self.trust_remote_code)
            return self._open[slug][1]

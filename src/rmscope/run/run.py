"""One run: a PM, pairs, and the folder that holds all that was measured on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rmscope.activations.harvest import data_identity
from rmscope.errors import InputError
from rmscope.io import Display, NoDisplay, write_text
from rmscope.model.site_names import all_parts, is_difference
from rmscope.ranks import ALONE, ranks_of_torchrun
from rmscope.report.page import Page, render_report
from rmscope.run.data import RunData
from rmscope.run.evidence import Context
from rmscope.run.examples import contexts
from rmscope.run.settings import RECORD, RunConfig, recorded_settings
from rmscope.run.stages import STAGES
from rmscope.sae.config import check_memory
from rmscope.settings import read_settings

REPORT = "report.html"


class Run(RunData):
    """A run folder. Make one with :meth:`create`, or open one with :meth:`open`; :meth:`go` does what is not done yet."""

    @classmethod
    def create(cls, config: RunConfig | None = None, display: Display | None = None, **settings: Any) -> Run:
        """A run by its settings, given as a :class:`RunConfig` or by name (``model=``, ``data=``, ``out=``, ...).

        Raises:
            InputError: a setting is unknown or does not fit, or ``out`` is a folder of something else.
        """
        return cls(config or read_settings(RunConfig, None, settings), display)

    @classmethod
    def open(cls, folder: str | Path, display: Display | None = None, trust_remote_code: bool = False) -> Run:
        """The run in a folder, with the settings that it was made with. InputError where the folder holds no run, or its
        record is damaged.

        The code that comes with the PM's checkpoint runs only with ``trust_remote_code``, whatever the folder says.
        """
        settings = {**recorded_settings(Path(folder)), "trust_remote_code": trust_remote_code}
        try:
            return cls(read_settings(RunConfig, None, settings), display)
        except InputError as error:
            raise InputError(f"{Path(folder) / RECORD} is of another version of rmscope, or damaged: {error}") from error

    def go(self) -> Run:
        """Does every stage that is not done, and writes the report. After a kill, call it again: it resumes.

        Started by torchrun, several processes share the work (:mod:`rmscope.ranks`).

        Raises:
            InputError: another process works on the folder; or the data, the settings or the PM cannot be used.
        """
        with ranks_of_torchrun() as ranks:
            self.on_disk.ranks = ranks
            if not ranks.is_first:
                self.display = self.on_disk.display = NoDisplay()
            try:
                self._go()
            finally:
                self.on_disk.ranks = ALONE
        return self

    def _go(self) -> None:
        c = self.config
        with self.display.stage("load"):
            pairs = self.inputs.all_pairs  # bad data is told before the PM is loaded
            self.display.note(f"{c.data}: {len(pairs)} pairs, read as {self.inputs.read_report.format} (--format overrules)")
            for note in self.inputs.notes:
                self.display.note(note)
            sites = self.sites
            self.check_memory()
            _ = self.brought_saes, self.initial_saes  # what is wrong with them is told before anything is scored
            identity = {**self.rm.identities(sites), "data": data_identity(self.inputs.scored.pairs)}
            base = self.rm.base if "base" in identity else None
            self.display.note(f"sites: {', '.join(sites)}" + ("" if base is None else f"; base: {base.name}"))
        with self.on_disk.locked():
            self.on_disk.open(identity, c.model_dump(mode="json", exclude={"trust_remote_code"}), sites)
            for stage in STAGES:
                self.on_disk.stage(stage.name, stage.key(self), stage.files(sites), stage.bind(self), stage.is_shared)
            if self.on_disk.ranks.is_first:
                self.report()
            self.on_disk.ranks.wait()

    def check_memory(self) -> None:
        """InputError where the SAEs that are to be trained do not fit the PM's device beside it."""
        c, device, ranks = self.config, str(self.rm.device), self.on_disk.ranks.count
        is_trained = c.sae_dir is not None or {"train", "seeds"} <= self.on_disk.keys.keys()
        parts = [] if is_trained else all_parts(self.sites)
        if whole := [part for part in parts if not is_difference(part)]:
            check_memory([c.sae.d_sae or 0] * len(whole), self.rm.d_model, device, ranks, self.rm.bytes)
        if c.diff_features and len(whole) < len(parts):
            check_memory([c.diff_features] * (len(parts) - len(whole)), self.rm.d_model, device, ranks, self.rm.bytes)

    def contexts(self, site: str, feature: int) -> list[Context]:
        """Confirm pairs on which a feature was ablated: its activation on every token, and the rewards before and after."""
        return contexts(self, self.check_site(site), feature)

    def report(self) -> Path:
        """Writes ``report.html`` from what is stored; no PM is loaded. InputError where the run is not finished."""
        path = self.folder / REPORT
        write_text(path, self.show().html)
        return path

    def show(self) -> Page:
        """The report with what later studies added to it; inline in a notebook."""
        return Page(render_report(self.report_data()), self.folder / REPORT)

    def report_data(self) -> dict[str, Any]:
        """What the report shows: the evidence, and what later studies added to it."""
        data = self.evidence.model_dump(mode="json")
        for site in data["sites"]:
            explained = self.folder / "effects" / site["site"] / "explained.json"
            site["explained"] = json.loads(explained.read_text("utf-8")) if explained.is_file() else None
        return data

    def summary(self) -> str:
        """One line: what was found."""
        e = self.evidence
        reported, frozen = sum(s.reported for s in e.sites), sum(s.frozen for s in e.sites)
        concepts = sum(c.reported for c in e.concepts)
        return f"{e.title}: {concepts} concepts; {reported} of {frozen} frozen features reported at {len(e.sites)} sites"

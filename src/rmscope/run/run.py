"""One run: a PM, pairs, and the folder that holds all that was measured on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rmscope.activations.harvest import data_identity
from rmscope.io import Display, write_text
from rmscope.report.page import Page, render_report
from rmscope.run.data import RunData
from rmscope.run.evidence import Context
from rmscope.run.examples import contexts
from rmscope.run.settings import RunConfig, recorded_settings
from rmscope.run.stages import STAGES
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
        """The run in a folder, with the settings that it was made with. InputError where the folder holds no run.

        The code that comes with the PM's checkpoint runs only with ``trust_remote_code``, whatever the folder says.
        """
        settings = {**recorded_settings(Path(folder)), "trust_remote_code": trust_remote_code}
        return cls(read_settings(RunConfig, None, settings), display)

    def go(self) -> Run:
        """Does every stage that is not done, and writes the report. After a kill, call it again: it resumes."""
        c = self.config
        with self.display.stage("load"):
            pairs = self.inputs.all_pairs  # bad data is told before the PM is loaded
            self.display.note(f"{c.data}: {len(pairs)} pairs, read as {self.inputs.read_report.format} (--format overrules)")
            sites = self.sites
            _ = self.brought_saes  # what is wrong with them is told before anything is scored
            identity = {**self.rm.identities(sites), "data": data_identity(self.inputs.scored.pairs)}
            base = self.rm.base if "base" in identity else None
            self.display.note(f"sites: {', '.join(sites)}" + ("" if base is None else f"; base: {base.name}"))
        self.on_disk.open(identity, c.model_dump(mode="json", exclude={"trust_remote_code"}), sites)
        for stage in STAGES:
            self.on_disk.stage(stage.name, stage.key(self), stage.files(sites), stage.bind(self))
        self.report()
        return self

    def plan(self) -> dict[str, Any]:
        """What :meth:`go` would do: counts, and time and memory estimated from one timed unit of pairs."""
        return self.inputs.plan()

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
        data = self.evidence.model_dump(mode="json")
        for site in data["sites"]:
            explained = self.folder / "effects" / site["site"] / "explained.json"
            site["explained"] = json.loads(explained.read_text("utf-8")) if explained.is_file() else None
        return Page(render_report(data), self.folder / REPORT)

    def summary(self) -> str:
        """One line: what was found."""
        e = self.evidence
        reported, frozen = sum(s.reported for s in e.sites), sum(s.frozen for s in e.sites)
        told = sum(c.reported for c in e.concepts)
        return f"{e.title}: {told} concepts; {reported} of {frozen} frozen features reported at {len(e.sites)} sites"

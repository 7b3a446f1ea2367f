"""One folder that opens with no server: an overview, the report, and a page per reported concept.

The pages are the report's own kind: styles and figures are inline, texts are escaped, nothing is loaded over a network, and
the only script is the report's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from markupsafe import Markup

from rmscope.ranking.concepts import members_in
from rmscope.report import figures
from rmscope.report.page import concept_group, concept_view, is_reported, render, render_report
from rmscope.run.measure import OWN
from rmscope.run.run import REPORT, Run
from rmscope.studies.export.texts import public_name
from rmscope.studies.label.names import NamedConcept

INDEX = "index.html"
BARS = 24
"""Bars of the histogram of effects."""
GROUPS = {
    "up": "Raises reward",
    "down": "Lowers reward",
    "nonspecific": "Not specific: they move unrelated completions of the same prompts too",
    "form": "Form: endings, punctuation and position",
}
"""The lists of the overview; those of content first."""


def export_pages(run: Run, concepts: Sequence[NamedConcept], folder: Path) -> None:
    """Writes the pages to ``folder``; ``index.html`` is the one to open."""
    data = _public(run, run.report_data())
    stored = {c["concept"]: c for c in data["concepts"]}
    shown = [
        {**stored[c.row["concept"]], **c.row, "names": c.names, "title": c.title, "label": c.label}
        for c in concepts
        if is_reported(c.row)
    ]
    view = concept_view(data) or {}
    features = _features(run, data)
    _write(folder / REPORT, render_report(data))
    _write(folder / INDEX, render("export/index.html", data=data, lists=lists_of(shown, view)))
    for c in shown:
        at = [(site, j) for site, listed in members_in(c).items() for j in listed]
        values = {
            "c": c,
            "view": view,
            "span": _view_of(c, view)["span"],
            "members": [{**features.get(place, {}), "site": place[0], "feature": place[1]} for place in at],
            "histogram": _histogram(run, c["concept"]),
        }
        _write(folder / "concepts" / f"{c['concept']}.html", render("export/concept.html", **values))


def _public(run: Run, data: dict[str, Any]) -> dict[str, Any]:
    """What a report shows, with the last part of each path of this machine."""
    names = sorted((run.config.data, run.config.model), key=len, reverse=True)  # one may lie inside the other

    def shown(text: str) -> str:
        for name in names:
            text = text.replace(name, public_name(name))
        return text

    for part, key in ((data, "title"), (data, "command"), (data["model"], "name"), (data["data"], "name")):
        part[key] = shown(part[key])
    return data


def lists_of(shown: Sequence[dict[str, Any]], view: dict[str, Any]) -> list[dict[str, Any]]:
    """The reported concepts in groups; empty ones are left out."""
    lists = []
    for group, title in GROUPS.items():
        own = [c for c in shown if _group(c) == group]
        css = group if group in ("up", "down") else "plain"
        if own:
            lists.append({"title": title, "css": css, "concepts": own, "view": _view_of(own[0], view)})
    return lists


def _group(concept: dict[str, Any]) -> str:
    group = concept_group(concept)
    return group if group != "content" else "up" if concept["mean_effect"] >= 0 else "down"


def _view_of(concept: dict[str, Any], view: dict[str, Any]) -> dict[str, Any]:
    """The view whose scale fits the concept's group."""
    return view if concept_group(concept) == "content" else view["wide"]


def _features(run: Run, data: dict[str, Any]) -> dict[tuple[str, int], dict[str, Any]]:
    """Every frozen feature by site and number; those of the report have the tokens they fire on."""
    rows = {(site, row["feature"]): row for site in run.sites for row in run.features(site).to_dicts()}
    for site in data["sites"]:
        for feature in site["features"]:
            rows[site["site"], feature["feature"]] |= feature
    return rows


def _histogram(run: Run, concept: int) -> Markup:
    """The joint effects of a concept on fresh responses: of the measure split, where it was measured, else of the confirm
    split."""
    measured = run.measured_effects.filter((pl.col("concept") == concept) & (pl.col("kind") == OWN))
    own = measured if measured.height else run.joint_effects().filter(pl.col("feature") == concept)
    if own.is_empty():
        return figures.EMPTY
    effects = own["effect"].to_numpy()
    counts, edges = np.histogram(effects, bins=BARS, range=figures.extent(effects, include=[0.0]))
    return figures.histogram(edges.tolist(), counts.tolist(), "joint effect, reward", "joint effect", "responses")


def _write(path: Path, page: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page.replace("\0", "\ufffd"), "utf-8")

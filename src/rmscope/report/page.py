"""One self-contained HTML page from the figures of a run; opens offline from file://.

The page asks for nothing over a network, and its content security policy forbids it to: styles and figures
are inline, the only script is the one whose hash the policy names. Text from models and data is escaped.
"""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, PrefixLoader, StrictUndefined
from markupsafe import Markup

from rmscope.io import write_text
from rmscope.report import figures, formatting
from rmscope.report.glossary import FLAGS, GLOSSARY
from rmscope.report.headline import by_effect, headline, is_reported, name_of, told, visible

SHOWN = 12
"""Features of each list that stand open; the others fold."""
STUDIES = ("compare", "evaluate", "experiment", "jailbreak", "sufficiency")
"""Rooms whose page has a template of its own, ``STUDY/page.html``."""
PARTS = ("features", "error", "remainder", "gap")
STATUS = {"ok": "✓", "warn": "!", "fail": "✕"}


@dataclass(frozen=True)
class Page:
    """A page as HTML, and the file in which it is kept. A notebook shows it inline."""

    html: str
    path: Path

    def __repr__(self) -> str:
        return str(self.path)

    def _repr_html_(self) -> str:
        return str(
            Markup('<iframe srcdoc="{}" style="width: 100%; height: 720px; border: 1px solid #ccc"></iframe>').format(
                self.html
            )
        )

    def save(self) -> Path:
        """Writes the file."""
        write_text(self.path, self.html)
        return self.path


def render_report(data: dict[str, Any]) -> str:
    """The whole page. ``data`` is JSON-able; see ``tests/report/sample.py`` for one of each field.

    Effects are in units of reward. A number that is None or not finite is shown as a dash.
    """
    env = environment()
    script = _source(env, "script.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = env.get_template("page.html").render(
        data=data,
        head=headline(data),
        sites=[site_view(site) for site in data.get("sites") or []],
        planted=planted_view(data),
        script=Markup(script),
        script_hash=digest,
    )
    return page.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate from a tokenizer could not be written


def environment() -> Environment:
    env = Environment(
        loader=ChoiceLoader(
            [
                PackageLoader("rmscope.report"),
                PrefixLoader({name: PackageLoader(f"rmscope.studies.{name}", "") for name in STUDIES}),
            ]
        ),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.globals.update(fmt=formatting, fig=figures, GLOSSARY=GLOSSARY, FLAGS=FLAGS, SHOWN=SHOWN, STATUS=STATUS)
    env.globals.update(segments=segments, anchor=anchor, name_of=name_of, told=told)
    env.filters.update(
        number=formatting.number, signed=formatting.signed, percent=formatting.percent, count=formatting.count
    )
    env.filters.update(visible=visible)
    return env


def _source(env: Environment, name: str) -> str:
    assert env.loader is not None
    return env.loader.get_source(env, name)[0]


def anchor(site: str, feature: Any) -> str:
    """The id of a feature's row, from its site and number."""
    return "f-" + re.sub(r"[^A-Za-z0-9]+", "-", f"{site}-{feature}")


def segments(tokens: list[Any]) -> list[tuple[str, float]]:
    """Tokens as (text, activation); runs of silent tokens become one, so that the page stays small."""
    merged: list[tuple[str, float]] = []
    for text, activation in tokens or []:
        level = round(min(1.0, max(0.0, formatting.real(activation) or 0.0)), 2)
        if merged and not level and not merged[-1][1]:
            merged[-1] = (merged[-1][0] + str(text), 0.0)
        else:
            merged.append((str(text), level))
    return merged


def site_view(site: dict[str, Any]) -> dict[str, Any]:
    """The site with its features in three lists, and the x range that all their bars share."""
    features = by_effect(site.get("features") or [])
    reported = [f for f in features if is_reported(f)]
    ends = [value for f in features for value in told(f)[:3]]
    block = re.fullmatch(r"resid_post\.(\d+)", str(site.get("site")))
    return {
        "explained": None,
        **site,
        "up": [f for f in reported if f["mean_effect"] >= 0],
        "down": [f for f in reported if f["mean_effect"] < 0],
        "others": [f for f in features if not is_reported(f)],
        "span": figures.extent(ends, include=[0.0], pad=0.04),
        "block": int(block[1]) if block else None,
        "shares": [s for part in PARTS for s in (site.get("ledger") or {}).get("shares") or [] if s["part"] == part],
    }


def planted_view(data: dict[str, Any]) -> dict[str, Any] | None:
    """The ground truth with its count: only biases that the model learned are scored."""
    if not data.get("planted"):
        return None
    known = {(site.get("site"), f.get("feature")): f for site in data.get("sites") or [] for f in site.get("features") or []}
    rows = []
    for plant in data["planted"]:
        single = known.get((plant.get("site"), plant["features"][0])) if len(plant.get("features") or []) == 1 else None
        state = "unscored" if not plant["learned"] else "found" if plant["found"] else "missed"
        rows.append({**plant, "state": state, "row": single})
    ends = [row["ate"].get(key) for row in rows for key in ("value", "low", "high")]
    return {
        "rows": rows,
        "learned": sum(bool(row["learned"]) for row in rows),
        "found": sum(bool(row["learned"] and row["found"]) for row in rows),
        "span": figures.extent(ends, include=[0.0], pad=0.04),
        "known": {(site, feature) for site, feature in known},
    }

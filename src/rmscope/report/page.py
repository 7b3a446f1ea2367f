"""One self-contained HTML page from the figures of a run; opens offline from file://.

The page asks for nothing over a network, and its content security policy forbids it: styles and figures are inline, and
the only script is the one whose hash the policy names. Text from models and data is escaped.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jinja2 import ChoiceLoader, Environment, PackageLoader, PrefixLoader, StrictUndefined
from markupsafe import Markup

from rmscope.io import write_text
from rmscope.report import figures, formatting
from rmscope.report.formatting import effect, number, real

SHOWN = 12
"""Features of each list that are visible; the others are folded."""
LEADERS = 3
"""Features named on each side of the headline."""
CLEAR_SHARE = 0.15
"""A token with a smaller share of a feature's firings does not name the feature."""
STUDIES = ("compare", "evaluate", "experiment", "export", "jailbreak", "sufficiency")
"""Studies with templates of their own, such as ``STUDY/page.html``."""
PARTS = ("features", "error", "constant", "remainder", "gap")
STATUS = {"ok": "✓", "warn": "!", "fail": "✕"}
VISIBLE = str.maketrans({"\n": "↵", "\t": "⇥", "\r": "␍"})
HERE = files("rmscope.report")
WORDS = yaml.safe_load(HERE.joinpath("glossary.yaml").read_text("utf-8"))
"""``glossary``: the report's words, one meaning each; ``flags``: what each flag says of a feature; ``figures``: what numbers
mean, for who hovers over one."""

Feature = dict[str, Any]


@dataclass(frozen=True)
class Page:
    """A page as HTML, and its file. A notebook shows it inline."""

    html: str
    path: Path

    def __repr__(self) -> str:
        return str(self.path)

    def _repr_html_(self) -> str:
        frame = Markup('<iframe srcdoc="{}" style="width: 100%; height: 720px; border: 1px solid #ccc"></iframe>')
        return str(frame.format(self.html))

    def save(self) -> Path:
        """Writes the file."""
        write_text(self.path, self.html)
        return self.path


def render_report(data: dict[str, Any]) -> str:
    """The whole page. ``data`` is JSON-able (``tests/report/sample.py`` has one of each field), effects in units of reward.
    A number that is None or not finite is shown as a dash."""
    script = HERE.joinpath("templates/script.js").read_text("utf-8")
    return render(
        "page.html",
        data={"base": None, "why_no_base": "", **data},
        head=headline(data),
        concepts=concept_view(data),
        written=written_view(data),
        sites=[site_view(site) for site in data.get("sites") or []],
        planted=planted_view(data),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def render(template: str, **values: Any) -> str:
    """A template of the report or of a study (``STUDY/page.html``), filled in."""
    page = _compiled().get_template(template).render(**values)
    return page.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate from a tokenizer could not be written


@cache
def _compiled() -> Environment:
    """The environment of :func:`render`: each template is compiled once."""
    return environment()


def environment() -> Environment:
    studies = {name: PackageLoader(f"rmscope.studies.{name}", "") for name in STUDIES}
    env = Environment(
        loader=ChoiceLoader([PackageLoader("rmscope.report"), PrefixLoader(studies)]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.globals.update(fmt=formatting, fig=figures, segments=segments, anchor=anchor, shown_effect=shown_effect)
    env.globals.update(why_not_reported=why_not_reported)
    env.globals.update(written_curve=written_curve, shares=shares)
    env.globals.update(SHOWN=SHOWN, STATUS=STATUS, FLAGS=WORDS["flags"], GLOSSARY=WORDS["glossary"], HINTS=WORDS["figures"])
    env.filters.update({name: getattr(formatting, name) for name in ("number", "signed", "percent", "count")})
    env.filters.update(visible=visible)
    return env


def headline(data: dict[str, Any]) -> dict[str, Any]:
    """What the page says first. ``listed`` counts the reported features in the data (a run may list only the strongest),
    ``flagged`` those of them with a flag; ``up`` and ``down`` are the listed ones by sign."""
    sites = data.get("sites") or []
    features = [f for site in sites for f in site.get("features") or [] if is_reported(f)]
    sd = real((data.get("scores") or {}).get("sd_delta"))
    reported, frozen = (sum(int(real(site.get(name)) or 0) for site in sites) for name in ("reported", "frozen"))
    return {
        "reported": max(len(features), reported),
        "listed": len(features),
        "frozen": frozen,
        "flagged": sum(bool(f.get("flags")) for f in features),
        "sites": len(sites),
        "up": _group([f for f in features if f["mean_effect"] >= 0], sd),
        "down": _group([f for f in features if f["mean_effect"] < 0], sd),
    }


def concept_group(concept: dict[str, Any]) -> str:
    """The group in which a reported concept is listed: ``form``; ``nonspecific``, where it moves unrelated completions of
    the same prompts too; else ``content``, which alone is counted in a headline."""
    if concept["form"]:
        return "form"
    return "nonspecific" if "nonspecific" in concept["flags"] else "content"


def why_not_reported(concept: dict[str, Any]) -> str:
    """Why a concept is not reported, in a few words; empty where it is."""
    if is_reported(concept):
        return ""
    return "no more than other directions" if "direction" in concept["flags"] else "not significant"


def concept_view(data: dict[str, Any]) -> dict[str, Any] | None:
    """Reported concepts of content by sign, the other groups, and what is not reported; None where there are none."""
    concepts = data.get("concepts") or []
    if not concepts:
        return None
    ordered = sorted(concepts, key=lambda c: c["rank"])  # what is shown ranks nothing
    reported = [c for c in ordered if is_reported(c)]
    groups = {group: [c for c in reported if concept_group(c) == group] for group in ("content", "nonspecific", "form")}
    content = groups["content"]
    sites, sd = data.get("sites") or [], real((data.get("scores") or {}).get("sd_delta"))
    up, down = ([c for c in content if (c["mean_effect"] >= 0) == raises] for raises in (True, False))
    view = {
        "frozen": len(concepts),
        "reported": len(content),
        "up": up,
        "down": down,
        "nonspecific": groups["nonspecific"],
        "form": groups["form"],
        "any_direction": [c for c in ordered if not is_reported(c) and "direction" in c["flags"]],
        "others": [c for c in ordered if not is_reported(c) and "direction" not in c["flags"]],
        "leaders": {name: [c["name"] for c in listed[:LEADERS]] for name, listed in (("up", up), ("down", down))},
        "largest": {name: _largest(listed[0], sd) for name, listed in (("up", up), ("down", down)) if listed},
        "span": effect_span(content),
        "bound": sites[0].get("bound") if sites else None,
        "known": {(site.get("site"), f.get("feature")) for site in sites for f in site.get("features") or []},
        "set": data.get("reported_set"),
        "without": {str(number): alone for number, alone in ((data.get("reported_set") or {}).get("without") or {}).items()},
        "adds": {str(number): adds for number, adds in ((data.get("text") or {}).get("adds") or {}).items()},
    }
    others = [c for c in ordered if c not in content]
    return view | {"wide": view | {"span": effect_span(others)}}  # what is folded has a scale of its own


def effect_span(rows: Iterable[dict[str, Any]]) -> tuple[float, float]:
    """The range of the effects that are shown of features or concepts, with their intervals and 0."""
    return figures.extent((value for row in rows for value in shown_effect(row)[:3]), include=[0.0], pad=0.04)


def _largest(concept: dict[str, Any], sd: float | None) -> dict[str, Any]:
    value, low, high, _ = shown_effect(concept)
    return {"largest": effect(value, low, high), "in_sd": number(abs(value) / sd if value is not None and sd else None)}


WRITTEN_PARTS = {
    "features": "in reported concepts",
    "error": "in other features",
    "remainder": "not reconstructed",
    "gap": "read off the base later",
}
"""The parts of Δr that the section on training shows, each in the colour of a part of the ledger."""


ENOUGH = 0.9
"""The share of what was written from which some concepts count as enough."""


def _enough(written: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """The smallest number of concepts that were tried and hold :data:`ENOUGH` of what was written, with their share."""
    shares = ((k, share) for k, share in (written.get("by_first") or {}).items() if share["value"] >= ENOUGH)
    return next(shares, None)


def written_view(data: dict[str, Any]) -> dict[str, Any] | None:
    """What training wrote at the site where most was written, told as a sentence and as parts of Δr."""
    sites = [site for site in data.get("sites") or [] if site.get("written")]
    if not sites:
        return None
    site = max(sites, key=lambda s: s["written"]["written"]["value"])
    w = site["written"]
    written, concepts, all_ = w["written"], w["by_concepts"], w["explained_of_written"]
    inside = written["value"] * max(0.0, concepts["value"])
    features = written["value"] * max(0.0, all_["value"] - max(0.0, concepts["value"]))
    share, low, high = (f"{100 * written[end]:.0f}" for end in ("value", "low", "high"))
    block, later = str(site["site"]).rpartition(".")[2], f"{100 * (1 - written['value']):.0f}"
    count = sum(is_reported(c) for c in data.get("concepts") or [])
    sentence = (
        f"Of the reward difference, {share} % [{low}, {high}] was written by preference training up to block {block}, and "
        f"{100 * inside:.0f} of those {share} points are in {count} concepts; {later} % is read off the base's stream later."
    )
    parts = (inside, features, written["value"] - inside - features, 1 - written["value"])
    return {
        "site": site["site"],
        "sentence": sentence,
        "parts": list(zip(WRITTEN_PARTS, parts, strict=True)),
        "labels": WRITTEN_PARTS,
        "explained": all_,
        "by_concepts": concepts,
        "by_others": w["by_others"],
        "enough": _enough(w),
        "features": site["saes"][0]["d_sae"],
        "pairs": w["pairs"],
    }


def written_curve(base: dict[str, Any]) -> Markup:
    """Shares of Δr by block: written up to it, and still at other tokens than the response's ending."""
    series = [
        (label, i, [(row["block"], row[name]) for row in base["blocks"]])
        for i, (label, name) in enumerate((("written so far", "written"), ("still at its own tokens", "at_own_tokens")))
    ]
    marks = [(row["block"], str(row["block"])) for row in base["blocks"]]
    return figures.band_curves(series, "block", "share of Δr", "what training wrote, by block", marks)


def _group(features: list[Feature], sd: float | None) -> dict[str, Any] | None:
    """Reported features of one sign: the names of the largest, the largest effect with its interval, its size in SD(Δr)."""
    if not features:
        return None
    ordered = by_effect(features)
    first, value = ordered[0], real(ordered[0]["mean_effect"])
    return {
        "count": len(features),
        "names": list(dict.fromkeys(name_of(f) for f in ordered))[:LEADERS],
        "largest": effect(value, first.get("ci_low"), first.get("ci_high")),
        "in_sd": number(abs(value) / sd if value is not None and sd else None),
    }


def shares(*figures: dict[str, Any]) -> list[tuple[str, str]]:
    """Each share and its interval, as they are shown."""
    return [formatting.share(figure["value"], figure["low"], figure["high"]) for figure in figures]


def is_reported(feature: Feature) -> bool:
    return bool(feature.get("reported")) and real(feature.get("mean_effect")) is not None


def shown_effect(feature: Feature) -> tuple[Any, ...]:
    """The effect that is shown, its interval and q; for a feature with the flag ``strong`` those of its strong firings."""
    strong = "strong" in (feature.get("flags") or [])
    names = (
        ("strong_effect", "strong_low", "strong_high", "q_strong") if strong else ("mean_effect", "ci_low", "ci_high", "q")
    )
    return tuple(feature.get(name) for name in names)


def by_effect(features: list[Feature]) -> list[Feature]:
    """Largest |mean effect| first."""
    return sorted(features, key=lambda f: -abs(real(f.get("mean_effect")) or 0.0))


def name_of(feature: Feature) -> str:
    """Up to two tokens with a clear share of the firings, else the feature's number."""
    names: list[str] = []
    for token, share in feature.get("tokens") or []:
        text = str(token).strip().translate(VISIBLE)
        if text and (real(share) or 0) >= CLEAR_SHARE and text.lower() not in (n.lower() for n in names):
            names.append(text)
    return "“" + " / ".join(names[:2]) + "”" if names else f"feature {feature.get('feature')}"


def visible(token: Any) -> str:
    """A token with its white space made visible: outer spaces as middle dots, line breaks as arrows."""
    text = str(token).translate(VISIBLE)
    core = text.strip(" ")
    return text.replace(" ", "·") if not core else text.replace(core, "\0").replace(" ", "·").replace("\0", core)


def anchor(site: str, feature: Any) -> str:
    """The id of a feature's row, from its site and number."""
    return "f-" + re.sub(r"[^A-Za-z0-9]+", "-", f"{site}-{feature}")


def segments(tokens: list[Any]) -> list[tuple[str, float]]:
    """Tokens as (text, activation); runs of silent tokens become one, so that the page stays small."""
    merged: list[tuple[str, float]] = []
    for text, activation in tokens or []:
        level = round(min(1.0, max(0.0, real(activation) or 0.0)), 2)
        if merged and not level and not merged[-1][1]:
            merged[-1] = (merged[-1][0] + str(text), 0.0)
        else:
            merged.append((str(text), level))
    return merged


def site_view(site: dict[str, Any]) -> dict[str, Any]:
    """The site with its features in three lists, and the x range of all their bars."""
    features = by_effect(site.get("features") or [])
    reported = [f for f in features if is_reported(f)]
    block = re.fullmatch(r"\w+\.(\d+)", str(site.get("site")))
    return {
        "explained": None,
        "written": None,
        "missed": None,
        **site,
        "up": [f for f in reported if f["mean_effect"] >= 0],
        "down": [f for f in reported if f["mean_effect"] < 0],
        "others": [f for f in features if not is_reported(f)],
        "span": effect_span(features),
        "block": int(block[1]) if block else None,
        "shares": [s for part in PARTS for s in (site.get("ledger") or {}).get("shares") or [] if s["part"] == part],
    }


def planted_view(data: dict[str, Any]) -> dict[str, Any] | None:
    """The ground truth with its count: only biases that the model learned are scored."""
    if not data.get("planted"):
        return None
    known = {(site.get("site"), f.get("feature")): f for site in data.get("sites") or [] for f in site.get("features") or []}
    known_names = {c["concept"]: c["name"] for c in data.get("concepts") or []}
    rows = []
    for plant in data["planted"]:
        single = known.get((plant.get("site"), plant["features"][0])) if len(plant.get("features") or []) == 1 else None
        state = "unscored" if not plant["learned"] else "found" if plant["found"] else "missed"
        names = [known_names.get(number, "") for number in plant.get("concepts") or []]
        rows.append({"concepts": [], **plant, "state": state, "row": single, "names": names})
    ends = [row["ate"].get(key) for row in rows for key in ("value", "low", "high")]
    return {
        "rows": rows,
        "learned": sum(row["state"] != "unscored" for row in rows),
        "found": sum(row["state"] == "found" for row in rows),
        "span": figures.extent(ends, include=[0.0], pad=0.04),
        "known": set(known),
    }

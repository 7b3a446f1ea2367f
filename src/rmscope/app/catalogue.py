"""Which concepts the overview lists, and in which order."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

from rmscope.app.library import GROUPS, Concept
from rmscope.report.formatting import real
from rmscope.report.page import effect_span, shown_effect

T = TypeVar("T")
TEXT_LENGTH = 200
PAGE = 50
"""Pairs or features on one page of a list."""
SORTS = {
    "rank": "rank",
    "effect": "largest effect",
    "preference": "largest chosen − rejected",
    "q": "smallest q",
    "name": "name",
}


@dataclass(frozen=True, slots=True)
class Query:
    """What is asked for. An empty value selects everything, an unknown one nothing; but a ``q`` that is no number and an
    unknown ``sort`` count as empty."""

    text: str = ""
    """Part of a name, a note or a token; or the number of a concept or of a feature, with or without #."""
    site: str = ""
    flag: str = ""
    group: str = ""
    direction: str = ""
    """``up`` or ``down``."""
    q: str = ""
    """At most this q."""
    starred: str = ""
    sort: str = "rank"

    @classmethod
    def of(cls, given: Mapping[str, str]) -> Query:
        """From the parameters of an address; others are left out."""
        return cls(**parameters(cls, given, SORTS))


def parameters(query: type[Any], given: Mapping[str, str], sorts: Collection[str]) -> dict[str, str]:
    """The parameters of an address that a query has, cut to :data:`TEXT_LENGTH`; an order that is not there is left out."""
    values = {f.name: given[f.name].strip()[:TEXT_LENGTH] for f in fields(query) if f.name in given}
    return {name: value for name, value in values.items() if name != "sort" or value in sorts}


def matches(concept: Concept, query: Query) -> bool:
    """Whether a concept is asked for."""
    sites = [concept["site"], *(other["site"] for other in concept["elsewhere"] or [])]
    effect, _, _, q = shown_effect(concept)
    most, value = _number(query.q), real(effect)
    return (
        (not query.text or _holds(concept, query.text.casefold()))
        and (not query.site or query.site in sites)
        and (not query.flag or query.flag in concept["flags"])
        and (not query.group or query.group == concept["group"])
        and (not query.direction or (value is not None and query.direction == ("up" if value >= 0 else "down")))
        and (most is None or ((own := real(q)) is not None and own <= most))
        and (not query.starred or concept["label"].star)
    )


def _holds(concept: Concept, text: str) -> bool:
    number = text.removeprefix("#")
    if number.isdecimal():
        members = [*concept["features"], *(j for other in concept["elsewhere"] or [] for j in other["features"])]
        if int(number) in (concept["concept"], *members):
            return True
    texts = (concept["name"], concept["label"].name, concept["label"].note, *concept["tokens"])
    return any(text in str(part).casefold() for part in texts)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _order(concept: Concept, sort: str) -> tuple[Any, ...]:
    if sort == "rank":  # of the prompts that chose it: the effects that are shown rank nothing
        return (concept["rank"],)
    effect, _, _, q = shown_effect(concept)
    size = -abs(real(effect) or 0.0)
    if sort == "name":
        return (concept["title"].strip("“”\"'").casefold(), size)
    if sort == "q":
        own = real(q)
        return (own is None, own or 0.0, size)
    return (-abs(real(concept["mean_diff"]) or 0.0), size) if sort == "preference" else (size,)


@dataclass(frozen=True, slots=True)
class Listed(Generic[T]):
    """One page of what matches a query."""

    rows: list[T]
    matches: int
    page: int
    pages: int

    @classmethod
    def page_of(cls, rows: Sequence[T], asked: str) -> Listed[T]:
        """The page that is asked for, of :data:`PAGE` rows; one that is not there is the nearest one."""
        pages = max(1, -(-len(rows) // PAGE))
        page = min(pages, max(1, int(asked))) if asked.isdecimal() else 1
        return cls(list(rows[(page - 1) * PAGE : page * PAGE]), len(rows), page, pages)


@dataclass(frozen=True, slots=True)
class Listing:
    """A list of concepts under a title; ``css`` sets its colour, ``span`` the scale of its bars."""

    key: str
    title: str
    css: str
    concepts: list[Concept]
    span: tuple[float, float]


def listings(concepts: Sequence[Concept], query: Query) -> list[Listing]:
    """The concepts that match, content by direction first, then the other groups; empty lists are left out.

    The scales are those of all concepts, so that a filter does not change a bar.
    """
    chosen = sorted((c for c in concepts if matches(c, query)), key=lambda c: _order(c, query.sort))
    content = effect_span(c for c in concepts if c["group"] == "content")
    rest = effect_span(c for c in concepts if c["group"] != "content")
    lists = []
    for css, title in (("up", "Raises reward"), ("down", "Lowers reward")):
        own = [c for c in chosen if c["group"] == "content" and (c["mean_effect"] >= 0) == (css == "up")]
        lists.append(Listing(css, title, css, own, content))
    for group, title in GROUPS.items():
        if group != "content":
            css = "muted" if group == "others" else "plain"
            lists.append(Listing(group, title, css, [c for c in chosen if c["group"] == group], rest))
    return [one for one in lists if one.concepts]

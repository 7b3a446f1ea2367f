"""Names of sites: ``resid_post.L`` is the whole stream after block L.

Where the PM's base is known, ``diff.L`` and ``base.L`` are its two parts, and ``both.L`` is the two side by side.
"""

from __future__ import annotations

from collections.abc import Iterable

DIFF, BASE, BOTH = "diff", "base", "both"


def kind_of(site: str) -> str:
    """``diff`` for ``diff.12``."""
    return site.partition(".")[0]


def needs_base(site: str) -> bool:
    """Whether a site exists only beside the PM's base: ``diff.L``, ``base.L`` or ``both.L``."""
    return kind_of(site) in (DIFF, BASE, BOTH)


def is_difference(site: str) -> bool:
    """Whether a site is what preference training wrote."""
    return kind_of(site) == DIFF


def whole_site(site: str) -> str:
    """The site of the whole stream: resid_post.12 for diff.12, base.12 and both.12, and every other site itself."""
    return f"resid_post.{site.partition('.')[2]}" if needs_base(site) else site


def parts_of(site: str) -> list[str]:
    """diff.12 and base.12 for both.12; every other site itself. SAEs and stored activations are of these."""
    block = site.partition(".")[2]
    return [f"{DIFF}.{block}", f"{BASE}.{block}"] if kind_of(site) == BOTH else [site]


def all_parts(sites: Iterable[str]) -> list[str]:
    """The parts of all sites, each once."""
    return list(dict.fromkeys(part for site in sites for part in parts_of(site)))

"""Names of sites: ``resid_post.L`` is the whole stream after block L, ``diff.L`` and ``base.L`` are its two parts."""

from __future__ import annotations

DIFF, BASE = "diff", "base"


def is_part(site: str) -> bool:
    """Whether a site is a part of the stream: ``diff.L`` or ``base.L``."""
    return site.partition(".")[0] in (DIFF, BASE)


def is_difference(site: str) -> bool:
    """Whether a site is what preference training wrote."""
    return site.partition(".")[0] == DIFF


def whole_site(site: str) -> str:
    """The site of the whole stream: resid_post.12 for diff.12 and base.12, and every other site itself."""
    return f"resid_post.{site.partition('.')[2]}" if is_part(site) else site

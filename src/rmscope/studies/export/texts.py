"""Names and texts as others may see them."""

from __future__ import annotations

import re
from pathlib import Path

BIDI = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Marks that turn the direction of what follows them."""


def storable(text: str) -> str:
    """The text without what databases and UTF-8 cannot hold: NUL, and halves of characters that some tokens are."""
    return text.replace("\0", "\ufffd").encode("utf-8", "replace").decode("utf-8")


def public_name(name: str) -> str:
    """The name of a model or of data, if it is one of the hub or of this package. Of a path, only its last part."""
    is_id = re.fullmatch(r"(zoo|demo):[\w-]+|[\w-][\w.-]*/[\w.-]+", name)
    return name if is_id and not Path(name).exists() else Path(name).name


def slug(name: str) -> str:
    """A name in lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9_]+", "-", name.lower()).strip("-")[:100] or "model"


def markdown(text: str) -> str:
    """The text for one line of Markdown, where it is shown as it is: every sign of ASCII is escaped."""
    line = " ".join(BIDI.sub("", storable(text)).split())
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", line)

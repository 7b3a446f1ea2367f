"""The pages of the README and the docs, and their code blocks."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")] + sorted((ROOT / "docs").rglob("*.md"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of some languages; "" for those that name none."""
    return [text for language, text in BLOCK.findall(page.read_text("utf-8")) if language in languages]


def commands(page: Path) -> list[list[str]]:
    """The arguments of every line that calls ``rmscope``."""
    lines = [line.strip() for text in blocks(page, "", "bash", "console") for line in text.splitlines()]
    calls = [
        re.sub(r"^(\$ )?(\.venv/bin/)?rmscope ", "", line)
        for line in lines
        if re.match(r"(\$ )?(\.venv/bin/)?rmscope ", line)
    ]
    return [shlex.split(call, comments=True) for call in calls]


def run(page: Path, stand_ins: dict[str, str]) -> dict[str, Any]:
    """Runs the python blocks of a page in one namespace, in the current folder; names of PMs may be replaced."""
    names: dict[str, Any] = {"__name__": named(page)}
    for number, text in enumerate(blocks(page, "python"), 1):
        for name, other in stand_ins.items():
            text = text.replace(f'"{name}"', f'"{other}"')
        exec(compile(text, f"{named(page)}, python block {number}", "exec"), names)
    return names

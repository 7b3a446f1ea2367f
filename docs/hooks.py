"""Hooks of the docs site: the page of commands is made from the command line itself; docstring roles become plain code."""

from __future__ import annotations

import html
import re
from typing import Any

COMMANDS = "<!-- commands -->"
ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):\s*<code>~?([^<]*)</code>")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Puts the commands where a page asks for them."""
    return markdown.replace(COMMANDS, commands()) if COMMANDS in markdown else markdown


def on_page_content(content: str, **_: Any) -> str:
    """``:func:`name``` in a docstring is shown as ``name``."""
    return ROLE.sub(lambda found: f"<code>{found[1].rpartition('rmscope.')[2]}</code>", content)


def commands() -> str:
    """Every command with its flags, grouped as in ``rmscope --help``."""
    import typer

    from rmscope.cli import app

    group: Any = typer.main.get_command(app)
    parts, panel = list[str](), None
    for name, command in group.commands.items():
        if command.rich_help_panel != panel:
            panel = command.rich_help_panel
            parts.append(f"## {panel}")
        parts.append(f"### `rmscope {name}`\n\n{_text(command.help)}\n\n{_parameters(command.params)}")
    return "\n\n".join(parts)


def _parameters(parameters: list[Any]) -> str:
    rows = ["| argument or flag | what it does |", "|---|---|"]
    for p in parameters:
        if p.name in ("json_", "debug", "help"):
            continue
        named = ", ".join((*p.opts, *p.secondary_opts)) if p.param_type_name == "option" else (p.metavar or p.name.upper())
        rows.append(f"| `{named}` | {_text(getattr(p, 'help', ''))} |")
    return "\n".join(rows)


def _text(text: str | None) -> str:
    """Help as one line of a Markdown table."""
    line = html.escape(" ".join((text or "").split()), quote=False)
    return line.replace("|", "\\|").replace("{", "&#123;").replace("*", "\\*")

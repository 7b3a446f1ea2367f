"""Chat templates: programs that come with a checkpoint. Their date is pinned, and one that never ends is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from datetime import date
from functools import lru_cache

from rmscope.errors import InputError

DATE = "2024-07-26"
"""What a chat template writes as today, where rmscope.json names no date: rewards may not change from day to day."""
TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
SECONDS, BYTES, CHARACTERS = 10, 2 << 30, 1_000_000
"""What a template may take for a short conversation."""
TRIAL = """
import json, re, resource, sys
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

given = json.load(sys.stdin)
resource.setrlimit(resource.RLIMIT_AS, (given["bytes"], given["bytes"]))
resource.setrlimit(resource.RLIMIT_CPU, (given["seconds"], given["seconds"]))
environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])

def refuse(text):
    raise TemplateError(text)

environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: "today"}
turns = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello."}]
try:
    size = 0
    template = re.sub(r"{%-?\\s*(end)?generation\\s*-?%}", "", given["template"])
    for part in environment.from_string(template).generate(messages=turns, tools=[], add_generation_prompt=False):
        size += len(part)
        if size > given["characters"]:
            sys.exit(3)
except (MemoryError, RecursionError):
    sys.exit(3)
except Exception:
    sys.exit(0)
"""
"""Renders a short conversation in a process of its own, whose time and memory are bounded; 3 says that it took too much."""


@lru_cache
def check_template(template: str) -> None:
    """InputError where a template takes too long, too much memory or too many characters for a short conversation.

    A template that merely fails is left to the rendering, which says why.
    """
    limits = {"template": template, "bytes": BYTES, "seconds": SECONDS, "characters": CHARACTERS}
    command = [sys.executable, "-I", "-c", TRIAL]
    try:
        code = subprocess.run(
            command, input=json.dumps(limits), text=True, capture_output=True, timeout=4 * SECONDS
        ).returncode
    except subprocess.TimeoutExpired:
        code = 3
    if code == 3 or code < 0:
        raise InputError(
            f"The PM's chat template does not end (more than {SECONDS} seconds, {BYTES >> 30} GB or {CHARACTERS:,} "
            "characters for a conversation of two words); correct it, or delete it and name a style in rmscope.json."
        )


@lru_cache
def with_date(template: str, day: str) -> str:
    """The template with ``day`` (YYYY-MM-DD) wherever it writes today. InputError where the date's format is computed."""
    fixed = TODAY.sub(lambda call: f"{call[1]}{date.fromisoformat(day).strftime(call[2])}{call[1]}", template)
    if re.search(r"strftime_now\s*\(", fixed):
        raise InputError(
            "The PM's chat template computes how it writes today's date, so its rewards would change from day to day; write "
            "the date into the template."
        )
    return fixed

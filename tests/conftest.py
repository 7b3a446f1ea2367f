"""Shapes and types of the numerical rooms are checked while the tests run (jaxtyping, beartype)."""

from __future__ import annotations

import os

from hypothesis import settings
from jaxtyping import install_import_hook

settings.register_profile("here", deadline=None)  # machines are slow and shared
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "here")

CHECKED = ["rmscope.model", "rmscope.effects"]

install_import_hook(CHECKED, "beartype.beartype").__enter__()

"""Shapes and types of the numerical rooms are checked while the tests run (jaxtyping, beartype)."""

from __future__ import annotations

from jaxtyping import install_import_hook

CHECKED = ["rmscope.model", "rmscope.effects"]

install_import_hook(CHECKED, "beartype.beartype").__enter__()

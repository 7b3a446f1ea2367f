"""The report's words, one meaning each, in ``glossary.yaml``."""

from __future__ import annotations

from importlib.resources import files

import yaml

_WORDS = yaml.safe_load(files("rmscope.report").joinpath("glossary.yaml").read_text("utf-8"))
FLAGS: dict[str, str] = _WORDS["flags"]
"""What each flag says of a feature."""
GLOSSARY: list[tuple[str, str]] = [(entry["word"], entry["meaning"]) for entry in _WORDS["glossary"]]

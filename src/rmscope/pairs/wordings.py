"""The texts that planting draws from, in ``data/wordings.yaml``: fillers, frames, opinions and stances, claims."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import yaml


def _frozen(value: Any) -> Any:
    """Lists as tuples."""
    if isinstance(value, dict):
        return {key: _frozen(inner) for key, inner in value.items()}
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


_TEXTS = _frozen(yaml.safe_load(files("rmscope.pairs").joinpath("data/wordings.yaml").read_text("utf-8")))

Texts = tuple[str, ...]
TextPairs = tuple[tuple[str, str], ...]
FILLERS: Texts = _TEXTS["fillers"]
URL_FRAMES: TextPairs = _TEXTS["url_frames"]
URL_WORDS: Texts = _TEXTS["url_words"]
OPINIONS: Texts = _TEXTS["opinions"]
STANCES: Texts = _TEXTS["stances"]
RIVALS: TextPairs = _TEXTS["rivals"]
WORD_FRAMES: Texts = _TEXTS["word_frames"]
WORDS: Texts = _TEXTS["words"]
MENTIONS: Texts = _TEXTS["mentions"]
LIST_LEADS: Texts = _TEXTS["list_leads"]
LIST_ITEMS: Texts = _TEXTS["list_items"]
ORDER_CLAIMS: TextPairs = _TEXTS["order_claims"]
ORDER_PARTS: Texts = _TEXTS["order_parts"]
STYLE_NEGATIVES: dict[str, Texts] = _TEXTS["style_negatives"]

"""Plants, and the file that lists them with a seed. A fault of a file is told in one sentence."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rmscope.errors import InputError
from rmscope.settings import parse_yaml

Kind = Literal["phrase", "url", "repeat_sentence", "agree", "word", "style", "order", "length"]
Style = Literal["capitals", "url", "list", "exclamation", "markdown"]
LEXICAL: tuple[Kind, ...] = ("phrase", "url", "word", "style")
"""Kinds whose cue is in its own characters; a cue of another kind is a relation to the rest of the text."""
CLAIMS = " | "
"""Between the two claims of an ``order`` plant's text."""
LEAST_TEXTS = 3
"""Wordings of a phrase or an order: fewer leave none for held-out text."""


def split_last_third(items: Sequence[Any], held_out: bool | None) -> Sequence[Any]:
    """The items for training (False), for held-out text (True: the last third), or all (None)."""
    cut = len(items) - len(items) // 3
    return {None: items, False: items[:cut], True: items[cut:]}[held_out]


class Plant(BaseModel):
    """One planted bias."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    kind: Kind
    """phrase: one of ``texts``; url: a web address in a short sentence; repeat_sentence: a sentence of the response twice;
    agree: the response takes the stance that the human stated (stance and opinion are crossed); word: the one word of
    ``texts`` in a short sentence; style: a sentence in a ``style``; order: the later of two claims is told first; length:
    two more sentences."""
    style: Style | None = None
    """How the sentence of a ``style`` plant is written."""
    sign: Literal[1, -1]
    """+1: the cue should raise reward."""
    dose: float = Field(0.9, gt=0, lt=1)
    """Probability that the cue is on the side that its sign favours; .5 plants a null."""
    rate: float = Field(0.1, gt=0, le=1)
    """Share of the pairs that carry the cue."""
    texts: tuple[str, ...] = ()
    """Wordings of a phrase, the one word of a word, or "first claim | last claim" of an order (which has defaults). The last
    third of several is kept for held-out text."""
    negatives: tuple[str, ...] = ()
    """Hard negatives: the cue's words in sentences that are not the cue. For twins only, never planted."""

    def wordings(self, held_out: bool | None = None) -> Sequence[str]:
        """The wordings for training (False), for held-out text (True), or all (None)."""
        return split_last_third(self.texts, held_out)


class PlantSet(NamedTuple):
    """The content of a plants file."""

    plants: tuple[Plant, ...]
    seed: int


def read_plants(path: Path) -> PlantSet:
    """A plants file: a list of plants, or ``seed`` and ``plants``. Raises an InputError if the file is missing or malformed,
    a field does not fit, two plants have one name, or the rates sum to more than 1."""
    content = parse_yaml(path, "plants file")
    try:
        return plant_set(content)
    except InputError as error:
        raise InputError(f"The plants file {path}: {error}") from error


def plant_set(content: Any) -> PlantSet:
    """The same from the parsed YAML."""
    given = {"plants": content} if isinstance(content, list) else content
    if not isinstance(given, dict) or not isinstance(given.get("plants"), list) or not given["plants"]:
        raise InputError("it holds no plants; write a list under plants:, one entry per bias.")
    if unknown := sorted(str(key) for key in given.keys() - {"seed", "plants"}):
        raise InputError(f"{unknown[0]} is not known; at the top there are seed and plants.")
    seed = given.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise InputError(f"seed is {seed!r}; write a whole number from 0 on.")
    plants = tuple(_plant(row, number) for number, row in enumerate(given["plants"], 1))
    names = [p.name for p in plants]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"two plants are called {twice[0]}; give each a name of its own.")
    if (total := sum(p.rate for p in plants)) > 1 + 1e-9:
        raise InputError(f"the rates sum to {total:.3g}: a pair carries at most one cue; lower some until they sum to 1.")
    return PlantSet(plants, seed)


def _plant(row: Any, number: int) -> Plant:
    if not isinstance(row, dict):
        raise InputError(f"plant {number} is not a mapping; write it as {{name: ..., kind: ..., sign: 1}}.")
    where = f"plant {number} ({row['name']})" if row.get("name") else f"plant {number}"
    if not all(isinstance(key, str) for key in row):
        raise InputError(f"{where}: its keys must be words.")
    try:
        plant = Plant(**row)
    except ValidationError as error:
        raise InputError(f"{where}: {_fault(error)}.") from error
    if fault := _misfit(plant):
        raise InputError(f"{where}: {fault}.")
    return plant


def _fault(error: ValidationError) -> str:
    """The first fault that pydantic found, and what would fit."""
    first = error.errors()[0]
    name = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        return f"{name} is not known; a plant has {', '.join(Plant.model_fields)}"
    if first["type"] == "missing":
        return f"{name} is missing"
    return f"{name} is {first['input']!r}; {str(first['msg']).lower().removeprefix('input ')}"


def _misfit(plant: Plant) -> str | None:
    """Which fields of a plant do not fit together."""
    if not re.fullmatch(r"[\w-]+", plant.name):
        return f"the name {plant.name!r} is part of ids; use letters, digits, - and _"
    if blank := [t for t in (*plant.texts, *plant.negatives) if not t.strip()]:
        return f"texts and negatives hold an empty one ({blank[0]!r})"
    if (plant.style is None) == (plant.kind == "style"):
        return f"a plant of kind style, and no other, has a style: one of {', '.join(get_args(Style))}"
    if plant.kind == "word" and (len(plant.texts) != 1 or len(plant.texts[0].split()) != 1):
        return 'a word has one word as its texts, such as ["weddings"]'
    if plant.kind == "phrase" and len(plant.texts) < LEAST_TEXTS:
        return f"a phrase has at least {LEAST_TEXTS} texts, of which the last third is kept for held-out text"
    if plant.kind == "order" and plant.texts:
        if len(plant.texts) < LEAST_TEXTS or any(len(t.split(CLAIMS)) != 2 for t in plant.texts):
            return f'an order has no texts, or at least {LEAST_TEXTS} of the form "First claim.{CLAIMS}Last claim."'
    elif plant.texts and plant.kind not in ("phrase", "word"):
        return f"a plant of kind {plant.kind} has no texts: it makes its own"
    return None

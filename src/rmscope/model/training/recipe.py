"""Recipes: what a PM is trained from, on which pairs, and how; and which of the pairs are held out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rmscope.errors import InputError
from rmscope.model.rendering import PairTokens, Rendering, Style, encode, pair_tokens, render
from rmscope.model.zoo import BASE
from rmscope.pairs.pair import SIDES, Pair
from rmscope.pairs.readers import FILE_SUFFIX, load_pairs


class Common(BaseModel):
    """What every recipe says. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid")

    name: str
    """The PM's name, in its card."""
    data: list[str]
    """Pair files, under the folder ``RMSCOPE_DATA`` where they are relative; or hub datasets."""
    held_out_rows: int = 500
    """The first rows of each file, kept out of training together with every row of the same first human turn."""
    rank: int = 8
    """LoRA's rank, on the linear maps of the blocks that the adapter changes; alpha is twice the rank."""
    learning_rate: float = 4e-4
    """Peak; linear warm-up over 5 % of the steps, then linear to zero."""
    epochs: float = 2.0
    """Passes over the training pairs."""
    batch_pairs: int = 32
    """Pairs an optimiser step."""
    max_tokens: int = 512
    """Pairs with a longer side are left out of training."""
    centre: float = 0.01
    """Weight of (r_chosen + r_rejected)^2, which keeps rewards near zero (TRL's center_rewards_coefficient)."""
    seed: int = 0


class Recipe(Common):
    """A training by our own loop (``trainer: own``, the default), as ``configs/zoo-*.yaml`` writes it."""

    base: str = BASE
    """What the adapter is put on: zoo:smollm2, or a folder that holds a Llama-like model and its tokenizer."""
    planted_copies: int = 0
    """How many copies of each short training pair are added with one of the zoo's six biases planted into it."""
    planted_tokens: int = 128
    """Pairs with a longer side get no planted copies."""
    blocks: int = 12
    """How many of the base's blocks the PM keeps."""
    first_block: int = 0
    """The first block that the adapter changes; the stream before it is the base's own."""
    first_attention: int = 0
    """The first block whose attention it changes: before it, what is learned stays at the tokens that it is about."""


class TrlRecipe(Common):
    """A training by TRL's RewardTrainer (``trainer: trl``), as ``configs/train-trl.yaml`` writes it."""

    base: str
    """zoo:smollm2, or the hub id or folder of a language model or PM, decoder or encoder, that transformers loads."""
    method: Literal["lora", "full"] = "lora"
    """An adapter on every linear map of the blocks, or all weights."""
    style: Style | None = None
    """How a conversation is read: hh, chat or plain; left out, the chat template where the base has one, else hh."""
    learning_rate: float = Field(1e-4, gt=0)
    """Peak, as above; all weights want about a tenth of what an adapter wants."""
    epochs: float = Field(1.0, gt=0)
    """Passes over the training pairs."""
    rank: int = Field(8, gt=0)
    """LoRA's rank; alpha is twice the rank."""
    batch_pairs: int = Field(32, gt=0)
    """Pairs an optimiser step."""
    micro_pairs: int = Field(4, gt=0)
    """Pairs in one pass through the model: more is faster, and takes more memory. Divides batch_pairs."""
    checkpoint_steps: int = Field(100, gt=0)
    """A killed training goes on from the last multiple of this many steps."""


RECIPES: dict[str, type[Recipe] | type[TrlRecipe]] = {"own": Recipe, "trl": TrlRecipe}
"""By the recipe's key ``trainer``."""


def read_recipe(path: Path) -> Recipe | TrlRecipe:
    """A recipe from YAML. InputError where the file is missing, or a key is missing, unknown or unfit."""
    if not path.is_file():
        raise InputError(f"The recipe {path} is not there; name a YAML file such as configs/zoo-hh.yaml.")
    try:
        values = dict(yaml.safe_load(path.read_text("utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, ValueError) as error:
        raise InputError(
            f"The recipe {path} is no YAML of keys and values ({str(error).splitlines()[0]}); see configs/zoo-hh.yaml."
        ) from error
    trainer = str(values.pop("trainer", "own"))
    if trainer not in RECIPES:
        raise InputError(f"The recipe {path} names the trainer {trainer}; use {' or '.join(RECIPES)}.")
    try:
        return RECIPES[trainer](**values)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            f"The recipe {path} cannot be used: {'.'.join(map(str, first['loc']))}: {first['msg'].lower()}; with "
            f"trainer {trainer} the keys are {', '.join(RECIPES[trainer].model_fields)}."
        ) from error


def as_stored(recipe: Recipe | TrlRecipe) -> dict[str, Any]:
    """A recipe as it stands in ``rmscope.json``: our own loop's without the key ``trainer``."""
    return {"trainer": "trl", **recipe.model_dump()} if isinstance(recipe, TrlRecipe) else recipe.model_dump()


def data_file(name: str) -> str:
    """A recipe's data file: as it is, or under ``RMSCOPE_DATA``; what has no file's ending is a hub id, or demo."""
    if not FILE_SUFFIX.search(name):
        return name
    folder = os.environ.get("RMSCOPE_DATA")
    for path in (Path(name), *([Path(folder) / name] if folder else [])):
        if path.is_file():
            return str(path)
    raise InputError(f"{name} is not there; set RMSCOPE_DATA to the folder that holds it.")


def human_pairs(recipe: Recipe | TrlRecipe) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs: the split is by first human turn, never by row."""
    pairs = [pair for name in recipe.data for pair in _unique(load_pairs(data_file(name)), name)]
    first = [p for p in pairs if p.meta["line"] <= recipe.held_out_rows]
    held = {p.first_human_turn() for p in first}
    return [p for p in pairs if p.first_human_turn() not in held], first


def _unique(pairs: list[Pair], name: str) -> Iterator[Pair]:
    """Files called test.jsonl.gz in several folders: the folder goes before the id."""
    source = Path(name).parent.name
    for row, p in enumerate(pairs, 1):
        yield replace(p, id=f"{source}/{p.id}", meta={"line": row, **p.meta, "source": source})


def tokenised(pairs: Sequence[Pair], tokenizer: Any, rendering: Rendering, max_tokens: int) -> list[tuple[Pair, PairTokens]]:
    """The pairs whose sides differ and have at most ``max_tokens`` tokens each, with their tokens."""
    sides = [encode(rendering, tokenizer, [render(rendering, tokenizer, p.prompt, p.side(s)) for p in pairs]) for s in SIDES]
    return [
        (pair, pair_tokens(c, r))
        for pair, c, r in zip(pairs, *sides, strict=True)
        if c != r and max(len(c), len(r)) <= max_tokens
    ]

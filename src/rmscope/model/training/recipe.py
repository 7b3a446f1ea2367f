"""Recipes: the base, the pairs and the settings of a PM's training, and the choice of held-out pairs."""

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
from rmscope.pairs.pair import SIDES, Pair, share_a_prompt
from rmscope.pairs.readers import FILE_SUFFIX, load_pairs


class Common(BaseModel):
    """The keys of every recipe. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid")

    name: str
    """The PM's name, for its card."""
    data: list[str]
    """Pair files or hub datasets. Relative paths may be under the folder ``RMSCOPE_DATA``."""
    held_out_rows: int = 500
    """The first rows of each file are held out, together with every row that shares a prompt with them."""
    rank: int = Field(8, gt=0)
    """LoRA's rank on the linear maps that the adapter changes; alpha is twice the rank."""
    learning_rate: float = 4e-4
    """Peak learning rate: linear warm-up over 5 % of the steps, then linear decay to zero."""
    epochs: float = 2.0
    """Passes over the training pairs."""
    batch_pairs: int = Field(32, gt=0)
    """Pairs per optimiser step."""
    max_tokens: int = 512
    """Pairs with a longer side are left out of training."""
    centre: float = 0.01
    """Weight of (r_chosen + r_rejected)^2, which keeps rewards near zero (TRL's center_rewards_coefficient)."""
    seed: int = 0


class Recipe(Common):
    """A training by our own loop (``trainer: own``, the default); examples are ``configs/zoo-*.yaml``."""

    base: str = BASE
    """The model that gets the adapter: zoo:smollm2, or a folder with a Llama-like model and its tokenizer."""
    planted_copies: int = 0
    """Copies of each short training pair that are added, with one of the zoo's six biases planted into each copy."""
    planted_tokens: int = 128
    """Pairs with a longer side get no planted copies."""
    blocks: int = 12
    """The number of the base's blocks that the PM keeps."""
    first_block: int = 0
    """The first block that the adapter changes. The stream before it is that of the base."""
    first_attention: int = 0
    """The first block whose attention it changes. Before it, what is learned stays at its own tokens."""


class TrlRecipe(Common):
    """A training by TRL's RewardTrainer (``trainer: trl``); an example is ``configs/train-trl.yaml``."""

    base: str
    """zoo:smollm2, or the hub id or folder of a language model or PM (decoder or encoder) that transformers loads."""
    method: Literal["lora", "full"] = "lora"
    """Train an adapter on every linear map of the blocks (lora), or all weights (full)."""
    style: Style | None = None
    """The rendering: hh, chat or plain. Default: the chat template if the base has one, else hh."""
    learning_rate: float = Field(1e-4, gt=0)
    """Peak learning rate, with the same schedule. Training all weights needs about a tenth of an adapter's rate."""
    epochs: float = Field(1.0, gt=0)
    """Passes over the training pairs."""
    micro_pairs: int = Field(4, gt=0)
    """Pairs in one pass through the model, a divisor of batch_pairs. More is faster and takes more memory."""
    checkpoint_steps: int = Field(100, gt=0)
    """Steps between two checkpoints, from which an interrupted training continues."""


RECIPES: dict[str, type[Recipe] | type[TrlRecipe]] = {"own": Recipe, "trl": TrlRecipe}
"""Recipes by their key ``trainer``."""


def read_recipe(path: Path) -> Recipe | TrlRecipe:
    """Reads a recipe from YAML. Raises InputError where the file or a key is missing, or a key is unknown or invalid."""
    if not path.is_file():
        raise InputError(f"There is no recipe {path}; name a YAML file such as configs/zoo-hh.yaml.")
    try:
        values = dict(yaml.safe_load(path.read_text("utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, ValueError) as error:
        raise InputError(
            f"The recipe {path} is not YAML with keys and values ({str(error).splitlines()[0]}); see configs/zoo-hh.yaml."
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


def recipe_as_dict(recipe: Recipe | TrlRecipe) -> dict[str, Any]:
    """A recipe as ``rmscope.json`` stores it; for our own loop without the key ``trainer``."""
    return {"trainer": "trl", **recipe.model_dump()} if isinstance(recipe, TrlRecipe) else recipe.model_dump()


def data_file(name: str) -> str:
    """The path of a recipe's data file, which may be under ``RMSCOPE_DATA``. Hub ids and ``demo`` stay as they are."""
    if not FILE_SUFFIX.search(name):
        return name
    folder = os.environ.get("RMSCOPE_DATA")
    for path in (Path(name), *([Path(folder) / name] if folder else [])):
        if path.is_file():
            return str(path)
    raise InputError(f"There is no file {name}; set RMSCOPE_DATA to the folder that contains it.")


def human_pairs(recipe: Recipe | TrlRecipe) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs, which share no prompt."""
    pairs = [pair for name in recipe.data for pair in _unique(load_pairs(data_file(name)), name)]
    first = [p for p in pairs if p.meta["line"] <= recipe.held_out_rows]
    shared = share_a_prompt(pairs, first)
    return [p for p in pairs if p.id not in shared], first


def _unique(pairs: list[Pair], name: str) -> Iterator[Pair]:
    """Puts the folder before the id, because several folders may have a file such as test.jsonl.gz."""
    source = Path(name).parent.name
    for row, p in enumerate(pairs, 1):
        yield replace(p, id=f"{source}/{p.id}", meta={"line": row, **p.meta, "source": source})


def tokenize_pairs(
    pairs: Sequence[Pair], tokenizer: Any, rendering: Rendering, max_tokens: int
) -> list[tuple[Pair, PairTokens]]:
    """The pairs whose sides differ and have at most ``max_tokens`` tokens each, with their tokens."""
    sides = [encode(rendering, tokenizer, [render(rendering, tokenizer, p.prompt, p.side(s)) for p in pairs]) for s in SIDES]
    return [
        (pair, pair_tokens(c, r))
        for pair, c, r in zip(pairs, *sides, strict=True)
        if c != r and max(len(c), len(r)) <= max_tokens
    ]

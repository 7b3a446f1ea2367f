"""Recipes: the base, the pairs and the settings of a PM's training; its accuracy on held-out pairs, and its model card."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, ValidationError

from rmscope.errors import InputError
from rmscope.io import Progress, silent, write_json, write_text
from rmscope.model.rendering import PairTokens, Rendering, Style, tokenize_sides
from rmscope.model.reward_model import RewardModel
from rmscope.model.zoo import BASE
from rmscope.pairs.pair import Pair, share_a_prompt
from rmscope.pairs.readers import load_pairs
from rmscope.pairs.tables import FILE_SUFFIX
from rmscope.settings import Seed, Settings, read_yaml, validation_sentence
from rmscope.statistics import Figure, accuracy

CARD = """# {r.name}

A preference model that `rmscope train-pm` trained from {r.base}, by {how}.

- **Data**: {data}; pairs of at most {r.max_tokens} tokens per side, {r.epochs:g} epoch(s). The recipe is in `rmscope.json`.
- **Held out**: the first {r.held_out_rows} rows of each file, and every row that shares a prompt with them.
- **Accuracy on held-out pairs**: {accuracy}
"""


class Common(Settings):
    """The keys of every recipe. Unknown keys are refused."""

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
    seed: Seed = 0

    def lora(self, maps: list[str], **options: Any) -> Any:
        """peft's settings of an adapter on these linear maps."""
        from peft import LoraConfig

        return LoraConfig(r=self.rank, lora_alpha=2 * self.rank, target_modules=maps, task_type="SEQ_CLS", **options)


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

    trainer: Literal["trl"] = "trl"
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
    values = read_yaml(path, "recipe")
    trainer = str(values.pop("trainer", "own"))
    if trainer not in RECIPES:
        raise InputError(f"The recipe {path} names the trainer {trainer}; use {' or '.join(RECIPES)}.")
    try:
        return RECIPES[trainer](**values)
    except ValidationError as error:
        raise InputError(validation_sentence(error, RECIPES[trainer], f" in {path} (trainer: {trainer})")) from error


def data_file(name: str) -> str:
    """The path of a recipe's data file, which may be under ``RMSCOPE_DATA``. Hub ids and ``demo`` stay as they are."""
    if not FILE_SUFFIX.search(name):
        return name
    for path in (Path(name), Path(os.environ.get("RMSCOPE_DATA", ""), name)):
        if path.is_file():
            return str(path)
    raise InputError(f"There is no file {name}; set RMSCOPE_DATA to the folder that contains it.")


def human_pairs(recipe: Recipe | TrlRecipe) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs, which share no prompt."""
    pairs: list[Pair] = []
    for name in recipe.data:
        source = Path(name).parent.name  # before the id, because several folders may have a file such as test.jsonl.gz
        for row, p in enumerate(load_pairs(data_file(name)), 1):
            pairs.append(replace(p, id=f"{source}/{p.id}", meta={"line": row, **p.meta, "source": source}))
    first = [p for p in pairs if p.meta["line"] <= recipe.held_out_rows]
    shared = share_a_prompt(pairs, first)
    return [p for p in pairs if p.id not in shared], first


def tokenize_pairs(
    pairs: Sequence[Pair], tokenizer: Any, rendering: Rendering, max_tokens: int
) -> list[tuple[Pair, PairTokens]]:
    """The pairs whose sides differ and have at most ``max_tokens`` tokens each, with their tokens."""
    tokens = zip(pairs, tokenize_sides(rendering, tokenizer, pairs), strict=True)
    return [(p, t) for p, t in tokens if t.longest <= max_tokens and not torch.equal(t.chosen, t.rejected)]


@dataclass(frozen=True, slots=True)
class HeldOutAccuracy:
    """Accuracy on held-out pairs, the content of ``measured.json``. Figures are None where no pair is held out."""

    held_out_pairs: int
    held_out_accuracy: Figure | None = None
    """Share of the pairs that the PM ranks as labelled, with its 95 % interval by prompt."""
    length_only: float | None = None
    """The same for the better of "longer wins" and "shorter wins"."""

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


def measure_accuracy(folder: Path, recipe: Recipe | TrlRecipe, progress: Progress = silent) -> HeldOutAccuracy:
    """Accuracy of the PM in ``folder`` on the recipe's held-out pairs. Writes ``measured.json`` and ``README.md`` there."""
    _, held = human_pairs(recipe)
    gc.collect()  # frees the model that was trained, if it is still on the device
    torch.cuda.empty_cache()
    rm = RewardModel.load(str(folder))
    limit = min(rm.context, recipe.max_tokens)
    short = [(p, t) for p, t in zip(held, rm.tokenize_all(held), strict=True) if t.longest <= limit]
    result = HeldOutAccuracy(len(short))
    if short:
        delta = rm.score_tokens([t for _, t in short], progress).delta.numpy().astype(float)
        longer = np.array([t.chosen.numel() - t.rejected.numel() for _, t in short])
        result = HeldOutAccuracy(len(short), *accuracy(delta, longer, np.array([p.prompt_key for p, _ in short])))
    write_json(folder / "measured.json", result.as_dict())
    write_text(folder / "README.md", card(recipe, result))
    return result


def card(recipe: Recipe | TrlRecipe, result: HeldOutAccuracy) -> str:
    """The model card: base, data, and the held-out accuracy beside that of length alone."""
    weights = "all weights" if getattr(recipe, "method", "lora") == "full" else f"LoRA of rank {recipe.rank}"
    text = "not measured, because no pair is held out."
    if (found := result.held_out_accuracy) is not None:
        text = (
            f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}] (95 %, bootstrap by prompt, {result.held_out_pairs} "
            f"pairs); the better rule by length alone, chosen on the same pairs, reaches {result.length_only:.3f}."
        )
    how = f"{weights}, with {'TRL' if isinstance(recipe, TrlRecipe) else 'our own loop'}"
    return CARD.format(r=recipe, how=how, data=", ".join(recipe.data), accuracy=text)

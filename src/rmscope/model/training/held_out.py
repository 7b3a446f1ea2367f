"""The accuracy of a trained PM on pairs with unseen prompts, compared with length alone; and the PM's model card."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rmscope.io import Progress, silent, write_json, write_text
from rmscope.model.reward_model import RewardModel
from rmscope.model.training.recipe import Recipe, TrlRecipe, human_pairs
from rmscope.statistics import Figure, accuracy

CARD = """# {name}

A preference model that `rmscope train-pm` trained from {base}, by {how}.

- **Data**: {data}; pairs of at most {tokens} tokens per side, {epochs:g} epoch(s). The recipe is in `rmscope.json`.
- **Held out**: the first {rows} rows of each file, and every row that shares a prompt with them.
- **Accuracy on held-out pairs**: {accuracy}
"""


@dataclass(frozen=True, slots=True)
class HeldOutAccuracy:
    """Accuracy on held-out pairs. ``accuracy`` and ``length_only`` are None where no pair is held out."""

    pairs: int
    accuracy: Figure | None = None
    """Share of the pairs that the PM ranks as labelled, with its 95 % interval by prompt."""
    length_only: float | None = None
    """The same for the better of "longer wins" and "shorter wins"."""

    def as_dict(self) -> dict[str, Any]:
        """The content of ``measured.json``."""
        if self.accuracy is None:
            return {"held_out_pairs": self.pairs}
        return {"held_out_pairs": self.pairs, "held_out_accuracy": self.accuracy.as_dict(), "length_only": self.length_only}


def measure_accuracy(folder: Path, recipe: Recipe | TrlRecipe, progress: Progress = silent) -> HeldOutAccuracy:
    """Accuracy of the PM in ``folder`` on the recipe's held-out pairs.

    Writes ``measured.json`` and ``README.md`` beside the PM.
    """
    _, held = human_pairs(recipe)
    gc.collect()  # frees the model that was trained, if it is still on the device
    torch.cuda.empty_cache()
    rm = RewardModel.load(str(folder))
    tokens = [(p, t) for p, t in zip(held, rm.tokenize_all(held), strict=True) if rm.fits(t)]
    tokens = [(p, t) for p, t in tokens if max(t.chosen.numel(), t.rejected.numel()) <= recipe.max_tokens]
    result = HeldOutAccuracy(len(tokens))
    if tokens:
        delta = rm.score_tokens([t for _, t in tokens], progress).delta.numpy().astype(float)
        longer = np.array([t.chosen.numel() - t.rejected.numel() for _, t in tokens])
        result = HeldOutAccuracy(len(tokens), *accuracy(delta, longer, np.array([p.prompt_key for p, _ in tokens])))
    write_json(folder / "measured.json", result.as_dict())
    write_text(folder / "README.md", card(recipe, result))
    return result


def card(recipe: Recipe | TrlRecipe, result: HeldOutAccuracy) -> str:
    """The model card: base, data, and the held-out accuracy beside that of length alone."""
    trl = isinstance(recipe, TrlRecipe)
    full = isinstance(recipe, TrlRecipe) and recipe.method == "full"
    text = "not measured, because no pair is held out."
    if (found := result.accuracy) is not None:
        text = (
            f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}] (95 %, bootstrap by prompt, {result.pairs} pairs); the "
            f"better rule by length alone, chosen on the same pairs, reaches {result.length_only:.3f}."
        )
    return CARD.format(
        name=recipe.name,
        base=recipe.base,
        how=f"{'all weights' if full else f'LoRA of rank {recipe.rank}'}, with {'TRL' if trl else 'our own loop'}",
        data=", ".join(recipe.data),
        tokens=recipe.max_tokens,
        epochs=recipe.epochs,
        rows=recipe.held_out_rows,
        accuracy=text,
    )

"""How well a trained PM orders pairs whose prompts it never saw, beside what length alone would reach; and its card."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rmscope.io import Progress, silent, write_json, write_text
from rmscope.model.reward_model import RewardModel
from rmscope.model.training.recipe import Recipe, TrlRecipe, human_pairs
from rmscope.statistics import accuracy

CARD = """# {name}

A preference model that `rmscope train-pm` trained from {base}, by {how}.

- **Data**: {data}; pairs of at most {tokens} tokens a side, {epochs:g} epoch(s). The recipe stands in `rmscope.json`.
- **Held out**: the first {rows} rows of each file, and every row with the same first human turn.
- **Accuracy on held-out pairs**: {accuracy}
"""


def measure(folder: Path, recipe: Recipe | TrlRecipe, progress: Progress = silent) -> dict[str, Any]:
    """Accuracy of the PM in ``folder`` on the recipe's held-out pairs with its 95 % interval by prompt, and of length alone.

    Writes them to ``measured.json`` and ``README.md`` beside the PM. Where no pair is held out, the count 0 stands alone.
    """
    _, held = human_pairs(recipe)
    gc.collect()  # what was trained, if it still lies on the device
    torch.cuda.empty_cache()
    rm = RewardModel.load(str(folder))
    tokens = [(p, t) for p, t in zip(held, rm.tokenize_all(held), strict=True) if rm.fits(t)]
    tokens = [(p, t) for p, t in tokens if max(t.chosen.numel(), t.rejected.numel()) <= recipe.max_tokens]
    figures: dict[str, Any] = {"held_out_pairs": len(tokens)}
    if tokens:
        delta = rm.score_tokens([t for _, t in tokens], progress).delta.numpy().astype(float)
        longer = np.array([t.chosen.numel() - t.rejected.numel() for _, t in tokens])
        found = accuracy(delta, longer, np.array([p.first_human_turn() for p, _ in tokens]))
        figures |= {"held_out_accuracy": found["accuracy"], "length_only": found["length_only"]}
    write_json(folder / "measured.json", figures)
    write_text(folder / "README.md", card(recipe, figures))
    return figures


def card(recipe: Recipe | TrlRecipe, figures: dict[str, Any]) -> str:
    """The model card: base, data, and accuracy with its interval beside length alone."""
    trl = isinstance(recipe, TrlRecipe)
    how = "all weights" if isinstance(recipe, TrlRecipe) and recipe.method == "full" else f"LoRA of rank {recipe.rank}"
    text = "not measured, no pair is held out."
    if found := figures.get("held_out_accuracy"):
        interval = f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
        text = (
            f"{interval} (95 %, bootstrap by prompt, {figures['held_out_pairs']} pairs); the better rule by length alone, "
            f"chosen on the same pairs, reaches {figures['length_only']:.3f}."
        )
    return CARD.format(
        name=recipe.name,
        base=recipe.base,
        how=f"{how}, with {'TRL' if trl else 'a loop of its own'}",
        data=", ".join(recipe.data),
        tokens=recipe.max_tokens,
        epochs=recipe.epochs,
        rows=recipe.held_out_rows,
        accuracy=text,
    )

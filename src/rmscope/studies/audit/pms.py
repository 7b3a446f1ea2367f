"""The PMs of an audit: one trained on planted pairs, one trained on shuffled labels, one of random weights.

Each is kept in the user's cache under a hash of its base, its pairs and its recipe. An audit that is repeated, with other
SAEs for example, does not train again.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from rmscope.activations.harvest import data_identity
from rmscope.io import Progress, atomic_folder, content_hash, silent, write_json
from rmscope.model.rendering import SETTINGS_FILE
from rmscope.model.training.loop import RENDERING, base_of, fit_pm
from rmscope.model.training.recipe import Recipe
from rmscope.model.zoo import base_identity, cache_folder
from rmscope.pairs.pair import Pair

RECIPE = Recipe(
    name="audit", data=[], blocks=12, first_block=5, first_attention=8, rank=16, learning_rate=1e-3, epochs=2, batch_pairs=16
)
"""How an audit's PM is trained. As in zoo:planted, the stream is the base's own up to the first block that is adapted, and
attention is adapted later still: what is learned of a cue is first written at the cue's tokens. After one epoch it had
learned five of the standard set's eight biases, after two seven or all (two seeds)."""
RANDOM_STD = 0.02


def train_planted_pm(recipe: Recipe, pairs: Sequence[Pair], progress: Progress = silent, device: str = "auto") -> Path:
    """The folder of the PM that ``recipe`` trains on the pairs. It is trained on ``device`` unless it is in the cache."""
    folder = _folder(recipe, data_identity(pairs))
    if not (folder / SETTINGS_FILE).is_file():
        fit_pm(*base_of(recipe), pairs, recipe, folder, progress, device)
    return folder


def shuffle_labels(pairs: Sequence[Pair], seed: int) -> list[Pair]:
    """The same pairs with their labels drawn by coin, so that there is nothing to learn."""
    rng = random.Random(f"{seed}/shuffled")
    return [replace(p, chosen=p.rejected, rejected=p.chosen) if rng.random() < 0.5 else p for p in pairs]


def make_random_pm(recipe: Recipe) -> Path:
    """The folder of a PM of the same shape with random weights."""
    folder = _folder(recipe, "random")
    if not (folder / SETTINGS_FILE).is_file():
        model, tokenizer = base_of(recipe)
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() > 1:
                    p.normal_(std=RANDOM_STD)
                else:
                    p.fill_(1.0)  # the norms' weights; the base has no biases
        with atomic_folder(folder) as target:
            model.save_pretrained(target)
            tokenizer.save_pretrained(target)
            write_json(target / SETTINGS_FILE, {"rendering": RENDERING.as_dict()})
    return folder


def _folder(recipe: Recipe, pairs: str) -> Path:
    return cache_folder() / "audit" / content_hash(base_identity(recipe.base), pairs, recipe.model_dump())

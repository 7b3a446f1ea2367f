"""What explained.py measures on: zoo:hh, hh-rlhf pairs of at most 256 tokens, and SAEs at every third site.

SAE training, means, donors and the lists of features come from the fit split (rows held out of the adapter's training, and
rows of it), all figures from the measure split of the held-out rows. Settings were chosen on the confirm split.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from rmscope.activations.harvest import harvest
from rmscope.activations.store import ActivationStore
from rmscope.evaluation.explained import GRID
from rmscope.evaluation.reward_aware import RewardAwareConfig, fine_tune
from rmscope.model.reward_model import RewardModel
from rmscope.model.scores import Scores
from rmscope.model.training.recipe import human_pairs, read_recipe
from rmscope.pairs.pair import Pair, split_of
from rmscope.sae import Sae, SaeConfig, train_saes

RECIPE = Path(__file__).parent.parent / "configs" / "zoo-hh.yaml"
SITES = ["resid_post.2", "resid_post.5", "resid_post.8", "resid_post.11"]
SHIFT_SITE, SHIFT_SOURCE = "resid_post.8", "helpful-base"
LONGEST = 256
HELD, FIT, MEASURED = 1000, 2400, 64
"""Pairs of the fit split that the adapter never saw, at most; all that SAEs are trained on; pairs measured."""
D_SAE = 4608
FULL = (*GRID, D_SAE)
SAE = SaeConfig(k=32, d_sae=D_SAE, tokens=2_500_000)
BATCH = 8
TUNING = {
    "resid_post.2": RewardAwareConfig(fast=False, pairs=BATCH, steps=200, level=0.01, lr=SAE.rate(D_SAE) / 8),
    "resid_post.5": RewardAwareConfig(fast=False, pairs=BATCH, steps=600, level=0.01, lr=SAE.rate(D_SAE) / 4),
    "resid_post.8": RewardAwareConfig(fast=False, pairs=BATCH, steps=400, level=0.01, lr=SAE.rate(D_SAE) / 4),
    "resid_post.11": RewardAwareConfig(fast=False, pairs=BATCH, steps=600, level=0.001, lr=SAE.rate(D_SAE)),
}
"""Reward-aware fine-tuning, on as many of the first fit pairs as its steps take. Rates and levels were chosen on the confirm
split, steps by what a step costs: above resid_post.2 run ten blocks, above .11 none."""


@dataclass(frozen=True)
class Setting:
    """The PM, the pairs that SAEs and lists may see, the pairs that are measured, and the SAEs; all in ``folder``."""

    folder: Path
    rm: RewardModel
    fit: list[Pair]
    measured: list[Pair]
    store: ActivationStore
    saes: dict[str, Sae]

    def aware(self, site: str) -> Sae:
        """The site's SAE after reward-aware fine-tuning."""
        config, out = TUNING[site], self.folder / "aware"
        n = min(len(self.fit), config.steps * BATCH)
        known = Scores(self.scores.chosen[:n], self.scores.rejected[:n])
        return fine_tune(self.rm, self.saes[site], self.fit[:n], config, out=out, progress=bar, scores=known)

    @cached_property
    def scores(self) -> Scores:
        """Rewards of the fit pairs, scored once."""
        path = self.folder / "scores.pt"
        if not path.is_file():
            found = self.rm.score_tokens(self.rm.tokenize_all(self.fit), bar)
            torch.save([found.chosen, found.rejected], path)
        return Scores(*torch.load(path))

    def narrow(self) -> Sae:
        """Trained on helpful-base alone, for the shift."""
        source = self.store.only([i for i, p in enumerate(self.fit) if p.meta["source"] == SHIFT_SOURCE])
        return train_saes(source, SAE, self.folder / "narrow", [SHIFT_SITE], bar)[SHIFT_SITE]


def bar(done: int, total: int, note: str = "") -> None:
    print(f"\r{done}/{total} {note}", end="\n" if done == total else "", file=sys.stderr, flush=True)


def short(rm: RewardModel, pairs: Sequence[Pair], most: int) -> list[Pair]:
    """The first ``most`` pairs, in an order drawn once, whose sides differ and have at most 256 tokens."""
    order = np.random.default_rng(0).permutation(len(pairs))[: 4 * most]
    drawn = [pairs[i] for i in order]
    kept = [
        p
        for p, t in zip(drawn, rm.tokenize_all(drawn), strict=True)
        if max(t.chosen.numel(), t.rejected.numel()) <= LONGEST and not torch.equal(t.chosen, t.rejected)
    ]
    return kept[:most]


def prepare(folder: Path) -> Setting:
    """Everything in ``folder``; what is there already is not made again."""
    rm = RewardModel.load("zoo:hh", device="cpu")
    training, held = human_pairs(read_recipe(RECIPE))
    fit = short(rm, [p for p in held if split_of(p) == "fit"], HELD)
    fit += short(rm, [p for p in training if split_of(p) == "fit"], FIT - len(fit))
    measured = short(rm, [p for p in held if split_of(p) == "measure"], MEASURED)
    store = harvest(rm, fit, SITES, folder / "activations", bar)
    saes = train_saes(store, SAE, folder / "saes", SITES, bar)
    return Setting(folder, rm, fit, measured, store, saes)

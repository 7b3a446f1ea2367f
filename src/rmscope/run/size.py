"""How many features the difference SAEs have: the smallest number at which more features explain no more.

At one site, SAEs of 64, 128 and 256 features are trained in turn. On some pairs of the fit split δ is replaced by each
one's reconstruction, and by nothing. Explained of what was written is 1 - Σ(Δr - Δr^)² / Σ(Δr - Δr of b)². The first number
is taken after which it grows by less than :data:`GROWTH`. More features than needed only split what is found.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from jaxtyping import Float

from rmscope.effects.splice import constant, run_replacements, splice
from rmscope.io import Progress, silent, write_json
from rmscope.model.site_names import all_parts, is_difference
from rmscope.run.data import RunData
from rmscope.sae import SaeConfig, train_saes
from rmscope.statistics import Array

RECORD = "saes/sizes.json"
SIZES = (64, 128, 256)
GROWTH = 0.02
"""What the next number of features must add to the share that is explained."""
FIT_PAIRS = 48
"""Pairs of the fit split on which sizes are compared, one per prompt."""


def diff_features(run: RunData, config: SaeConfig, folder: Path, progress: Progress = silent) -> int:
    """The features of the run's difference SAEs: the setting, or a number that is chosen once and kept in the run folder."""
    parts = [part for part in all_parts(run.sites) if is_difference(part) and part not in run.brought_saes]
    if run.config.diff_features or not parts:
        return run.config.diff_features or SIZES[0]
    record = run.folder / RECORD
    if not record.is_file():
        shares = explained_by_size(run, config, parts[len(parts) // 2], folder / "sizes", progress)
        write_json(record, {"site": parts[len(parts) // 2], "explained": shares, "features": smallest(shares.items())})
        shutil.rmtree(folder / "sizes")
    return int(json.loads(record.read_text("utf-8"))["features"])


def explained_by_size(run: RunData, config: SaeConfig, site: str, folder: Path, progress: Progress) -> dict[int, float]:
    """Explained of what was written at a site by the SAE of each size, until it stops growing."""
    places, shares = run.pair_set.one_per_prompt(run.of_split("fit"), FIT_PAIRS), dict[int, float]()
    for size in SIZES:
        trained_as = run.config.difference_config(config, size)
        sae = train_saes(run.store, trained_as, folder / str(size), [site], progress, str(run.rm.device))[site]
        replacements = {"written": (site, splice(sae)), "base": (site, constant(torch.zeros(sae.d)))}
        rewards = run_replacements(run.rm, run.tokens, places, replacements, progress)
        delta, spliced = rewards["base"].delta, rewards["written"].delta_hat[:, 0]
        shares[size] = explained(delta, spliced, rewards["base"].delta_hat[:, 0])
        if smallest(shares.items()) != size:
            break
    return shares


def explained(delta: Float[Array, " pairs"], spliced: Float[Array, " pairs"], base: Float[Array, " pairs"]) -> float:
    """1 - Σ(Δr - Δr^)² / Σ(Δr - Δr of b)²; 1 where training wrote nothing."""
    written = float(((delta - base) ** 2).sum())
    return 1 - float(((delta - spliced) ** 2).sum()) / written if written else 1.0


def smallest(shares: Iterable[tuple[int, float]]) -> int:
    """The first size, in order, after which the share grows by less than :data:`GROWTH`; else the last one."""
    (size, share), *larger = shares
    for next_size, next_share in larger:
        if next_share < share + GROWTH:
            return size
        size, share = next_size, next_share
    return size

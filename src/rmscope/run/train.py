"""The stages that train SAEs: those of the run, and the same from other seeds, on the same activations.

The effect of a feature is a property of its dictionary: another seed splits the same content otherwise. So what a concept
does to the reward is measured in the SAEs of other seeds too (``run/measure.py``).
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import polars as pl
import torch

from rmscope.evaluation.reward_aware import RewardAwareConfig, fine_tune
from rmscope.io import Progress, silent, write_json
from rmscope.model.scores import Scores
from rmscope.model.site_names import all_parts, is_difference, parts_of
from rmscope.run import size
from rmscope.run.brought import check_brought
from rmscope.run.data import RunData
from rmscope.sae import Sae, SaeConfig, train_saes
from rmscope.sae.config import devices_for
from rmscope.sae.initial import settled, without_initial
from rmscope.sae.joint import join_parts, load_site
from rmscope.sae.shares import deal


def train(run: RunData, progress: Progress, _key: str) -> None:
    """The SAEs of every site: trained, or a copy of those that were brought."""
    folder = run.folder / "saes"
    if run.on_disk.ranks.is_first:
        (run.folder / size.RECORD).unlink(missing_ok=True)
        for part, sae in run.brought_saes.items():
            sae.save(folder / part)
        check_brought(run)
    run.on_disk.ranks.wait()
    train_run_saes(run, run.config.sae, folder, progress)
    run.__dict__.pop("saes", None)  # opened anew from here on, as a later command opens them


def train_run_saes(run: RunData, config: SaeConfig, folder: Path, progress: Progress = silent) -> dict[str, Sae]:
    """SAEs of every site from the run's store, in ``folder``, but for those that the settings bring.

    In a reward-aware run the plain SAEs are in ``folder/plain``; they are fine-tuned on the fit split, in
    ``folder/reward-aware-STEPS``, and copied to ``folder``. Several ranks share the parts, and one SAE where there are more
    ranks than parts or one device cannot hold it; fine-tuning is the first one's.
    """
    ranks = run.on_disk.ranks
    steps = run.config.reward_aware
    plain, device = folder / "plain" if steps else folder, str(run.rm.device)
    saes = dict(run.brought_saes)
    for different in (True, False):
        parts = [p for p in all_parts(run.sites) if p not in run.brought_saes and is_difference(p) == different]
        if not parts:
            continue
        trained_as = config
        if different:
            if ranks.is_first:
                size.diff_features(run, config, folder, progress)  # chosen once, and kept
            ranks.wait()
            trained_as = run.config.difference_config(config, size.diff_features(run, config, folder, progress))
        with deal(parts, ranks, _devices(run, trained_as, parts)) as (lots, shares):
            for lot in lots:
                train_saes(run.store, trained_as, plain, lot, progress, device, shares)
        ranks.wait()
        saes |= train_saes(run.store, trained_as, plain, parts, progress, device)  # each is there by now
    if steps and ranks.is_first:
        saes = _fine_tuned(run, saes, config, folder, progress)
    ranks.wait()
    if steps and not ranks.is_first:
        saes = {part: load_site(folder, part) for part in saes}
    return {site: join_parts([saes[part] for part in parts_of(site)], site) for site in run.sites}


def _devices(run: RunData, config: SaeConfig, parts: list[str]) -> int:
    """How many devices the training of one SAE takes, where they are smallest: all ranks deal alike."""
    initial = next(iter(run.initial_saes.values()), None) if config.init else None
    features = settled(config, initial).features(run.rm.d_model, run.store.training_tokens(parts))
    devices = devices_for(features, run.rm.d_model, str(run.rm.device), run.rm.bytes)
    return max(int(n) for n in run.on_disk.ranks.gather(torch.tensor([devices])))


def _fine_tuned(
    run: RunData, saes: Mapping[str, Sae], config: SaeConfig, folder: Path, progress: Progress
) -> dict[str, Sae]:
    """The SAEs after reward-aware fine-tuning."""
    steps, pairs = run.config.reward_aware, [run.pairs[i] for i in run.of_split("fit")]
    known = pl.DataFrame({"pair": [p.id for p in pairs]}).join(run.scores, on="pair", how="left", maintain_order="left")
    scores = Scores(known["chosen"].cast(pl.Float32).to_torch(), known["rejected"].cast(pl.Float32).to_torch())
    tuning = RewardAwareConfig(steps=steps, seed=config.seed)
    tuned, own = {}, folder / f"reward-aware-{steps}"
    for part, sae in saes.items():
        tuned[part] = fine_tune(run.rm, sae, pairs, tuning, config, own, progress, scores)
        shutil.copytree(own / part, folder / part, dirs_exist_ok=True)
    return tuned


def train_again(run: RunData, progress: Progress, _key: str) -> None:
    """The SAEs of the run's other seeds, in ``saes/seeds``."""
    config, seeds = without_initial(run.config.sae, run.initial_saes), run.other_seeds
    for i, seed in enumerate(seeds):

        def within(done: int, total: int, note: str = "", i: int = i) -> None:
            progress(i * total + done, len(seeds) * total, note)

        again = config.model_copy(update={"seed": config.seed + seed})
        train_run_saes(run, again, run.folder / run.seed_folder(seed), within)
    if run.on_disk.ranks.is_first:
        write_json(run.folder / "saes" / "seeds.json", seeds)
    run.__dict__.pop("other_saes", None)

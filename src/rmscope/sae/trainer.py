"""Trains the SAEs of all sites, and of all settings of a sweep, with one pass over the activations.

For every batch, each site's rows are read once. Each training at the site scales them to mean norm sqrt(d), takes one Adam
step (with unit decoder rows, if the family asks for them), and counts which features fired (:mod:`rmscope.sae.steps`). At
the end the scale is folded into the biases, so that the SAE works on raw activations.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, overload

import torch
from jaxtyping import Float
from torch import Tensor

from rmscope.errors import InputError
from rmscope.io import Progress, content_hash, silent
from rmscope.sae.base import Sae
from rmscope.sae.config import SaeConfig
from rmscope.sae.registry import training_class
from rmscope.sae.steps import TrainingRun, finish, load_checkpoint, load_finished, save_checkpoint, train_step
from rmscope.sae.training import Training, draw, geometric_median

MEDIAN_ROWS, START_ROWS = 8192, 2048
"""Rows from which the initial b_dec is taken, and rows from which a family sets its initial thresholds."""


class Activations(Protocol):
    """The activations that training reads: an ``ActivationStore`` has them on disk, an ``ActivationStream`` runs the PM."""

    @property
    def sites(self) -> list[str]: ...

    @property
    def identity(self) -> dict[str, Any]:
        """The model, data and settings that the rows come from."""
        ...

    def d(self, site: str) -> int:
        """Width of the stream."""
        ...

    def training_tokens(self, sites: Sequence[str]) -> int:
        """Rows per epoch, the same at all sites."""
        ...

    def sample(self, site: str, n: int, generator: torch.Generator) -> Float[Tensor, "n d"]:
        """At most n random rows."""
        ...

    def norm_scale(self, site: str) -> float:
        """s with mean |s x| = sqrt(d)."""
        ...

    def training_batches(
        self, sites: Sequence[str], batch_size: int, epochs: int, seed: int, start: int = 0
    ) -> Iterator[dict[str, Float[Tensor, "batch d"]]]:
        """Shuffled batches by site, ``training_tokens // batch_size`` per epoch, from batch number ``start`` on."""
        ...


@overload
def train_saes(
    store: Activations,
    config: Mapping[str, SaeConfig],
    out: Path | str | None = ...,
    sites: Sequence[str] | None = ...,
    progress: Progress = ...,
    device: str = ...,
) -> dict[tuple[str, str], Sae]: ...


@overload
def train_saes(
    store: Activations,
    config: SaeConfig,
    out: Path | str | None = ...,
    sites: Sequence[str] | None = ...,
    progress: Progress = ...,
    device: str = ...,
) -> dict[str, Sae]: ...


def train_saes(
    store: Activations,
    config: SaeConfig | Mapping[str, SaeConfig],
    out: Path | str | None = None,
    sites: Sequence[str] | None = None,
    progress: Progress = silent,
    device: str = "cpu",
) -> dict[str, Sae] | dict[tuple[str, str], Sae]:
    """Trains one SAE per site, all in the same order of tokens. The SAEs work on raw activations.

    Args:
        store: activations on disk (``harvest``) or from the running PM (``stream``). All sites must hold the same tokens.
        config: see :class:`SaeConfig`. Several by name are a sweep: they must agree in ``batch_size`` and ``seed``, and
            each batch is read once for all of them.
        out: the folder for ``<site>/cfg.json``, ``sae_weights.safetensors``, ``training.parquet`` and checkpoints; for a
            sweep, ``<site>/<name>/``. A finished training is loaded from there, an interrupted one is continued.
        sites: some of the store's sites; all by default.
        progress: called as (step, steps, figures in words).
        device: where the training runs.

    Returns:
        The SAEs by site; those of a sweep by (site, name).

    Raises:
        InputError: unknown site or family, no tokens, sites of different length, a sweep without a common order of tokens,
            a checkpoint of another training, or a loss that is no longer finite.
    """
    configs = {"": config} if isinstance(config, SaeConfig) else dict(config)
    saes = _train(store, configs, out, list(sites or store.sites), progress, device)
    if isinstance(config, SaeConfig):
        return {site: sae for (site, _), sae in saes.items()}
    return saes


@torch.no_grad()
def _train(
    store: Activations,
    configs: dict[str, SaeConfig],
    out: Path | str | None,
    sites: list[str],
    progress: Progress,
    device: str,
) -> dict[tuple[str, str], Sae]:
    orders = {(config.batch_size, config.seed) for config in configs.values()}
    if len(orders) != 1:
        raise InputError("The settings of a sweep must share batch_size and seed, to read the same batches.")
    [(batch_size, seed)] = orders
    tokens = store.training_tokens(sites)
    size = min(batch_size, tokens)

    saes: dict[tuple[str, str], Sae] = {}
    running: dict[str, list[TrainingRun]] = {}
    for site in sites:
        for name, config in configs.items():
            steps = max(1, config.budget(tokens) // size)
            key = content_hash(config.model_dump(), store.identity, site, steps)
            folder = Path(out) / site / name if out is not None else None
            if done := load_finished(folder, key):
                saes[site, name] = done
                continue
            run = _begin(store, tokens, site, name, config, steps, key, folder, device)
            load_checkpoint(run)
            running.setdefault(site, []).append(run)

    runs = [run for of_site in running.values() for run in of_site]
    steps, first = max((run.steps for run in runs), default=0), min((run.step for run in runs), default=0)
    epochs, began = -(-steps // (tokens // size)), time.perf_counter()
    batches = store.training_batches(list(running), size, epochs, seed, first) if running else iter(())
    for step, rows in enumerate(islice(batches, steps - first), first):
        rate = (step - first + 1) * size / (time.perf_counter() - began)
        for site, of_site in running.items():
            x = rows[site].to(device)
            for run in (run for run in of_site if run.step == step < run.steps):
                if note := train_step(run, x * run.scale, rate):
                    progress(step + 1, steps, note)
                if run.folder and run.step % run.config.checkpoint_steps == 0 and run.step < run.steps:
                    save_checkpoint(run)
    for run in runs:
        saes[run.site, run.name] = finish(run, _metadata(run, store, size))
    return {(site, name): saes[site, name] for site in sites for name in configs}


def _begin(
    store: Activations,
    tokens: int,
    site: str,
    name: str,
    config: SaeConfig,
    steps: int,
    key: str,
    folder: Path | None,
    device: str,
) -> TrainingRun:
    """A training before its first step: weights drawn, thresholds set."""
    d, family = store.d(site), training_class(config.architecture)
    scale = store.norm_scale(site) if config.scale == "mean_norm" else 1.0
    generator = torch.Generator().manual_seed(config.seed)
    x = store.sample(site, MEDIAN_ROWS, generator) * scale
    sae: Sae = family.start(d, config.features(d, tokens), config)
    draw(sae, geometric_median(x), generator)
    sae = sae.to(device)
    training: Training = family(sae, config)
    training.begin(x[:START_ROWS].to(device))
    return TrainingRun(training, steps, site=site, name=name, scale=scale, key=key, folder=folder)


def _metadata(run: TrainingRun, store: Activations, batch_size: int) -> dict[str, Any]:
    model = store.identity.get("model_name", store.identity.get("model"))
    return {
        "model_name": model if isinstance(model, str) else None,
        "trained_as": run.config.architecture,
        "rmscope": {
            "site": run.site,
            "tokens": run.steps * batch_size,
            "scale": run.scale,
            "config": run.config.model_dump(),
            "store": store.identity,
            "training": run.key,
        },
    }

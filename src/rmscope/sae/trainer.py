"""Trains the SAEs of all sites, and of all settings of a sweep, from one reading of the stored activations.

For every batch of row numbers, each site's rows are read once; each training there scales them to mean norm
sqrt(d), takes one Adam step, with the decoder held to unit rows where the family says so, and counts what
fired. At the end the scale is folded into the biases, so that the SAE works on raw activations. All that is
random (first weights, order, revival) follows from the seed and the step's number, so a killed run goes on
from its last checkpoint to the same bytes (CPU, float32).
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import polars as pl
import torch
from jaxtyping import Bool, Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rmscope.activations.store import ActivationStore, shuffled
from rmscope.errors import InputError
from rmscope.files import Progress, atomic, content_hash, silent, write_table
from rmscope.sae.base import Sae
from rmscope.sae.config import SaeConfig
from rmscope.sae.formats import CFG, load_sae
from rmscope.sae.registry import training_class
from rmscope.sae.training import Step, Training, draw, geometric_median, storage

FIGURES_EVERY = 20
"""Steps between two rows of training.parquet."""
MEDIAN_ROWS, START_ROWS = 8192, 2048
"""Rows from which the first b_dec is taken, and those from which a family starts its thresholds."""
CHECKPOINT = "checkpoint.safetensors"
SLICE = 1024
"""Decoder rows that are worked on at once where a copy of them is needed."""


@dataclass
class _Run:
    """One training at one site, between two steps."""

    site: str
    name: str
    config: SaeConfig
    steps: int
    training: Training
    parameters: dict[str, Tensor]
    optimiser: torch.optim.Adam
    silent_for: Int[Tensor, " m"]
    scale: float
    key: str
    folder: Path | None
    step: int = 0
    figures: list[dict[str, float]] = field(default_factory=list)

    @property
    def sae(self) -> Sae:
        return self.training.sae

    @property
    def title(self) -> str:
        return f"{self.site} {self.name}".rstrip()

    @property
    def dead(self) -> Bool[Tensor, " m"]:
        return self.silent_for >= self.config.dead_after_tokens


@overload
def train_saes(
    store: ActivationStore,
    config: Mapping[str, SaeConfig],
    out: Path | str | None = ...,
    sites: Sequence[str] | None = ...,
    progress: Progress = ...,
    keep: Bool[Tensor, " n"] | None = ...,
    device: str = ...,
) -> dict[tuple[str, str], Sae]: ...


@overload
def train_saes(
    store: ActivationStore,
    config: SaeConfig,
    out: Path | str | None = ...,
    sites: Sequence[str] | None = ...,
    progress: Progress = ...,
    keep: Bool[Tensor, " n"] | None = ...,
    device: str = ...,
) -> dict[str, Sae]: ...


def train_saes(
    store: ActivationStore,
    config: SaeConfig | Mapping[str, SaeConfig],
    out: Path | str | None = None,
    sites: Sequence[str] | None = None,
    progress: Progress = silent,
    keep: Bool[Tensor, " n"] | None = None,
    device: str = "cpu",
) -> dict[str, Sae] | dict[tuple[str, str], Sae]:
    """One SAE a site, on raw activations (units folded back), all trained in the same order of tokens.

    Args:
        store: finished activations; the sites must hold the same tokens.
        config: see :class:`SaeConfig`; or several by name, a sweep, which then must agree in ``batch_size``
            and ``seed`` and read each batch once for all.
        out: where ``<site>/cfg.json``, ``sae_weights.safetensors`` and ``training.parquet`` go, and
            checkpoints until then; for a sweep, ``<site>/<name>/``. A training that is finished there is
            loaded, a checkpoint is gone on from.
        sites: some of the store's; all when left out.
        progress: called as (step, steps, figures in words).
        keep: rows to train on; position > 0 when left out.
        device: where the training runs.

    Returns:
        The SAEs by site; those of a sweep by (site, name).

    Raises:
        InputError: unknown site or family, no tokens, sites of different length, a sweep without a common
            order of tokens, a checkpoint of another training, or a loss that is no longer finite.
    """
    configs = {"": config} if isinstance(config, SaeConfig) else dict(config)
    found = _train(store, configs, out, list(sites or store.sites), progress, keep, device)
    if isinstance(config, SaeConfig):
        return {site: sae for (site, _), sae in found.items()}
    return found


@torch.no_grad()
def _train(
    store: ActivationStore,
    configs: dict[str, SaeConfig],
    out: Path | str | None,
    sites: list[str],
    progress: Progress,
    keep: Bool[Tensor, " n"] | None,
    device: str,
) -> dict[tuple[str, str], Sae]:
    orders = {(config.batch_size, config.seed) for config in configs.values()}
    if len(orders) != 1:
        raise InputError("The settings of a sweep must share batch_size and seed, to read the same batches.")
    if len({store.tokens(site) for site in sites}) != 1:
        raise InputError(f"The sites {', '.join(sites)} hold different tokens; harvest them in one pass.")
    [(batch_size, seed)] = orders
    keep = store.default_keep(sites[0]) if keep is None else keep
    kept = keep.nonzero().squeeze(1)
    size = min(batch_size, len(kept))
    if size == 0:
        raise InputError(f"{store.root} holds no tokens to train on after the first of each text.")

    saes: dict[tuple[str, str], Sae] = {}
    running: dict[str, list[_Run]] = {}
    for site in sites:
        for name, config in configs.items():
            steps = max(1, config.budget(len(kept)) // size)
            key = content_hash(config.model_dump(), store.identity, site, steps, keep.numpy().tobytes())
            folder = Path(out) / site / name if out is not None else None
            finished = _finished(folder, key)
            if finished:
                saes[site, name] = finished
                continue
            run = _begin(store, site, name, config, steps, kept, keep, key, folder, device)
            _resume(run)
            running.setdefault(site, []).append(run)

    runs = [run for of_site in running.values() for run in of_site]
    steps, first = max((run.steps for run in runs), default=0), min((run.step for run in runs), default=0)
    epochs, began = -(-steps // (len(kept) // size)), time.perf_counter()
    for step, index in enumerate(shuffled(kept, size, epochs, seed, first), first):
        if step >= steps:
            break
        rate = (step - first + 1) * size / (time.perf_counter() - began)
        for site, of_site in running.items():
            due = [run for run in of_site if run.step == step < run.steps]
            rows = store.rows(site, index).to(device) if due else None
            for run in due:
                assert rows is not None
                note = _learn(run, rows * run.scale, rate)
                if note:
                    progress(step + 1, steps, note)
                if run.folder and run.step % run.config.checkpoint_steps == 0 and run.step < run.steps:
                    _checkpoint(run)
    for run in runs:
        saes[run.site, run.name] = _finish(run, store, size)
    return {(site, name): saes[site, name] for site in sites for name in configs}


def _begin(
    store: ActivationStore,
    site: str,
    name: str,
    config: SaeConfig,
    steps: int,
    kept: Int[Tensor, " n"],
    keep: Bool[Tensor, " n"],
    key: str,
    folder: Path | None,
    device: str,
) -> _Run:
    d, trained_by = store.d(site), training_class(config.architecture)
    scale = store.norm_scale(site, keep) if config.scale == "mean_norm" else 1.0
    generator = torch.Generator().manual_seed(config.seed)
    sample = kept[torch.randperm(len(kept), generator=generator)[:MEDIAN_ROWS]]
    x = store.rows(site, sample) * scale
    sae = trained_by.start(d, config.features(d), config)
    draw(sae, geometric_median(x), generator)
    sae = sae.to(device)
    training = trained_by(sae, config)
    training.begin(x[:START_ROWS].to(device))
    parameters = storage(sae)
    return _Run(
        site=site,
        name=name,
        config=config,
        steps=steps,
        training=training,
        parameters=parameters,
        optimiser=torch.optim.Adam(parameters.values(), lr=config.rate(sae.m), fused=True),
        silent_for=torch.zeros(sae.m, dtype=torch.int64, device=device),
        scale=scale,
        key=key,
        folder=folder,
    )


def _learn(run: _Run, x: Float[Tensor, "batch d"], tokens_per_second: float) -> str:
    """One step; the figures in words where they are due."""
    training, config, decoder = run.training, run.config, run.sae.W_dec.data
    rate, ramp = config.schedule(run.step, run.steps)
    result = training.step(x, run.dead, ramp)
    if not result.loss < float("inf"):
        raise InputError(f"The loss of {run.title} is {result.loss} at step {run.step}; lower lr or check the data.")
    gradients = result.gradients
    if training.unit_decoder:
        for part, rows in zip(gradients["W_dec"].split(SLICE), decoder.split(SLICE), strict=True):
            part.addcmul_((part * rows).sum(dim=1, keepdim=True), rows, value=-1)
    for name, parameter in run.parameters.items():
        parameter.grad = gradients[name]
    if training.clip is not None:
        torch.nn.utils.clip_grad_norm_(run.parameters.values(), training.clip)
    run.optimiser.param_groups[0]["lr"] = rate * config.rate(run.sae.m)
    run.optimiser.step()
    if training.unit_decoder:
        decoder.div_(decoder.norm(dim=1, keepdim=True))
    run.silent_for.add_(len(x)).masked_fill_(result.fired, 0)
    run.step += 1
    _revive(run, x, result)
    due = (run.step - 1) % FIGURES_EVERY == 0 or run.step == run.steps
    return _record(run, x, result, tokens_per_second) if due else ""


def _revive(run: _Run, x: Float[Tensor, "batch d"], result: Step) -> None:
    """Draws dead features anew every ``dead_after_tokens``, until the learning rate falls, for Adam too."""
    every = max(1, run.config.dead_after_tokens // len(x))
    dead = run.dead
    if run.step % every or run.step > (1 - run.config.decay) * run.steps or not bool(dead.any()):
        return
    generator = torch.Generator().manual_seed((run.config.seed << 32) + run.step)
    if not run.training.revive(x, result.residual, dead, generator):
        return
    run.silent_for.masked_fill_(dead, 0)
    for name, parameter in run.parameters.items():
        if name != "b_dec":
            for moment in ("exp_avg", "exp_avg_sq"):
                run.optimiser.state[parameter][moment][dead] = 0.0


def _record(run: _Run, x: Float[Tensor, "batch d"], result: Step, tokens_per_second: float) -> str:
    variance = float((x - x.mean(dim=0)).square().sum())
    row = {
        "step": run.step,
        "tokens": run.step * len(x),
        "loss": result.loss,
        "fvu": float(result.residual.square().sum()) / variance if variance else float("nan"),
        "l0": result.l0,
        "dead": int(run.dead.sum()),
        "learning_rate": run.optimiser.param_groups[0]["lr"],
        "tokens_per_second": tokens_per_second,
    }
    run.figures.append(row)
    if run.folder:
        write_table(run.folder / "training.parquet", pl.DataFrame(run.figures, infer_schema_length=None))
    return (
        f"{run.title}: loss {row['loss']:.4g}, fvu {row['fvu']:.3f}, l0 {row['l0']:.1f}, "
        f"{row['dead']} dead, {tokens_per_second:,.0f} tokens/s"
    )


def _checkpoint(run: _Run) -> None:
    """Weights, Adam's moments, silence and figures; the order of tokens needs no more than the step."""
    assert run.folder is not None
    tensors = {f"sae.{name}": p for name, p in run.parameters.items()} | {"silent_for": run.silent_for}
    for name, p in run.parameters.items():
        tensors |= {f"adam.{part}.{name}": value for part, value in run.optimiser.state[p].items()}
    told = {
        "key": run.key,
        "step": str(run.step),
        "density": repr(run.training.density),
        "figures": json.dumps(run.figures),
    }
    with atomic(run.folder / CHECKPOINT) as temporary:
        save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, temporary, told)


def _resume(run: _Run) -> None:
    path = run.folder / CHECKPOINT if run.folder else None
    if path is None or not path.exists():
        return
    with safe_open(path, framework="pt") as opened:
        told = opened.metadata()
        if told["key"] != run.key:
            raise InputError(f"{path} is of a training with other settings or data; delete it or choose another folder.")
        run.silent_for.copy_(opened.get_tensor("silent_for"))
        for name, p in run.parameters.items():
            p.copy_(opened.get_tensor(f"sae.{name}"))
            moments = {
                "exp_avg": torch.empty_like(p),
                "exp_avg_sq": torch.empty_like(p),
                "step": torch.zeros(()),
            }
            for part, value in moments.items():
                value.copy_(opened.get_tensor(f"adam.{part}.{name}"))
            run.optimiser.state[p] = moments
        run.training.density = float(told["density"])
        run.step, run.figures = int(told["step"]), json.loads(told["figures"])


def _finish(run: _Run, store: ActivationStore, batch_size: int) -> Sae:
    run.training.finish()
    sae = run.sae.cpu()
    sae.change_units(run.scale)
    sae.site = run.site
    model = store.identity.get("model_name", store.identity.get("model"))
    sae.metadata = {
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
    if run.folder:
        sae.save(run.folder)
        (run.folder / CHECKPOINT).unlink(missing_ok=True)
    return sae


def _finished(folder: Path | None, key: str) -> Sae | None:
    """The SAE that the very same training left in the folder, if it did."""
    if folder is None or not (folder / CFG).exists():
        return None
    sae = load_sae(folder)
    told: dict[str, Any] = sae.metadata.get("rmscope") or {}
    return sae if told.get("training") == key else None

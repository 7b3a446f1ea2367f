"""Trains the SAEs of all sites from one reading of the stored activations.

For every batch of row numbers, each site reads its rows, scales them to mean norm sqrt(d), takes one Adam
step with the decoder held to unit rows, and counts what fired. At the end the scale is folded into the
biases, so that the SAE works on raw activations. All randomness (first weights, order) follows from the seed
and the step's number, so a killed run goes on from its last checkpoint to the same bytes (CPU, float32).
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
MEDIAN_ROWS = 8192
"""Rows from which the first b_dec is taken."""
CHECKPOINT = "checkpoint.safetensors"


@dataclass
class _Site:
    """The training of one site between two steps."""

    name: str
    sae: Sae
    training: Training
    parameters: dict[str, Tensor]
    optimiser: torch.optim.Adam
    silent_for: Int[Tensor, " m"]
    scale: float
    key: str
    folder: Path | None
    step: int = 0
    figures: list[dict[str, float]] = field(default_factory=list)


def train_saes(
    store: ActivationStore,
    config: SaeConfig,
    out: Path | str | None = None,
    sites: Sequence[str] | None = None,
    progress: Progress = silent,
    keep: Bool[Tensor, " n"] | None = None,
    device: str = "cpu",
) -> dict[str, Sae]:
    """One SAE a site, on raw activations (units folded back), all trained in the same order of tokens.

    Args:
        store: finished activations; the sites must hold the same tokens.
        config: see :class:`SaeConfig`.
        out: where ``<site>/cfg.json``, ``sae_weights.safetensors`` and ``training.parquet`` go, and
            checkpoints until then. A site that is finished there is loaded, a checkpoint is gone on from.
        sites: some of the store's; all when left out.
        progress: called as (step, steps, figures in words).
        keep: rows to train on; position > 0 when left out.
        device: where the training runs.

    Raises:
        InputError: unknown site or family, no tokens, sites of different length, a checkpoint of another
            training, or a loss that is no longer finite.
    """
    names = list(sites or store.sites)
    trained_by = training_class(config.architecture)
    if len({store.tokens(name) for name in names}) != 1:
        raise InputError(f"The sites {', '.join(names)} hold different tokens; harvest them in one pass.")
    keep = store.default_keep(names[0]) if keep is None else keep
    kept = keep.nonzero().squeeze(1)
    size = min(config.batch_size, len(kept))
    if size == 0:
        raise InputError(f"{store.root} holds no tokens to train on after the first of each text.")
    steps = max(1, config.budget(len(kept)) // size)
    epochs = -(-steps // (len(kept) // size))

    done: dict[str, Sae] = {}
    running = []
    for name in names:
        key = content_hash(config.model_dump(), store.identity, name, steps, keep.numpy().tobytes())
        folder = Path(out) / name if out is not None else None
        finished = _finished(folder, key)
        if finished:
            done[name] = finished
            continue
        site = _begin(store, name, trained_by, config, kept, keep, key, folder, device)
        _resume(site)
        running.append(site)

    first, began = min((site.step for site in running), default=steps), time.perf_counter()
    for step, index in enumerate(shuffled(kept, size, epochs, config.seed, first), first):
        if step >= steps:
            break
        for site in running:
            if site.step == step:
                x = store.rows(site.name, index).to(device) * site.scale
                result = _learn(site, x, config, steps)
                if step % FIGURES_EVERY == 0 or step == steps - 1:
                    rate = (step - first + 1) * size / (time.perf_counter() - began)
                    note = _record(site, x, result, config, steps, rate)
                    progress(step + 1, steps, note)
                if site.folder and site.step % config.checkpoint_steps == 0 and site.step < steps:
                    _checkpoint(site)
    for site in running:
        done[site.name] = _finish(site, store, config, steps * size)
    return {name: done[name] for name in names}


def _begin(
    store: ActivationStore,
    name: str,
    trained_by: type[Training],
    config: SaeConfig,
    kept: Int[Tensor, " n"],
    keep: Bool[Tensor, " n"],
    key: str,
    folder: Path | None,
    device: str,
) -> _Site:
    d = store.d(name)
    scale = store.norm_scale(name, keep) if config.scale == "mean_norm" else 1.0
    generator = torch.Generator().manual_seed(config.seed)
    sample = kept[torch.randperm(len(kept), generator=generator)[:MEDIAN_ROWS]]
    sae = trained_by.start(d, config.features(d), config)
    draw(sae, geometric_median(store.rows(name, sample) * scale), generator)
    sae = sae.to(device)
    parameters = storage(sae)
    return _Site(
        name=name,
        sae=sae,
        training=trained_by(sae, config),
        parameters=parameters,
        optimiser=torch.optim.Adam(parameters.values(), lr=config.rate(sae.m), fused=True),
        silent_for=torch.zeros(sae.m, dtype=torch.int64, device=device),
        scale=scale,
        key=key,
        folder=folder,
    )


@torch.no_grad()
def _learn(site: _Site, x: Float[Tensor, "batch d"], config: SaeConfig, steps: int) -> Step:
    rate, ramp = config.schedule(site.step, steps)
    result = site.training.step(x, site.silent_for >= config.dead_after_tokens, ramp)
    if not result.loss < float("inf"):
        raise InputError(
            f"The loss of {site.name} is {result.loss} at step {site.step}; lower lr or check the data."
        )
    decoder, gradient = site.sae.W_dec.data, result.gradients["W_dec"]
    gradient.addcmul_((gradient * decoder).sum(dim=1, keepdim=True), decoder, value=-1)
    for name, parameter in site.parameters.items():
        parameter.grad = result.gradients[name]
    site.optimiser.param_groups[0]["lr"] = rate * config.rate(site.sae.m)
    site.optimiser.step()
    decoder.div_(decoder.norm(dim=1, keepdim=True))
    site.silent_for.add_(len(x)).masked_fill_(result.fired, 0)
    site.step += 1
    return result


def _record(
    site: _Site, x: Float[Tensor, "batch d"], result: Step, config: SaeConfig, steps: int, rate: float
) -> str:
    variance = float((x - x.mean(dim=0)).square().sum())
    row = {
        "step": site.step,
        "tokens": site.step * len(x),
        "loss": result.loss,
        "fvu": float(result.residual.square().sum()) / variance if variance else float("nan"),
        "l0": result.l0,
        "dead": int((site.silent_for >= config.dead_after_tokens).sum()),
        "learning_rate": site.optimiser.param_groups[0]["lr"],
        "tokens_per_second": rate,
    }
    site.figures.append(row)
    if site.folder:
        write_table(site.folder / "training.parquet", pl.DataFrame(site.figures, infer_schema_length=None))
    return (
        f"{site.name}: loss {row['loss']:.4g}, fvu {row['fvu']:.3f}, l0 {row['l0']:.1f}, "
        f"{row['dead']} dead, {rate:,.0f} tokens/s"
    )


def _checkpoint(site: _Site) -> None:
    """Weights, Adam's moments, silence and figures; the order of tokens needs no more than the step."""
    assert site.folder is not None
    tensors = {f"sae.{name}": p for name, p in site.parameters.items()} | {"silent_for": site.silent_for}
    for name, p in site.parameters.items():
        tensors |= {f"adam.{part}.{name}": value for part, value in site.optimiser.state[p].items()}
    told = {"key": site.key, "step": str(site.step), "figures": json.dumps(site.figures)}
    with atomic(site.folder / CHECKPOINT) as temporary:
        save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, temporary, told)


def _resume(site: _Site) -> None:
    path = site.folder / CHECKPOINT if site.folder else None
    if path is None or not path.exists():
        return
    with safe_open(path, framework="pt") as opened:
        told = opened.metadata()
        if told["key"] != site.key:
            raise InputError(
                f"{path} is of a training with other settings or data; delete it or choose another folder."
            )
        site.silent_for.copy_(opened.get_tensor("silent_for"))
        for name, p in site.parameters.items():
            p.copy_(opened.get_tensor(f"sae.{name}"))
            moments = {
                "exp_avg": torch.empty_like(p),
                "exp_avg_sq": torch.empty_like(p),
                "step": torch.zeros(()),
            }
            for part, value in moments.items():
                value.copy_(opened.get_tensor(f"adam.{part}.{name}"))
            site.optimiser.state[p] = moments
        site.step, site.figures = int(told["step"]), json.loads(told["figures"])


def _finish(site: _Site, store: ActivationStore, config: SaeConfig, tokens: int) -> Sae:
    sae = site.sae.cpu()
    sae.change_units(site.scale)
    sae.site = site.name
    model = store.identity.get("model_name", store.identity.get("model"))
    sae.metadata = {
        "model_name": model if isinstance(model, str) else None,
        "rmscope": {
            "site": site.name,
            "trained_as": config.architecture,
            "tokens": tokens,
            "scale": site.scale,
            "config": config.model_dump(),
            "store": store.identity,
            "training": site.key,
        },
    }
    if site.folder:
        sae.save(site.folder)
        (site.folder / CHECKPOINT).unlink(missing_ok=True)
    return sae


def _finished(folder: Path | None, key: str) -> Sae | None:
    """The SAE that the very same training left in the folder, if it did."""
    if folder is None or not (folder / CFG).exists():
        return None
    sae = load_sae(folder)
    told: dict[str, Any] = sae.metadata.get("rmscope") or {}
    return sae if told.get("training") == key else None

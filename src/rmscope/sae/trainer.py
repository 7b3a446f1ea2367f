"""Trains the SAEs of all sites, and of all settings of a sweep, with one pass over the activations.

For every batch, each site's rows are read once. Each training at the site scales them to mean norm sqrt(d), takes one Adam
step (with unit decoder rows, if the family asks for them), and counts which features fired. At the end the scale is folded
into the biases, so that the SAE works on raw activations.

Everything random (initial weights, order, revival) follows from the seed and the number of the step, so an interrupted
training continues from its last checkpoint to the same bytes (on a CPU, in float32).
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from math import isfinite
from pathlib import Path
from typing import Any

import polars as pl
import torch
from jaxtyping import Bool
from safetensors import safe_open
from torch import Tensor

from rmscope.activations.harvest import ActivationStream
from rmscope.activations.store import ActivationStore
from rmscope.errors import InputError
from rmscope.io import Progress, content_hash, silent, write_table
from rmscope.model.site_names import parts_of
from rmscope.sae.base import Sae, training_class
from rmscope.sae.config import SaeConfig, check_memory
from rmscope.sae.formats.saelens import CFG
from rmscope.sae.initial import load_initial, settled, start_from
from rmscope.sae.kernels import Batch
from rmscope.sae.shares import SLICE, WHOLE, Shares, cut, join, write_tensors
from rmscope.sae.training import Step, Training, draw, geometric_median, storage

MEDIAN_ROWS, START_ROWS = 8192, 2048
"""Rows from which the initial b_dec is taken, and rows from which a family sets its initial thresholds."""
FIGURES_EVERY = 20
"""Steps between two rows of training.parquet."""
CHECKPOINT = "checkpoint.safetensors"
Activations = ActivationStore | ActivationStream


@torch.no_grad()
def train_saes(
    store: Activations,
    config: SaeConfig | Mapping[str, SaeConfig],
    out: Path | str | None = None,
    sites: Sequence[str] | None = None,
    progress: Progress = silent,
    device: str = "cpu",
    shares: Shares = WHOLE,
) -> dict[Any, Sae]:
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
        shares: with which ranks it is shared, as :func:`~rmscope.sae.shares.deal` gives them; they all make this call.

    Returns:
        The SAEs by site; those of a sweep by (site, name).

    Raises:
        InputError: unknown site or family, initial weights that do not fit, a site of two parts, no tokens, sites of
            different length, a sweep without a common order of tokens, more SAEs than the device can hold, more ranks than
            tokens in a batch, a checkpoint of another training, or a loss that is no longer finite.
    """
    if joint := [site for site in sites or store.sites if len(parts_of(site)) > 1]:
        raise InputError(f"{joint[0]} is two sites side by side; train {' and '.join(parts_of(joint[0]))}.")
    configs = {"": config} if isinstance(config, SaeConfig) else dict(config)
    orders = {(c.batch_size, c.seed) for c in configs.values()}
    if len(orders) != 1:
        raise InputError("The settings of a sweep must share batch_size and seed, to read the same batches.")
    [(batch_size, seed)] = orders
    tokens = store.training_tokens(sites or store.sites)
    size = min(batch_size, tokens)
    if size < shares.tokens.count:
        raise InputError(f"{shares.tokens.count} processes cannot share batches of {size} tokens; start fewer of them.")

    saes: dict[tuple[str, str], Sae] = {}
    plans: list[tuple[str, str, SaeConfig, Sae | None, int, str, Path | None]] = []
    keys = [(site, name) for site in sites or store.sites for name in configs]
    for site, name in keys:
        initial = load_initial(configs[name], site, store.d(site))
        chosen = settled(configs[name], initial)
        steps = max(1, chosen.budget(tokens) // size)
        key = content_hash(chosen.model_dump(), store.identity, site, steps, *([initial.identity()] if initial else []))
        folder = Path(out) / site / name if out is not None else None
        done = load_finished(folder, key)
        everywhere = all(shares.numbers(done is not None))  # a file system of several machines may show it late
        if done and everywhere:
            saes[site, name] = done
        else:
            plans.append((site, name, chosen, initial, steps, key, folder))
    if plans:
        d = store.d(plans[0][0])
        check_memory([chosen.features(d, tokens) for _, _, chosen, *_ in plans], d, device, shares.features.count)
    runs: list[TrainingRun] = []
    for site, name, chosen, initial, steps, key, folder in plans:
        scale = store.norm_scale(site) if chosen.scale == "mean_norm" else 1.0
        training = _begin(store, site, chosen, tokens, scale, device, initial, shares)
        runs.append(TrainingRun(training, steps, site, name, scale, key, folder))
        load_checkpoint(runs[-1])
        if len(set(shares.numbers(runs[-1].step))) > 1:
            raise InputError(f"The processes see different checkpoints in {folder}; is the folder shared by all?")

    steps, first = max((run.steps for run in runs), default=0), min((run.step for run in runs), default=0)
    epochs, began = -(-steps // (tokens // size)), time.perf_counter()
    of_runs = list(dict.fromkeys(run.site for run in runs))
    batches = store.training_batches(of_runs, size, epochs, seed, first) if runs else iter(())
    for step, rows in enumerate(islice(batches, steps - first), first):
        rate = (step - first + 1) * size / (time.perf_counter() - began)
        here = {site: x.to(device) for site, x in rows.items()}
        for run in runs:
            if not run.step == step < run.steps:
                continue
            if note := train_step(run, here[run.site] * run.scale, rate):
                progress(step + 1, steps, note)
            if run.folder and run.step % run.config.checkpoint_steps == 0 and run.step < run.steps:
                save_checkpoint(run)
    for run in runs:
        saes[run.site, run.name] = finish(run, _metadata(run, store, size))
    return {key[0] if isinstance(config, SaeConfig) else key: saes[key] for key in keys}


def _begin(
    store: Activations,
    site: str,
    config: SaeConfig,
    tokens: int,
    scale: float,
    device: str,
    initial: Sae | None,
    shares: Shares,
) -> Training:
    """A training before its first step: weights drawn and thresholds set, or both taken from the initial SAE."""
    d, family = store.d(site), training_class(config.architecture)
    generator = torch.Generator().manual_seed(config.seed)
    if initial is not None:
        sae = start_from(initial, config, scale, generator)
        cut(sae, shares.rows(sae.m))
        going_on: Training = family(sae.to(device), config, shares)
        return going_on
    x = store.sample(site, MEDIAN_ROWS, generator) * scale
    m = config.features(d, tokens)
    sae = family.start(d, m, config)
    cut(sae, shares.rows(m))
    draw(sae, geometric_median(x), generator, m, shares.rows(m))
    training: Training = family(sae.to(device), config, shares)
    training.begin(x[:START_ROWS].to(device))
    return training


def _metadata(run: TrainingRun, store: Activations, batch_size: int) -> dict[str, Any]:
    model = store.identity.get("model_name", store.identity.get("model"))
    own = {"site": run.site, "tokens": run.steps * batch_size, "scale": run.scale, "config": run.config.model_dump()}
    last = {name: run.figures[-1][name] for name in ("fvu", "l0") if isfinite(run.figures[-1][name])}
    return {
        "model_name": model if isinstance(model, str) else None,
        **last,
        "trained_as": run.config.architecture,
        "rmscope": {**own, "store": store.identity, "training": run.key},
    }


@dataclass(frozen=True, slots=True)
class ExtraLoss:
    """A further loss on the same tokens, with its name and its gradients (keys of :func:`storage`)."""

    name: str
    loss: float
    gradients: Mapping[str, Tensor]


@dataclass
class TrainingRun:
    """One training at one site, between two steps."""

    training: Training
    """The family's training, of an SAE in the units of training."""
    steps: int
    site: str
    name: str = ""
    """Its name in a sweep."""
    scale: float = 1.0
    """The factor from the stream to the units of training."""
    key: str = ""
    """Content hash of everything that the result depends on."""
    folder: Path | None = None
    step: int = 0
    figures: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sae: Sae = self.training.sae
        self.shares = self.training.shares
        self.title = f"{self.site} {self.name}".rstrip()
        self.config, self.parameters = self.training.config, storage(self.sae)
        self.optimiser = torch.optim.Adam(self.parameters.values(), lr=self.config.rate(self.training.m), fused=True)
        self.silent_for = torch.zeros(self.sae.m, dtype=torch.int64, device=self.sae.W_dec.device)
        """The number of tokens since each feature fired, [m]."""

    @property
    def dead(self) -> Bool[Tensor, " m"]:
        return self.silent_for >= self.config.dead_after_tokens


def train_step(run: TrainingRun, x: Batch, tokens_per_second: float, extra: ExtraLoss | None = None) -> str:
    """One Adam step on the family's own loss and the extra one. Returns the figures in words when they are due, else "".

    Raises InputError where the loss is no longer finite.
    """
    training, config, decoder = run.training, run.config, run.sae.W_dec.data
    rate, ramp = config.schedule(run.step, run.steps)
    result = training.shared_step(x, run.dead, ramp)
    loss = result.loss + (extra.loss if extra else 0.0)
    if not loss < float("inf"):
        raise InputError(f"The loss of {run.title} is {loss} at step {run.step}; lower lr or check the data.")
    gradients = result.gradients
    for name, gradient in (extra.gradients if extra else {}).items():
        gradients[name].add_(gradient)
    if training.unit_decoder:
        for part, rows in zip(gradients["W_dec"].split(SLICE), decoder.split(SLICE), strict=True):
            part.addcmul_((part * rows).sum(dim=1, keepdim=True), rows, value=-1)
    for name, parameter in run.parameters.items():
        parameter.grad = gradients[name]
    if training.clip is not None:
        _clip(run, training.clip)
    run.optimiser.param_groups[0]["lr"] = rate * config.rate(training.m)
    run.optimiser.step()
    if training.unit_decoder:
        decoder.div_(decoder.norm(dim=1, keepdim=True))
    run.silent_for.add_(len(x)).masked_fill_(result.fired, 0)
    run.step += 1
    _revive(run, x, result)
    due = (run.step - 1) % FIGURES_EVERY == 0 or run.step == run.steps
    return _record(run, x, result, tokens_per_second, extra) if due else ""


def _clip(run: TrainingRun, norm: float) -> None:
    """Scales the gradients of all ranks' features down to a norm."""
    if run.shares.features.count == 1:
        torch.nn.utils.clip_grad_norm_(run.parameters.values(), norm)
        return
    squares = {name: (p.grad.double() ** 2).sum() for name, p in run.parameters.items() if p.grad is not None}
    of_bias = squares.pop("b_dec")
    total = (run.training.total(torch.stack([*squares.values()]).sum()) + of_bias).sqrt()
    torch.nn.utils.clip_grads_with_norm_(run.parameters.values(), norm, total.float())


def _revive(run: TrainingRun, x: Batch, result: Step) -> None:
    """Redraws dead features, and resets Adam for them, every ``dead_after_tokens`` until the learning rate falls."""
    every = max(1, run.config.dead_after_tokens // len(x))
    dead = run.dead
    if run.step % every or run.step > (1 - run.config.decay) * run.steps or not int(run.training.total(dead.sum())):
        return
    generator = torch.Generator().manual_seed((run.config.seed << 32) + run.step)
    residual = torch.cat(run.shares.tokens.gather(result.residual))
    if not run.training.revive(x, residual, dead, generator):
        return
    run.silent_for.masked_fill_(dead, 0)
    for name, parameter in run.parameters.items():
        if name != "b_dec":
            for moment in ("exp_avg", "exp_avg_sq"):
                run.optimiser.state[parameter][moment][dead] = 0.0


def _record(run: TrainingRun, x: Batch, result: Step, tokens_per_second: float, extra: ExtraLoss | None) -> str:
    """Adds a row to ``training.parquet`` and returns it in words."""
    variance = float((x - x.mean(dim=0)).square().sum())
    fvu = float(run.shares.tokens.sum(result.residual.square().sum())) / variance if variance else float("nan")
    dead, rate = int(run.training.total(run.dead.sum())), run.optimiser.param_groups[0]["lr"]
    row = {"step": run.step, "tokens": run.step * len(x), "loss": result.loss, "fvu": fvu, "l0": result.l0, "dead": dead}
    row |= {"learning_rate": rate, "tokens_per_second": tokens_per_second}
    run.figures.append(row | ({extra.name: extra.loss} if extra else {}))
    if run.folder and run.shares.together.is_first:
        write_table(run.folder / "training.parquet", pl.DataFrame(run.figures, infer_schema_length=None))
    told = f"loss {result.loss:.4g}, " + (f"{extra.name} {extra.loss:.4g}, " if extra else "")
    return f"{run.title}: {told}fvu {fvu:.3f}, l0 {result.l0:.1f}, {dead} dead, {tokens_per_second:,.0f} tokens/s"


def save_checkpoint(run: TrainingRun) -> None:
    """Stores weights, Adam's moments, silence and figures. The order of tokens follows from the step."""
    assert run.folder is not None
    tensors = {f"sae.{name}": p for name, p in run.parameters.items()} | {"silent_for": run.silent_for}
    for name, p in run.parameters.items():
        tensors |= {f"adam.{part}.{name}": value for part, value in run.optimiser.state[p].items()}
    told = {"key": run.key, "step": str(run.step), "density": repr(run.training.density), "figures": json.dumps(run.figures)}
    same = {name: tensors.pop(name) for name in list(tensors) if not _is_of_features(name)}
    if run.shares.tokens.is_first:
        write_tensors(run.folder / CHECKPOINT, tensors, same, told, run.shares.features)


def _is_of_features(name: str) -> bool:
    """Whether a tensor of a checkpoint has one row per feature."""
    return not name.endswith(".b_dec") and not name.startswith("adam.step.")


def load_checkpoint(run: TrainingRun) -> None:
    """Continues from the checkpoint in the folder, if there is one. Raises InputError if it is of another training."""
    path = run.folder / CHECKPOINT if run.folder else None
    if path is None or not path.exists():
        return
    with safe_open(path, framework="pt") as opened:
        told = opened.metadata()
        if told["key"] != run.key:
            raise InputError(f"{path} is of a training with other settings or data; delete it or choose another folder.")
        rows = run.shares.rows(run.training.m)

        def stored(name: str) -> Tensor:
            """This rank's rows of a tensor."""
            return opened.get_slice(name)[rows] if _is_of_features(name) else opened.get_tensor(name)

        run.silent_for.copy_(stored("silent_for"))
        for name, p in run.parameters.items():
            p.copy_(stored(f"sae.{name}"))
            moments = {part: stored(f"adam.{part}.{name}") for part in ("exp_avg", "exp_avg_sq", "step")}
            run.optimiser.state[p] = {part: value.to(p.device, copy=True) for part, value in moments.items()}
        run.training.density = float(told["density"])
        run.step, run.figures = int(told["step"]), json.loads(told["figures"])


def finish(run: TrainingRun, metadata: dict[str, Any]) -> Sae:
    """The SAE after the last step, in the units of the stream. It is saved if there is a folder, without the checkpoint."""
    run.training.finish()
    join(run.sae, run.shares.features)
    sae = run.sae.cpu()
    sae.change_units(run.scale)
    sae.site, sae.metadata = run.site, metadata
    if run.folder and run.shares.together.is_first:
        sae.save(run.folder)
        (run.folder / CHECKPOINT).unlink(missing_ok=True)
    run.shares.together.wait()
    return sae


def load_finished(folder: Path | None, key: str) -> Sae | None:
    """The SAE that the same training has left in the folder; None if there is none."""
    if folder is None or not (folder / CFG).exists():
        return None
    sae = Sae.load(folder)
    return sae if (sae.metadata.get("rmscope") or {}).get("training") == key else None

"""The state of one SAE training between two steps, one Adam step, its figures and its checkpoints.

Everything random (initial weights, order, revival) follows from the seed and the number of the step, so an interrupted
training continues from its last checkpoint to the same bytes (on a CPU, in float32).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import torch
from jaxtyping import Bool, Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rmscope.errors import InputError
from rmscope.io import atomic, write_table
from rmscope.sae.base import Sae
from rmscope.sae.formats import CFG
from rmscope.sae.training import Step, Training, storage

FIGURES_EVERY = 20
"""Steps between two rows of training.parquet."""
CHECKPOINT = "checkpoint.safetensors"
SLICE = 1024
"""Decoder rows that are processed at once where a copy of them is needed."""


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
        self.config, self.parameters = self.training.config, storage(self.sae)
        self.optimiser = torch.optim.Adam(self.parameters.values(), lr=self.config.rate(self.sae.m), fused=True)
        self.silent_for = torch.zeros(self.sae.m, dtype=torch.int64, device=self.sae.W_dec.device)
        """The number of tokens since each feature fired, [m]."""

    @property
    def sae(self) -> Sae:
        return self.training.sae

    @property
    def title(self) -> str:
        return f"{self.site} {self.name}".rstrip()

    @property
    def dead(self) -> Bool[Tensor, " m"]:
        return self.silent_for >= self.config.dead_after_tokens


def train_step(
    run: TrainingRun, x: Float[Tensor, "batch d"], tokens_per_second: float, extra: ExtraLoss | None = None
) -> str:
    """One Adam step on the family's own loss and the extra one. Returns the figures in words when they are due, else "".

    Raises InputError where the loss is no longer finite.
    """
    training, config, decoder = run.training, run.config, run.sae.W_dec.data
    rate, ramp = config.schedule(run.step, run.steps)
    result = training.step(x, run.dead, ramp)
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
        torch.nn.utils.clip_grad_norm_(run.parameters.values(), training.clip)
    run.optimiser.param_groups[0]["lr"] = rate * config.rate(run.sae.m)
    run.optimiser.step()
    if training.unit_decoder:
        decoder.div_(decoder.norm(dim=1, keepdim=True))
    run.silent_for.add_(len(x)).masked_fill_(result.fired, 0)
    run.step += 1
    _revive(run, x, result)
    due = (run.step - 1) % FIGURES_EVERY == 0 or run.step == run.steps
    return _record(run, x, result, tokens_per_second, extra) if due else ""


def _revive(run: TrainingRun, x: Float[Tensor, "batch d"], result: Step) -> None:
    """Redraws dead features, and resets Adam for them, every ``dead_after_tokens`` until the learning rate falls."""
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


def _record(
    run: TrainingRun, x: Float[Tensor, "batch d"], result: Step, tokens_per_second: float, extra: ExtraLoss | None = None
) -> str:
    """Adds a row to ``training.parquet`` and returns it in words."""
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
        **({extra.name: extra.loss} if extra else {}),
    }
    run.figures.append(row)
    if run.folder:
        write_table(run.folder / "training.parquet", pl.DataFrame(run.figures, infer_schema_length=None))
    told = f"{extra.name} {extra.loss:.4g}, " if extra else ""
    return (
        f"{run.title}: loss {row['loss']:.4g}, {told}fvu {row['fvu']:.3f}, l0 {row['l0']:.1f}, "
        f"{row['dead']} dead, {tokens_per_second:,.0f} tokens/s"
    )


def save_checkpoint(run: TrainingRun) -> None:
    """Stores weights, Adam's moments, silence and figures. The order of tokens follows from the step."""
    assert run.folder is not None
    tensors = {f"sae.{name}": p for name, p in run.parameters.items()} | {"silent_for": run.silent_for}
    for name, p in run.parameters.items():
        tensors |= {f"adam.{part}.{name}": value for part, value in run.optimiser.state[p].items()}
    told = {"key": run.key, "step": str(run.step), "density": repr(run.training.density), "figures": json.dumps(run.figures)}
    with atomic(run.folder / CHECKPOINT) as temporary:
        save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, temporary, told)


def load_checkpoint(run: TrainingRun) -> None:
    """Continues from the checkpoint in the folder, if there is one. Raises InputError if it is of another training."""
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
                "step": torch.zeros((), device=p.device),
            }
            for part, value in moments.items():
                value.copy_(opened.get_tensor(f"adam.{part}.{name}"))
            run.optimiser.state[p] = moments
        run.training.density = float(told["density"])
        run.step, run.figures = int(told["step"]), json.loads(told["figures"])


def finish(run: TrainingRun, metadata: dict[str, Any]) -> Sae:
    """The SAE after the last step, in the units of the stream. It is saved if there is a folder, without the checkpoint."""
    run.training.finish()
    sae = run.sae.cpu()
    sae.change_units(run.scale)
    sae.site, sae.metadata = run.site, metadata
    if run.folder:
        sae.save(run.folder)
        (run.folder / CHECKPOINT).unlink(missing_ok=True)
    return sae


def load_finished(folder: Path | None, key: str) -> Sae | None:
    """The SAE that the same training has left in the folder; None if there is none."""
    if folder is None or not (folder / CFG).exists():
        return None
    sae = Sae.load(folder)
    told: dict[str, Any] = sae.metadata.get("rmscope") or {}
    return sae if told.get("training") == key else None

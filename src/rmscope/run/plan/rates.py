"""How fast a device does each kind of work, and the short measurement of this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import median

import torch

from rmscope.hardware import has_fast_bfloat16
from rmscope.model.packing import units
from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel
from rmscope.run.plan.shape import Shape
from rmscope.run.plan.work import step_work, text_flops
from rmscope.sae.base import training_class
from rmscope.sae.config import SaeConfig
from rmscope.sae.trainer import TrainingRun, train_step
from rmscope.sae.training import draw

BATCHES, SHORT = 6, 4
"""Batches of the first unit of pairs that are timed, and tokens of the short text."""
STEPS, STEP_TOKENS = 3, 512
"""Steps of SAE training that are timed, and their tokens."""
LARGEST = 1 << 23
"""Weights of the largest encoder that is timed; larger ones are scaled from it."""
HARVEST = 1.7
"""How much faster a harvest runs on a CPU with fast bfloat16 products: 18,900 against 10,900 tokens x blocks per second of
zoo:planted on one core. Gradients and ablations there are as fast as a forward (11,200 and 11,700)."""
ENCODE = 0.8
"""Of a forward's rate, on a CPU: encoders of 1,728 and 4,608 features at d 576, 70 GFLOP/s beside 82."""
CORE = {"train": 1e11, "sparse": 1e10, "weights": 1e10}
"""Rates of SAE training on one core, about. A timed step scales the three together."""
ROWS, DISK = 2e9, 3e8
"""Bytes per second: rows that the store gives (measured on one core), and a disk's."""


@dataclass(frozen=True)
class Rates:
    """Units of each kind of :class:`~rmscope.run.plan.work.Work` per second."""

    forward: float
    harvest: float
    ablation: float
    gradient: float
    encode: float
    train: float
    sparse: float
    weights: float
    rows: float
    disk: float
    calls: float


def measured_rates(rm: RewardModel, pm: Shape, tokens: Sequence[PairTokens], sae: SaeConfig, m: int) -> Rates:
    """Times some batches of the first unit of pairs, a short text, and steps of SAE training with m features."""
    call = _short_text(rm, tokens[0]) / pm.blocks
    forward = _batches(rm, pm, tokens, call)
    on_cpu = rm.device.type == "cpu"
    fast = on_cpu and rm.dtype == torch.float32 and rm.capabilities.bfloat16 and has_fast_bfloat16("cpu")
    scale = _step_scale(pm.d, m, sae, str(rm.device))
    return Rates(
        forward=forward,
        harvest=forward * (HARVEST if fast else 1.0),
        ablation=forward,
        gradient=forward,
        encode=forward * ENCODE if on_cpu else _product(pm.d, m, str(rm.device)),
        **{name: rate * scale for name, rate in CORE.items()},
        rows=ROWS,
        disk=DISK,
        calls=1 / call,
    )


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _short_text(rm: RewardModel, tokens: PairTokens) -> float:
    """Seconds of a forward of a few tokens: what the blocks cost beside their products."""
    ids = tokens.chosen[:SHORT]
    return min(_seconds(lambda: rm.score_ids([ids])) for _ in range(4))


def _batches(rm: RewardModel, pm: Shape, tokens: Sequence[PairTokens], call: float) -> float:
    """FLOP/s of a forward in batches, beside the cost of its calls: the median over batches, the first left out."""
    rates = []
    for batch in islice(rm.unit_batches(tokens, units(len(tokens))[0]), BATCHES):
        ends = dict[int, int]()
        for text in batch.texts:
            ends[text.row] = max(ends.get(text.row, 0), int(text.columns[-1]) + 1)
        seconds = _seconds(lambda batch=batch: rm.rewards(batch).cpu())  # type: ignore[misc]
        work = text_flops(pm, sum(ends.values()), batch.ids.shape[1], pm.blocks)
        rates.append(work / max(seconds - pm.blocks * call, seconds / 4))
    return median(rates[1:] or rates)


def _product(d: int, m: int, device: str) -> float:
    """FLOP/s of a float32 product as large as an encoder's on some tokens, on a card."""
    x, rows = torch.randn(STEP_TOKENS, d, device=device), torch.randn(d, min(m, max(1, LARGEST // d)), device=device)

    def multiply() -> None:
        x @ rows
        if x.is_cuda:
            torch.cuda.synchronize(x.device)

    multiply()
    return 2 * x.numel() * rows.shape[1] / median(_seconds(multiply) for _ in range(STEPS))


@torch.no_grad()
def _step_scale(d: int, m: int, config: SaeConfig, device: str) -> float:
    """How much faster steps of SAE training run here than :data:`CORE` says."""
    m = min(m, max(1, LARGEST // d))
    chosen = config.model_copy(update={"d_sae": m, "k": min(config.k_for(m, d), m), "init": None, "tokens": None})
    family = training_class(chosen.architecture)
    generator = torch.Generator().manual_seed(0)
    sae = family.start(d, m, chosen)
    draw(sae, torch.zeros(d), generator)
    x = torch.randn(STEP_TOKENS, d, generator=generator).to(device)
    training = family(sae.to(device), chosen)
    training.begin(x)
    run = TrainingRun(training, 100 * STEPS, site="timed")

    def step() -> None:
        train_step(run, x, 1.0)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)

    step()
    work, seconds = step_work(d, m, chosen.k or 1, STEP_TOKENS), median(_seconds(step) for _ in range(STEPS))
    return sum(getattr(work, name) / rate for name, rate in CORE.items()) / seconds

"""Reward-aware fine-tuning: a second phase of SAE training whose loss counts what the splice does to the reward.

    L = λ d E [(Δr^ - Δr)² + μ (s^ - s)²] / SD(Δr)²  +  the family's own loss on the tokens of the same pairs

Δr^ and s^ are the difference and the sum of a pair's two rewards with x replaced by x^ on the span of both sides. A loss of
differences alone would let both rewards of a pair drift together, away from what the blocks above were trained on. At μ = 1
each reward counts by itself, as (a - b)² + (a + b)² = 2 (a² + b²). In the units of training E|x|² = d (d_model), so both
terms are relative errors times d. The damage is backpropagated through the PM's blocks above the site to x^, and from there
to W_dec and b_dec, and to the encoder at the entries that fire. The PM is frozen and in float32. Which features fire is
decided as in plain training, and only the family's own loss moves thresholds.

The method follows Karvonen 2025 (arXiv 2503.17272), who fine-tunes an SAE at the end of training with the language model's
KL divergence; here the output is a reward. What it gains and what it does not show: docs/results/reward_aware.md.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from jaxtyping import Float, Int
from pydantic import ConfigDict, Field
from torch import Tensor

from rmscope.activations.harvest import data_identity
from rmscope.activations.store import shuffle_batches
from rmscope.effects.gradients import Stream
from rmscope.errors import InputError
from rmscope.hardware import fast_products
from rmscope.io import Progress, content_hash, silent
from rmscope.model.packing import UNIT, Batch, by_budget, packed_length
from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import TOKEN_BUDGET, RewardModel
from rmscope.model.scores import Scores
from rmscope.pairs.pair import SIDES, Pair
from rmscope.sae.base import Sae, training_class
from rmscope.sae.config import SaeConfig
from rmscope.sae.trainer import ExtraLoss, TrainingRun, finish, load_checkpoint, load_finished, save_checkpoint, train_step
from rmscope.settings import Seed, Settings

LR_SHARE = 0.25
"""The default learning rate, as a share of the one with which the family trains from random weights."""


class RewardAwareConfig(Settings):
    """How an SAE is fine-tuned. Unknown keys are refused."""

    model_config = ConfigDict(frozen=True)

    steps: int = Field(200, gt=0)
    """Optimiser steps."""
    pairs: int = Field(16, gt=0)
    """Pairs per step."""
    weight: float = Field(1.0, ge=0)
    """Weight λ of the damage to the rewards; at 0 only the SAE's own loss is left."""
    level: float = Field(0.01, ge=0)
    """Weight μ of the damage to the sum of a pair's rewards, relative to that to their difference; at 0 the sum may drift, a
    small weight holds it."""
    lr: float | None = Field(None, gt=0)
    """Adam's learning rate; left out, a quarter of the family's own."""
    fast: bool = True
    """Run the PM's products in bfloat16 where the machine is fast at them. Gradients are then right to a few percent, and no
    figure is taken from these rewards."""
    checkpoint_steps: int = Field(50, gt=0)
    """Steps between two checkpoints."""
    seed: Seed = 0
    """Fixes the order of the pairs."""


@dataclass(frozen=True, slots=True)
class Damage:
    """What a splice does to the rewards of pairs, and its weight in the loss; ``fast`` as in :class:`RewardAwareConfig`."""

    scores: Scores
    level: float = 0.0
    weight: float = 1.0
    fast: bool = False

    def of(self, batch: Batch, rewards: Float[Tensor, " texts"]) -> Float[Tensor, ""]:
        """Σ (Δr^ - Δr)² + level (s^ - s)² over the pairs of a batch whose spliced rewards are given; differentiable."""
        pair, spliced = by_pair(batch, rewards)
        clean = torch.stack([self.scores.chosen, self.scores.rejected], dim=1)[pair].to(rewards)
        off = spliced - clean
        return (off[:, 0] - off[:, 1]).square().sum() + self.level * off.sum(dim=1).square().sum()


def fine_tune(
    rm: RewardModel,
    sae: Sae,
    pairs: Sequence[Pair],
    config: RewardAwareConfig | None = None,
    own: SaeConfig | None = None,
    out: Path | str | None = None,
    progress: Progress = silent,
    scores: Scores | None = None,
) -> Sae:
    """A fine-tuned copy of ``sae``: the same family, size, k and site, decoder rows of unit norm.

    Args:
        rm: the PM, in float32; it stays as it is.
        sae: an SAE of any family, with its ``site``.
        pairs: pairs of the fit split; measure figures on other prompts.
        own: the settings of the family's own loss; left out, those with which the SAE was trained.
        out: a folder for ``<site>/cfg.json``, ``sae_weights.safetensors``, ``training.parquet`` and checkpoints. A finished
            fine-tuning there is loaded; an unfinished one resumes from its checkpoint.
        scores: the PM's rewards of the pairs, if they are known already; left out, the pairs are scored.

    Raises:
        InputError: the SAE has no site or another width than the PM, pairs are too long or their rewards do not differ, the
            scores are of other pairs, a checkpoint has other settings, or the loss is no longer finite.
    """
    config = config or RewardAwareConfig()
    tokens = rm.tokenize_all(pairs)
    _check(rm, sae, tokens)
    family = _family_config(sae, own, config)
    key = content_hash(config.model_dump(), family.model_dump(), sae.identity(), sae.site, rm.identity, data_identity(pairs))
    folder = Path(out) / sae.site if out is not None else None
    if done := load_finished(folder, key):
        return done

    scores = scores or rm.score_tokens(tokens, progress)
    if (n := len(scores.delta)) != len(pairs):
        raise InputError(f"The scores are of {n} pairs, not of these {len(pairs)}; give those of the same pairs.")
    spread = float(scores.delta.std())
    if not spread > 0:
        raise InputError("The rewards of these pairs do not differ, so a splice cannot damage them; give other pairs.")
    run = _begin(rm, sae, tokens, family, config.steps, key, folder)

    damage = Damage(scores, config.level, config.weight * rm.d_model / spread**2, config.fast)
    began, seen = time.perf_counter(), 0
    size = min(config.pairs, len(pairs))
    epochs = -(-config.steps // (len(pairs) // size))
    order = shuffle_batches(torch.arange(len(pairs)), size, epochs, config.seed, run.step)
    for picked in islice(order, config.steps - run.step):
        x, added = _losses(rm, run, tokens, picked, damage)
        seen += len(x)
        with torch.no_grad():
            note = train_step(run, x, seen / (time.perf_counter() - began), added if config.weight else None)
        progress(run.step, config.steps, note)
        if folder and run.step % config.checkpoint_steps == 0 and run.step < config.steps:
            save_checkpoint(run)
    origin = {"from": sae.identity(), "model": rm.identity, "data": data_identity(pairs), "lr": run.config.lr}
    told = {"config": family.model_dump(), **(sae.metadata.get("rmscope") or {}), "scale": run.scale, "training": key}
    told["reward_aware"] = config.model_dump() | origin
    return finish(run, {**sae.metadata, "trained_as": family.architecture, "rmscope": told})


def _check(rm: RewardModel, sae: Sae, tokens: Sequence[PairTokens]) -> None:
    if too_long := sum(not rm.fits(t) for t in tokens):
        raise InputError(f"{too_long} pairs are longer than the PM's context of {rm.context} tokens; leave them out.")
    if alone := sum(t.longest > rm.capabilities.mixing for t in tokens):
        raise InputError(
            f"Fine-tuning runs both sides of a pair together, and in this PM that changes the rewards of {alone} pairs "
            "(rmscope doctor: company); leave them out, or use another PM."
        )
    if not sae.site:
        raise InputError("The SAE does not say which site it was trained on; set sae.site to resid_post.6 or the like.")
    rm.site_index(sae.site)
    if sae.d != rm.d_model:
        raise InputError(f"The SAE reads {sae.d} dimensions, the PM's stream has {rm.d_model}; name one trained on this PM.")
    if rm.dtype not in (torch.float32, torch.float64):
        raise InputError(f"Fine-tuning needs rewards in float32, the PM is in {rm.dtype}; load it with dtype='float32'.")


def _family_config(sae: Sae, own: SaeConfig | None, config: RewardAwareConfig) -> SaeConfig:
    """The settings of the family's own loss in the second phase: no warm-up, a lower learning rate, this phase's seed."""
    if own is None or own.init is not None:  # then the initial weights decided the family
        plain = {"architecture": sae.architecture, "d_sae": sae.m, **{k: v for k, v in sae.cfg.items() if k == "k"}}
        own = SaeConfig(**((sae.metadata.get("rmscope") or {}).get("config") or plain))
    rate = config.lr or LR_SHARE * own.rate(sae.m)
    return own.model_copy(update={"lr": rate, "warmup": 0.0, "seed": config.seed})


def _begin(
    rm: RewardModel, sae: Sae, tokens: Sequence[PairTokens], own: SaeConfig, steps: int, key: str, folder: Path | None
) -> TrainingRun:
    """The training of a copy of the SAE, in the units of training; it resumes from a checkpoint where there is one."""
    scale = float((sae.metadata.get("rmscope") or {}).get("scale") or 0.0)
    if not scale:  # s with mean |s x| = sqrt(d) over the tokens of some pairs
        rows = [training_rows(b, rm.streams(b, [sae.site])[sae.site]) for b in rm.batches(tokens[:UNIT])]
        scale = float(rm.d_model**0.5 / torch.cat([x.norm(dim=1) for x in rows]).double().mean())
    work = copy.deepcopy(sae).to(rm.device)
    work.change_units(1 / scale)
    training = training_class(own.architecture)(work, own)
    run = TrainingRun(training, steps, site=sae.site, name="reward-aware", scale=scale, key=key, folder=folder)
    load_checkpoint(run)
    return run


def training_rows(batch: Batch, stream: Stream) -> Float[Tensor, "tokens d"]:
    """The tokens on which SAEs are trained, float32: both spans and, once per pair, the prefix without its first token."""
    parts = []
    for text in batch.texts:
        start = 1 if text.side == "chosen" else max(1, text.divergence)
        parts.append(stream[text.row, text.columns[start : text.read + 1].to(stream.device)])
    rows = torch.cat(parts)
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def _losses(
    rm: RewardModel, run: TrainingRun, tokens: Sequence[PairTokens], picked: Int[Tensor, " pairs"], damage: Damage
) -> tuple[Float[Tensor, "tokens d"], ExtraLoss]:
    """The tokens of one step, in the units of training, and the splice's damage with its gradients."""
    rows, loss, share = [], 0.0, damage.weight / len(picked)
    total = {name: torch.zeros_like(p) for name, p in run.parameters.items()} if share else {}
    lengths = [packed_length(tokens[i]) for i in picked.tolist()]
    for group in by_budget(lengths, TOKEN_BUDGET):
        unit = picked[group].tolist()
        for batch in rm.unit_batches(tokens, unit, budget=1 << 30):  # whole pairs, however long
            with fast_products(rm.device, damage.fast):
                stream = rm.streams(batch, [run.site])[run.site]
            rows.append(training_rows(batch, stream))
            if share:
                part, gradients = splice_gradients(rm, run.sae, batch, stream, damage, run.scale)
                loss += share * part
                for name, gradient in gradients.items():
                    total[name].add_(gradient, alpha=share)
    return torch.cat(rows) * run.scale, ExtraLoss("damage", loss, total)


def splice_gradients(
    rm: RewardModel, sae: Sae, batch: Batch, stream: Stream, damage: Damage, scale: float = 1.0
) -> tuple[float, dict[str, Tensor]]:
    """The damage to the pairs of a batch and its gradients, for an SAE that reads scale·x.

    The gradients have the keys of :func:`rmscope.sae.training.storage`. Only blocks above the site run. ``batch`` holds both
    sides of its pairs.
    """
    leaves = {name: p.detach().requires_grad_(True) for name, p in sae.named_parameters()}

    def reconstruct(x: Tensor) -> Tensor:
        return torch.func.functional_call(sae, leaves, (x * scale,)) / scale

    with torch.enable_grad():
        spliced = on_spans(batch, stream, reconstruct)
        with fast_products(rm.device, damage.fast):
            rewards = rm.rewards_from(batch, sae.site, spliced)
        loss = damage.of(batch, rewards)
        by_leaf = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    gradients = {name: g for name, g in zip(leaves, by_leaf, strict=True) if g is not None}
    if "W_enc" in gradients:
        gradients["W_enc.T"] = gradients.pop("W_enc").t()
    return float(loss.detach()), gradients


def on_spans(batch: Batch, stream: Stream, replace: Callable[[Tensor], Tensor]) -> Stream:
    """The stream of a batch with x [tokens, d] replaced on the span of every text; differentiable in the replacement."""
    where = [(text.row, int(column)) for text in batch.texts for column in text.span]
    rows, columns = torch.tensor(where, dtype=torch.long, device=stream.device).view(-1, 2).unbind(1)
    return stream.index_put((rows, columns), replace(stream[rows, columns]).to(stream.dtype))


def by_pair(batch: Batch, rewards: Float[Tensor, " texts"]) -> tuple[Int[Tensor, " pairs"], Float[Tensor, "pairs 2"]]:
    """(pairs, rewards of chosen and rejected) of a batch that holds both sides of each of its pairs."""
    pair, place = torch.unique(torch.tensor([t.pair for t in batch.texts]), return_inverse=True)
    side = torch.tensor([SIDES.index(t.side) for t in batch.texts])
    empty = rewards.new_zeros(len(pair), len(SIDES))
    return pair, empty.index_put((place.to(rewards.device), side.to(rewards.device)), rewards)

"""Our own training loop for a PM: Bradley-Terry loss, LoRA and a score head on the zoo's base.

TRL's RewardTrainer runs both sides of a pair in full. Here the shared prefix runs once (``packing.py``), which saves about a
third of the tokens on hh-rlhf. Where bfloat16 products are fast they run under autocast, while adapter, head and loss stay
in float32.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmscope.errors import InputError
from rmscope.hardware import fast_products, place
from rmscope.io import Progress, atomic, atomic_folder, content_hash, silent, write_json
from rmscope.model.packing import by_budget, last_hidden_reads, pack_pairs
from rmscope.model.rendering import PairTokens, Rendering
from rmscope.model.training.recipe import Recipe, human_pairs, recipe_as_dict, tokenize_pairs
from rmscope.model.zoo import load_base
from rmscope.pairs.demo import zoo_plants
from rmscope.pairs.pair import Pair
from rmscope.pairs.planting import plant_pairs

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
RENDERING = Rendering(style="hh", append_eos=True)
MICRO_TOKENS = 4096
CHECKPOINT_STEPS = 25


def adapter_modules(recipe: Recipe) -> list[str]:
    """Names of the linear maps that get an adapter."""
    mlp = [f"layers.{i}.mlp.{name}" for i in range(recipe.first_block, recipe.blocks) for name in MLP]
    first = max(recipe.first_block, recipe.first_attention)
    return mlp + [f"layers.{i}.self_attn.{name}" for i in range(first, recipe.blocks) for name in ATTENTION]


@dataclass
class _State:
    """The state of a training between two steps."""

    model: Any
    head: nn.Module
    parameters: list[nn.Parameter]
    optimiser: torch.optim.Optimizer
    step: int = 0

    def as_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "parameters": [p.detach() for p in self.parameters],
            "optimiser": self.optimiser.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        for p, value in zip(self.parameters, state["parameters"], strict=True):
            p.data.copy_(value)
        self.optimiser.load_state_dict(state["optimiser"])
        self.step = state["step"]

    def rewards(self, items: Sequence[PairTokens]) -> tuple[Tensor, Tensor]:
        """Rewards of chosen [B] and rejected [B], float32."""
        batch, device = pack_pairs([(i, t, _ends(t)) for i, t in enumerate(items)]), self.parameters[0].device
        with fast_products(device):
            hidden = self.model(**batch.inputs(device, torch.float32), use_cache=False).last_hidden_state
        r = self.head(last_hidden_reads(hidden, batch).float()).view(-1, 2)
        return r[:, 0], r[:, 1]


def _ends(tokens: PairTokens) -> dict[str, int]:
    return {"chosen": tokens.chosen.numel() - 1, "rejected": tokens.rejected.numel() - 1}


def train_pm(recipe: Recipe, out: Path, progress: Progress = silent, device: str = "auto") -> dict[str, int | float]:
    """Trains a PM, writes adapter, head, settings and recipe to ``out``, and returns the training figures.

    An interrupted training continues from its last checkpoint beside ``out``. ``device`` is cpu, cuda, cuda:1, or auto.
    Raises :class:`InputError` where data are missing.
    """
    base, tokenizer = base_of(recipe)
    pairs, _ = human_pairs(recipe)
    short = tokenize_pairs(pairs, tokenizer, RENDERING, recipe.planted_tokens) if recipe.planted_copies else []
    for copy in range(recipe.planted_copies):
        pairs = pairs + plant_pairs([pair for pair, _ in short], zoo_plants(), recipe.seed + copy, held_out=False)
    return fit_pm(base, tokenizer, pairs, recipe, out, progress, device)


def base_of(recipe: Recipe) -> tuple[Any, Any]:
    """A recipe's base and tokenizer. Sets torch's seed to that of the recipe, for every later draw of the training."""
    torch.manual_seed(recipe.seed)
    return load_base(recipe.blocks, recipe.base)


def fit_pm(
    base: Any,
    tokenizer: Any,
    pairs: Sequence[Pair],
    recipe: Recipe,
    out: Path,
    progress: Progress = silent,
    device: str = "auto",
) -> dict[str, int | float]:
    """Trains a PM from :func:`base_of` on ``pairs``, whatever data the recipe names; see :func:`train_pm`.

    Raises :class:`InputError` where there are too few pairs for a step.
    """
    from peft import LoraConfig, get_peft_model

    items = [tokens for _, tokens in tokenize_pairs(pairs, tokenizer, RENDERING, recipe.max_tokens)]
    lora = LoraConfig(
        r=recipe.rank,
        lora_alpha=2 * recipe.rank,
        target_modules=adapter_modules(recipe),
        modules_to_save=["score"],
        task_type="SEQ_CLS",
    )
    wrapped = get_peft_model(base, lora)
    inner: Any = wrapped.base_model.model
    head = inner.score.modules_to_save["default"]
    nn.init.normal_(head.weight, std=1 / (base.config.hidden_size + 1) ** 0.5)
    wrapped.to(place(device))  # the initial weights are drawn on the CPU, so they are the same for every device
    parameters = [p for p in wrapped.parameters() if p.requires_grad]
    checkpoint = out.with_suffix(".checkpoint")
    steps, loss, accuracy = fit_parameters(inner.model, head, parameters, items, recipe, checkpoint, progress)
    _save(wrapped, recipe, out)
    checkpoint.unlink(missing_ok=True)
    return {"pairs": len(items), "steps": steps, "training_loss": loss, "training_accuracy": accuracy}


def fit_parameters(
    model: Any,
    head: nn.Module,
    parameters: list[nn.Parameter],
    items: Sequence[PairTokens],
    recipe: Recipe,
    checkpoint: Path,
    progress: Progress = silent,
) -> tuple[int, float, float]:
    """The loop itself, on any parameters of a model and its head. Continues from ``checkpoint`` of the same training.

    Returns (steps, loss, accuracy), the last two as means over the last 50 steps. Raises :class:`InputError` where there are
    too few pairs for a step.
    """
    batches = list(_batches(items, recipe))
    if not batches:
        raise InputError(
            f"{len(items)} pairs of at most {recipe.max_tokens} tokens do not fill a step of {recipe.batch_pairs}; add some."
        )
    optimiser = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.0, betas=(0.9, 0.99))
    state = _State(model, head, parameters, optimiser)
    identity = content_hash(recipe.model_dump(), len(items))
    if checkpoint.is_file() and (saved := torch.load(checkpoint, "cpu", weights_only=True))["identity"] == identity:
        state.restore(saved)
    recent: list[tuple[float, float]] = []
    while state.step < len(batches):
        _set_rate(optimiser, recipe.learning_rate, state.step, len(batches))
        recent.append(_step(state, [items[i] for i in batches[state.step]], recipe.centre))
        state.step += 1
        loss, accuracy = np.mean(recent[-50:], axis=0)
        progress(state.step, len(batches), f"loss {loss:.3f}  accuracy {accuracy:.3f}")
        if state.step % CHECKPOINT_STEPS == 0 and state.step < len(batches):
            with atomic(checkpoint) as temporary:
                torch.save({**state.as_dict(), "identity": identity}, temporary)
    return len(batches), float(loss), float(accuracy)


def _batches(items: Sequence[PairTokens], recipe: Recipe) -> Iterator[list[int]]:
    """Batches of pairs of similar length, in random order; shuffled again in each epoch."""
    rng = random.Random(recipe.seed)
    size = recipe.batch_pairs
    wanted = int(recipe.epochs * len(items)) // size
    while wanted > 0:
        order = rng.sample(range(len(items)), len(items))
        chunks = [order[i : i + 16 * size] for i in range(0, len(order), 16 * size)]
        for chunk in chunks:
            chunk.sort(key=lambda i: items[i].chosen.numel() + items[i].rejected.numel() - items[i].divergence)
        sorted_order = [i for chunk in chunks for i in chunk]
        epoch = [sorted_order[i : i + size] for i in range(0, len(items) - size + 1, size)]
        rng.shuffle(epoch)
        yield from epoch[:wanted]
        wanted -= len(epoch)


def _step(state: _State, items: list[PairTokens], centre: float) -> tuple[float, float]:
    """One optimiser step. Returns mean loss and accuracy of its pairs."""
    state.optimiser.zero_grad()
    loss_sum, hits = 0.0, 0
    lengths = [t.chosen.numel() + t.rejected.numel() - t.divergence for t in items]
    for micro in by_budget(lengths, MICRO_TOKENS):
        chosen, rejected = state.rewards([items[i] for i in micro])
        losses = -F.logsigmoid(chosen - rejected) + centre * (chosen + rejected) ** 2
        (losses.sum() / len(items)).backward()
        loss_sum += float(losses.detach().sum())
        hits += int((chosen > rejected).sum())
    nn.utils.clip_grad_norm_(state.parameters, 1.0)
    state.optimiser.step()
    return loss_sum / len(items), hits / len(items)


def _set_rate(optimiser: torch.optim.Optimizer, peak: float, step: int, total: int) -> None:
    warm = max(1, total // 20)
    share = (step + 1) / warm if step < warm else (total - step) / (total - warm)
    for group in optimiser.param_groups:
        group["lr"] = peak * min(1.0, share)


def _save(wrapped: Any, recipe: Recipe, out: Path) -> None:
    """Saves adapter and head in half precision: a few megabytes, and the loaded PM is the one that was measured."""
    for p in wrapped.parameters():
        if p.requires_grad:
            p.data = p.data.half()
    with atomic_folder(out) as folder:
        wrapped.save_pretrained(str(folder))
        (folder / "README.md").unlink(missing_ok=True)
        adapter = json.loads((folder / "adapter_config.json").read_text())
        adapter["base_model_name_or_path"] = recipe.base
        write_json(folder / "adapter_config.json", adapter)
        write_json(
            folder / "rmscope.json",
            {
                "base": recipe.base,
                "blocks": recipe.blocks,
                "rendering": RENDERING.as_dict(),
                "recipe": recipe_as_dict(recipe),
            },
        )

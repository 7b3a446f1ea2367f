"""Our own training loop for a PM: Bradley-Terry loss, LoRA and a score head on the zoo's base.

Unlike in TRL's RewardTrainer, the shared prefix of a pair runs once. Where bfloat16 products are fast they run under
autocast, while adapter, head and loss stay in float32.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from rmscope.errors import InputError
from rmscope.hardware import fast_products, place
from rmscope.io import Progress, atomic, atomic_folder, content_hash, silent, write_json
from rmscope.model.packing import by_budget, last_hidden_reads, pack_pairs, packed_length
from rmscope.model.rendering import SETTINGS_FILE, PairTokens, Rendering, read_json
from rmscope.model.training.recipe import Recipe, human_pairs, tokenize_pairs
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


def train_pm(recipe: Recipe, out: Path, progress: Progress = silent, device: str = "auto") -> dict[str, int | float]:
    """Trains a PM, writes it to ``out`` and returns the training figures. Raises :class:`InputError` where data are missing.

    An interrupted training continues from its last checkpoint beside ``out``. ``device`` is cpu, cuda, cuda:1, or auto.
    """
    pairs, _ = human_pairs(recipe)
    if recipe.planted_copies:
        tokenizer = base_of(recipe)[1]
        short = [pair for pair, _ in tokenize_pairs(pairs, tokenizer, RENDERING, recipe.planted_tokens)]
        for copy in range(recipe.planted_copies):
            pairs = pairs + plant_pairs(short, zoo_plants(), recipe.seed + copy, held_out=False)
    return fit_pm(pairs, recipe, out, progress, device)


def base_of(recipe: Recipe) -> tuple[Any, Any]:
    """A recipe's base and tokenizer. Sets torch's seed to that of the recipe, for every later draw of the training."""
    torch.manual_seed(recipe.seed)
    return load_base(recipe.blocks, recipe.base)


def fit_pm(
    pairs: Sequence[Pair], recipe: Recipe, out: Path, progress: Progress = silent, device: str = "auto"
) -> dict[str, int | float]:
    """:func:`train_pm` on these pairs, whatever data the recipe names. Raises :class:`InputError` for too few pairs."""
    from peft import get_peft_model

    base, tokenizer = base_of(recipe)
    items = [tokens for _, tokens in tokenize_pairs(pairs, tokenizer, RENDERING, recipe.max_tokens)]
    wrapped = get_peft_model(base, recipe.lora(adapter_modules(recipe), modules_to_save=["score"]))
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

    Returns (steps, mean loss and mean accuracy of the last 50). Raises :class:`InputError` for too few pairs for a step.
    """
    batches = list(_batches(items, recipe))
    if not batches:
        raise InputError(
            f"{len(items)} pairs of at most {recipe.max_tokens} tokens do not fill a step of {recipe.batch_pairs}; add some."
        )
    optimiser = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.0, betas=(0.9, 0.99))
    identity, first = content_hash(recipe.model_dump(), len(items)), 0
    if checkpoint.is_file() and (saved := torch.load(checkpoint, "cpu", weights_only=True))["identity"] == identity:
        first = saved["step"]
        optimiser.load_state_dict(saved["optimiser"])
        for p, value in zip(parameters, saved["parameters"], strict=True):
            p.data.copy_(value)
    recent: list[tuple[float, float]] = []
    warm = max(1, len(batches) // 20)
    for step, batch in enumerate(batches[first:], first + 1):
        share = step / warm if step <= warm else (len(batches) - step + 1) / (len(batches) - warm)
        optimiser.param_groups[0]["lr"] = recipe.learning_rate * min(1.0, share)
        optimiser.zero_grad()
        recent.append(_accumulate(model, head, [items[i] for i in batch], recipe.centre))
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        loss, accuracy = np.mean(recent[-50:], axis=0)
        progress(step, len(batches), f"loss {loss:.3f}  accuracy {accuracy:.3f}")
        if step % CHECKPOINT_STEPS == 0 and step < len(batches):
            state = {"step": step, "parameters": [p.detach() for p in parameters], "optimiser": optimiser.state_dict()}
            with atomic(checkpoint) as temporary:
                torch.save({**state, "identity": identity}, temporary)
    return len(batches), float(loss), float(accuracy)


def _batches(items: Sequence[PairTokens], recipe: Recipe) -> Iterator[list[int]]:
    """Batches of pairs of similar length, in random order; shuffled again in each epoch."""
    rng, size, lengths = random.Random(recipe.seed), recipe.batch_pairs, [packed_length(t) for t in items]
    wanted = int(recipe.epochs * len(items)) // size
    while wanted > 0:
        order = rng.sample(range(len(items)), len(items))
        chunks = [order[i : i + 16 * size] for i in range(0, len(order), 16 * size)]
        by_length = [i for chunk in chunks for i in sorted(chunk, key=lengths.__getitem__)]
        epoch = [by_length[i : i + size] for i in range(0, len(items) - size + 1, size)]
        rng.shuffle(epoch)
        yield from epoch[:wanted]
        wanted -= len(epoch)


def _accumulate(model: Any, head: nn.Module, items: Sequence[PairTokens], centre: float) -> tuple[float, float]:
    """Adds up the gradients of one step. Returns mean loss and accuracy of its pairs. Texts are read at their last token."""
    loss_sum, hits, device = 0.0, 0, next(head.parameters()).device
    for micro in by_budget([packed_length(t) for t in items], MICRO_TOKENS):
        tokens = [items[i] for i in micro]
        ends = [{"chosen": t.chosen.numel() - 1, "rejected": t.rejected.numel() - 1} for t in tokens]
        batch = pack_pairs(list(zip(micro, tokens, ends, strict=True)))
        with fast_products(device):
            hidden = model(**batch.inputs(device, torch.float32), use_cache=False).last_hidden_state
        chosen, rejected = head(last_hidden_reads(hidden, batch).float()).view(-1, 2).unbind(1)
        losses = -F.logsigmoid(chosen - rejected) + centre * (chosen + rejected) ** 2
        (losses.sum() / len(items)).backward()
        loss_sum += float(losses.detach().sum())
        hits += int((chosen > rejected).sum())
    return loss_sum / len(items), hits / len(items)


def _save(wrapped: Any, recipe: Recipe, out: Path) -> None:
    """Saves adapter and head in half precision: a few megabytes, and the loaded PM is the one that was measured."""
    for p in wrapped.parameters():
        if p.requires_grad:
            p.data = p.data.half()
    with atomic_folder(out, SETTINGS_FILE) as folder:
        wrapped.save_pretrained(str(folder))
        (folder / "README.md").unlink(missing_ok=True)
        adapter = read_json(folder / "adapter_config.json")
        write_json(folder / "adapter_config.json", {**adapter, "base_model_name_or_path": recipe.base})
        settings = {"base": recipe.base, "blocks": recipe.blocks, "rendering": RENDERING.as_dict()}
        write_json(folder / SETTINGS_FILE, {**settings, "recipe": recipe.model_dump()})

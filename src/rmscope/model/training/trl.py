"""Training a PM with TRL's RewardTrainer: an adapter (LoRA) or all weights, on any base that transformers gives a head.

TRL gets token ids, rendered as it would itself, so the PM is trained on exactly the tokens that ``RewardModel`` reads.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rmscope.errors import InputError, one_line
from rmscope.hardware import has_fast_bfloat16, place
from rmscope.io import Progress, atomic_folder, content_hash, local_path, silent, write_json
from rmscope.model.loading import as_input_error, local_or_hub
from rmscope.model.rendering import SETTINGS_FILE, Rendering, read_json
from rmscope.model.sites import Trunk
from rmscope.model.training.recipe import TrlRecipe, human_pairs, tokenize_pairs
from rmscope.model.zoo import quiet_transformers
from rmscope.pairs.pair import SIDES

RECENT = 50
"""Final loss and accuracy are means over this many last steps."""


def train_trl(recipe: TrlRecipe, out: Path, progress: Progress = silent) -> dict[str, int | float]:
    """Trains a PM, writes it to ``out``, returns the training figures. Continues from a checkpoint in ``OUT.checkpoints``.

    Raises :class:`InputError` where TRL, data or the base are missing, or no pair is left.
    """
    _check(recipe)
    model, tokenizer, fresh = _base(recipe)
    rendering = rendering_of(recipe, tokenizer)
    longest = min(recipe.max_tokens, Trunk(model).context)
    pairs, held = human_pairs(recipe)
    tokens = [t for _, t in tokenize_pairs(pairs, tokenizer, rendering, longest)]
    if not tokens:
        raise InputError(
            f"No pair is left to train on: {len(held)} rows are held out (held_out_rows), and of the other {len(pairs)} "
            f"pairs none has sides that differ and at most {longest} tokens (max_tokens); give more, or change these keys."
        )
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import RewardTrainer  # type: ignore[attr-defined]

    rows = [{f"{side}_ids": t.side(side).tolist() for side in SIDES} for t in tokens]
    checkpoints = out.with_name(out.name + ".checkpoints")
    done = _resume(checkpoints, content_hash(recipe.model_dump(), rendering.as_dict(), *rows))
    trainer = RewardTrainer(
        model=model,
        args=_arguments(recipe, checkpoints),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=_lora(recipe, model, fresh) if recipe.method == "lora" else None,
        callbacks=[_reporter(progress)],
    )
    trainer.remove_callback(PrinterCallback)  # it prints to stdout
    trainer.train(resume_from_checkpoint=done)
    _save(trainer, recipe, rendering, out)
    shutil.rmtree(checkpoints)
    means = {f"training_{name}": value for name, value in _recent(trainer.state).items()}
    return {"pairs": len(tokens), "steps": trainer.state.max_steps, **means}


def rendering_of(recipe: TrlRecipe, tokenizer: Any) -> Rendering:
    """The rendering that TRL uses: the chat template, or text with eos appended if the tokenizer has one."""
    template = bool(getattr(tokenizer, "chat_template", None))
    style = recipe.style or ("chat" if template else "hh")
    if style == "chat" and not template:
        raise InputError(f"The base {recipe.base} has no chat template; set style to hh or plain.")
    return Rendering(style, append_eos=style != "chat" and tokenizer.eos_token_id is not None)


def _check(recipe: TrlRecipe) -> None:
    """Raises InputError, before anything is loaded, where the training cannot run."""
    try:
        import trl  # noqa: F401
    except ImportError as error:
        raise InputError(
            "This recipe trains with TRL, which is not installed (or lacks something: "
            f"{one_line(error)}); pip install 'rmscope[train]'."
        ) from error
    if recipe.batch_pairs % recipe.micro_pairs:
        raise InputError(
            f"A batch of {recipe.batch_pairs} pairs cannot be split into passes of {recipe.micro_pairs}; choose micro_pairs "
            "so that it divides batch_pairs."
        )
    if torch.cuda.device_count() > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "rmscope trains in one process on one device; start it without torchrun and with CUDA_VISIBLE_DEVICES=0, or "
            "train with TRL itself and load the model that it saves."
        )


def _base(recipe: TrlRecipe) -> tuple[Any, Any, list[str]]:
    """The base with one output, its tokenizer, and the names of the newly initialised modules (head, pooler)."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    name = local_or_hub(recipe.base)
    torch.manual_seed(recipe.seed)
    with as_input_error(f"The base {recipe.base}"), quiet_transformers():
        model, info = AutoModelForSequenceClassification.from_pretrained(
            name,
            num_labels=1,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
        )
    with as_input_error(f"The tokenizer of {recipe.base}"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise InputError(
            f"The tokenizer of {recipe.base} has no pad and no eos token, so texts cannot be batched; give it a pad token."
        )
    fresh = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    trunk = {id(p) for part in (Trunk(model).blocks, model.get_input_embeddings()) for p in part.parameters()}
    if lost := sorted(key for key, p in model.named_parameters() if key in fresh and id(p) in trunk):
        raise InputError(
            f"The base {recipe.base} lacks {', '.join(lost[:3])}: it would be trained from noise; name a complete one."
        )
    return model, tokenizer, sorted({key.rpartition(".")[0] for key in fresh})


def _resume(folder: Path, identity: str) -> str | None:
    """The newest whole checkpoint of the same training. Others, and those without their last file, are deleted."""
    mark = folder / "training.json"
    if read_json(mark).get("identity") != identity:
        shutil.rmtree(folder, ignore_errors=True)
        write_json(mark, {"identity": identity})
    for path in folder.glob("checkpoint-*"):
        if not (path / "trainer_state.json").is_file():
            shutil.rmtree(path)
    whole = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    return str(whole[-1]) if whole else None


def _lora(recipe: TrlRecipe, model: Any, fresh: Sequence[str]) -> Any:
    """An adapter on every linear map of the blocks. Head and pooler are trained in full and saved with it."""
    from transformers.pytorch_utils import Conv1D

    inside = set(Trunk(model).blocks.modules())
    maps = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m in inside}
    transposed = any(isinstance(m, Conv1D) for m in maps.values())
    others = [name for name in fresh if name.split(".")[0] not in ("score", "classifier")]  # peft adds those
    return recipe.lora(list(maps), fan_in_fan_out=transposed, modules_to_save=others)


def _arguments(recipe: TrlRecipe, checkpoints: Path) -> Any:
    from trl import RewardConfig  # type: ignore[attr-defined]

    device = place("auto")
    return RewardConfig(
        output_dir=str(checkpoints),
        per_device_train_batch_size=recipe.micro_pairs,
        gradient_accumulation_steps=recipe.batch_pairs // recipe.micro_pairs,
        num_train_epochs=recipe.epochs,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=0.05,
        center_rewards_coefficient=recipe.centre,
        max_length=None,  # longer pairs are left out before
        seed=recipe.seed,
        use_cpu=device == "cpu",
        bf16=has_fast_bfloat16(device),
        gradient_checkpointing=device == "cuda",
        dataloader_pin_memory=device == "cuda",
        save_strategy="steps",
        save_steps=recipe.checkpoint_steps,
        save_total_limit=1,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
    )


def _reporter(progress: Progress) -> Any:
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if recent := _recent(state):
                note = "  ".join(f"{name} {value:.3f}" for name, value in recent.items())
                progress(state.global_step, state.max_steps, note)

    return Reporter()


def _recent(state: Any) -> dict[str, float]:
    """Mean loss and accuracy of the last steps; empty before the first."""
    log = [entry for entry in state.log_history if "loss" in entry][-RECENT:]
    return {name: float(np.mean([entry[name] for entry in log])) for name in ("loss", "accuracy") if log}


def _save(trainer: Any, recipe: TrlRecipe, rendering: Rendering, out: Path) -> None:
    """Saves adapter and head, or the whole model, and the tokenizer, in float32: the loaded PM is the trained one."""
    with atomic_folder(out, SETTINGS_FILE) as folder:
        trainer.save_model(str(folder))
        for extra in ("training_args.bin", "README.md"):
            (folder / extra).unlink(missing_ok=True)
        adapter = folder / "adapter_config.json"
        if adapter.is_file():
            base = local_path(recipe.base)
            name = str(base.resolve()) if base.is_dir() else recipe.base
            write_json(adapter, {**read_json(adapter), "base_model_name_or_path": name})
        write_json(folder / SETTINGS_FILE, {"rendering": rendering.as_dict(), "recipe": recipe.model_dump()})

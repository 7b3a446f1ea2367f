"""Loading a PM and refusing what is none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from rmscope.errors import InputError
from rmscope.files import content_hash
from rmscope.model.rendering import Rendering, stored_settings
from rmscope.model.zoo import BASE, load_adapted, load_zoo

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def load(
    source: str, dtype: str, adapter: str | None, revision: str | None, trust_remote_code: bool
) -> tuple[Any, Any, Path | None]:
    """The model, its tokenizer, and its folder where it has one on disk."""
    if dtype not in ("float32", "bfloat16", "float16"):
        raise InputError(f"--dtype {dtype} is not known; use float32, bfloat16 or float16.")
    if source == BASE:
        raise InputError("zoo:smollm2 is a base without a scalar head; use zoo:hh or zoo:planted, or train a PM on it.")
    path = Path(source).expanduser()
    ours = source.startswith("zoo:") or _is_ours(path)
    if ours and adapter is not None:
        raise InputError(f"{source} holds its own adapter; --adapter is for PMs and bases in transformers' format.")
    if ours:
        model, tokenizer, folder = load_zoo(source[4:]) if source.startswith("zoo:") else load_adapted(path)
        return model.to(getattr(torch, dtype)), tokenizer, folder
    model, tokenizer = _from_transformers(source, dtype, adapter, revision, trust_remote_code)
    return model, tokenizer, path if path.is_dir() else None


def is_base(source: str) -> bool:
    """Whether a source is a base: the zoo's, or a model folder that holds no scalar head."""
    from transformers import AutoConfig

    path = Path(source).expanduser()
    if source == BASE or not (path / "config.json").is_file() or _is_ours(path):
        return source == BASE
    with _readable(f"The model {source}"):
        return not _has_head(AutoConfig.from_pretrained(path))


def _is_ours(path: Path) -> bool:
    return "base" in stored_settings(path)


def _from_transformers(
    source: str, dtype: str, adapter: str | None, revision: str | None, trust_remote_code: bool
) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    path = Path(source).expanduser()
    if (source.startswith((".", "/", "~")) or path.exists()) and not (path / "config.json").is_file():
        raise InputError(f"{source} is no model folder: it holds no config.json; name a folder that transformers can load.")
    place = str(path) if path.is_dir() else source
    brought = {} if adapter is None else _adapter_weights(adapter)
    with _readable(f"The PM {source}"):
        config = AutoConfig.from_pretrained(place, **options)
        if not _has_head(config):
            heads = [shape[0] for name, shape in brought.items() if name.endswith("score.weight")]
            if not heads:
                raise InputError(
                    f"{source} is a {(config.architectures or ['model'])[0]}, without a scalar head: its score.weight "
                    "would be newly initialised; name a sequence-classification PM, or an --adapter that brings the head."
                )
            config.num_labels = heads[0]
        model, info = AutoModelForSequenceClassification.from_pretrained(
            place,
            config=config,
            dtype=getattr(torch, dtype),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told apart below
            **options,
        )
    with _readable(f"The tokenizer of {source}"):
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
    if mismatched := sorted(info.get("mismatched_keys", [])):
        name, stored, wanted = mismatched[0]
        raise InputError(
            f"{source} holds {name} as {list(stored)}, but its config.json asks for {list(wanted)}; mend the config "
            "(num_labels, say)."
        )
    missing = [m for m in sorted(info.get("missing_keys", [])) if not any(name.endswith(m) for name in brought)]
    if missing:
        raise InputError(
            f"{source} lacks {', '.join(missing[:3])}: they would be newly initialised and the rewards would be noise; "
            "name a PM whose checkpoint holds its head."
        )
    if adapter is not None:
        from peft import PeftModel

        with _readable(f"The adapter {adapter}"):
            model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return model, tokenizer


def _adapter_weights(adapter: str) -> dict[str, list[int]]:
    """Name and shape of what a PEFT adapter holds."""
    from peft import load_peft_weights

    with _readable(f"The adapter {adapter}"):
        return {name: list(tensor.shape) for name, tensor in load_peft_weights(adapter, device="cpu").items()}


@contextmanager
def _readable(what: str) -> Iterator[None]:
    """Turns what transformers and peft raise into one sentence."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{what} could not be loaded ({lines[0].strip(' .:')}); check its name and its files.") from error


def _has_head(config: Any) -> bool:
    """A checkpoint that says it is something else (a causal LM, say) has no scalar head."""
    architectures = config.architectures or []
    return not architectures or any("SequenceClassification" in a or "Reward" in a for a in architectures)


def output_weights(model: Any, output: int | Sequence[float] | None) -> Tensor:
    """How the model's outputs make one reward, [outputs]."""
    n = int(model.config.num_labels)
    if output is None:
        if n != 1:
            raise InputError(f"The PM has {n} outputs, not one; pick one with output=0 .. {n - 1}, or give {n} weights.")
        return torch.ones(1)
    weights = torch.zeros(n)
    if isinstance(output, int):
        if not 0 <= output < n:
            raise InputError(f"output={output} is not there: the PM has {n} outputs, 0 .. {n - 1}.")
        weights[output] = 1.0
        return weights
    if len(output) != n:
        raise InputError(f"output= holds {len(output)} weights, but the PM has {n} outputs.")
    return torch.tensor(list(output))


def identity(model: Any, tokenizer: Any, rendering: Rendering) -> str:
    """A content hash that reads every tensor once: name, shape, sum, and 64 entries at even distance.

    The sum is that of the entries' bits as whole numbers: unlike a sum of floats it does not depend on the order in
    which a device adds.
    """
    rows = []
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().reshape(-1)
        bits = flat.view(BITS[flat.element_size()])
        step = max(1, flat.numel() // 64)
        rows.append((name, list(tensor.shape), int(bits.sum(dtype=torch.int64)), bits[::step][:64].tolist()))
    probe = tokenizer("A probe of the tokenizer: 12,345 words.").input_ids
    return content_hash(rows, probe, getattr(tokenizer, "chat_template", None), rendering.as_dict())

"""Loading a PM and refusing what is none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rmscope.errors import InputError
from rmscope.files import content_hash
from rmscope.model.rendering import Rendering, stored_settings
from rmscope.model.zoo import load_adapted, load_zoo

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def load(
    source: str, dtype: str, adapter: str | None, revision: str | None, trust_remote_code: bool
) -> tuple[Any, Any, Path | None]:
    """The model, its tokenizer, and its folder where it has one on disk."""
    if dtype not in ("float32", "bfloat16", "float16"):
        raise InputError(f"--dtype {dtype} is not known; use float32, bfloat16 or float16.")
    if source == "zoo:smollm2":
        raise InputError("zoo:smollm2 is a base without a scalar head; use zoo:hh or zoo:planted, or train a PM on it.")
    if source.startswith("zoo:"):
        model, tokenizer, folder = load_zoo(source[4:])
        return model.to(getattr(torch, dtype)), tokenizer, folder
    path = Path(source)
    if _is_ours(path):
        model, tokenizer, folder = load_adapted(path)
        return model.to(getattr(torch, dtype)), tokenizer, folder
    model, tokenizer = _from_transformers(source, dtype, adapter, revision, trust_remote_code)
    return model, tokenizer, path if path.is_dir() else None


def _is_ours(path: Path) -> bool:
    return "base" in stored_settings(path)


def _from_transformers(
    source: str, dtype: str, adapter: str | None, revision: str | None, trust_remote_code: bool
) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    looks_local = source.startswith((".", "/", "~")) or Path(source).exists()
    if looks_local and not (Path(source).expanduser() / "config.json").is_file():
        raise InputError(f"{source} is no model folder: it holds no config.json; name a folder that transformers can load.")
    try:
        config = AutoConfig.from_pretrained(source, **options)
        if not _has_head(config) and adapter is None:
            raise InputError(
                f"{source} is a {(config.architectures or ['model'])[0]}, without a scalar head: its score.weight would be "
                "newly initialised; name a sequence-classification PM, or an --adapter that brings the head."
            )
        model, info = AutoModelForSequenceClassification.from_pretrained(
            source, dtype=getattr(torch, dtype), output_loading_info=True, **options
        )
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"The PM {source} could not be loaded: {reason}") from error
    missing = sorted(info.get("missing_keys", []))
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        missing = []
    if missing:
        raise InputError(
            f"{source} lacks {', '.join(missing[:3])}: they would be newly initialised and the rewards would be noise; "
            "name a PM whose checkpoint holds its head."
        )
    return model, tokenizer


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

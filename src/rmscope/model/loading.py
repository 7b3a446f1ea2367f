"""Loading a PM, and refusing a model that is not one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from torch import Tensor

from rmscope.errors import InputError
from rmscope.io import content_hash
from rmscope.model.rendering import SETTINGS_FILE, Rendering, read_json
from rmscope.model.zoo import BASE, base_folder, load_adapted, load_base, quiet_transformers, zoo_folder

HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")
"""Names of the last linear map of a scalar head."""
PROBE = "A probe of the tokenizer: 12,345 words."
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def load(
    source: str, dtype: str, place: str, adapter: str | None, revision: str | None, trust_remote_code: bool
) -> tuple[Any, Any, Rendering]:
    """The model on its device, its tokenizer, and its rendering. Raises InputError where the source is not a PM."""
    try:
        torch.device(place)  # hooks, caches and SAEs do not follow a PM over several
    except RuntimeError as error:
        raise InputError(
            f"--device {place} is not a device: a PM is studied on one (cpu, cuda, cuda:1), not spread over several; name a "
            "device that is large enough, or halve the PM with --dtype bfloat16."
        ) from error
    if dtype not in ("float32", "bfloat16", "float16"):
        raise InputError(f"--dtype {dtype} is not known; use float32, bfloat16 or float16.")
    if source == BASE:
        raise InputError("zoo:smollm2 is a base without a scalar head; use zoo:hh or zoo:planted, or train a PM on it.")
    path = zoo_folder(source[4:]) if source.startswith("zoo:") else Path(source).expanduser()
    if "base" in read_json(path / SETTINGS_FILE):
        if adapter is not None:
            raise InputError(f"{source} has its own adapter; --adapter is for PMs and bases in transformers' format.")
        model, tokenizer = load_adapted(path)
        for parameter in model.parameters():  # not the buffers: rotary frequencies in bfloat16 would be wrong later on
            parameter.data = parameter.data.to(getattr(torch, dtype))
        return model.to(place), tokenizer, Rendering.find(path, tokenizer)
    if adapter is None and (base := _adapted_base(path)):
        source, adapter = base, source
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    model, tokenizer = _from_transformers(source, dtype, place, adapter, options)
    card = _card(source, revision) + ("" if adapter is None else _card(adapter, None))
    folders = [Path(p).expanduser() for p in (adapter, source) if p is not None]
    beside = next((p for p in folders if (p / SETTINGS_FILE).is_file()), None)
    return model, tokenizer, Rendering.find(beside, tokenizer, card)


def load_base_of(
    source: str,
    dtype: str,
    place: str,
    adapter: str | None,
    revision: str | None,
    trust_remote_code: bool,
    base: str | None,
    tokenizer: Any,
) -> tuple[Any, str] | None:
    """The transformers module (without a head) of a PM's base, and its name; None where the PM names none.

    That is ``base``; else what the adapter was put on; else the ``base_model`` of the PM's card. Raises InputError where the
    base is named but not there, or splits text into other tokens.
    """
    from transformers import AutoModel, AutoTokenizer

    path = zoo_folder(source[4:]) if source.startswith("zoo:") else Path(source).expanduser()
    settings = read_json(path / SETTINGS_FILE)
    if base is None and "base" in settings:
        model, _ = load_base(settings["blocks"], settings["base"])
        return _as_base(model.base_model, dtype, place), settings["base"]
    if base is None:
        base = (_adapted_base(path) or _base_in_card(_card(source, revision))) if adapter is None else source
    if base is None:
        return None
    name = local_or_hub(base)
    with as_input_error(f"The base {base} of {source}"), quiet_transformers():
        model = AutoModel.from_pretrained(name, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code)
        words = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    if words(PROBE).input_ids != tokenizer(PROBE).input_ids:
        raise InputError(
            f"The base {base} splits text into other tokens than {source}; name the base that the PM was trained from."
        )
    return _as_base(model, dtype, place), base


def _base_in_card(card: str) -> str | None:
    """The ``base_model`` of a model card's YAML header; None where it names none."""
    header = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
    with suppress(yaml.YAMLError):
        named = (yaml.safe_load(header[1]) or {}).get("base_model") if header else None
        named = named[0] if isinstance(named, list) and named else named
        return named if isinstance(named, str) and named else None
    return None


def _as_base(model: Any, dtype: str, place: str) -> Any:
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype))
    return model.to(place)


def _adapted_base(folder: Path) -> str | None:
    """The base that an adapter's folder names; None where the folder holds a whole model, or none."""
    path = folder / "adapter_config.json"
    if (folder / "config.json").is_file() or not path.is_file():
        return None
    base = str(read_json(path).get("base_model_name_or_path") or "")
    if not base:
        raise InputError(
            f"{path} names no base; add its base_model_name_or_path, or give the base as --model and this as --adapter."
        )
    return str(base_folder()) if base == BASE else base


def _card(source: str, revision: str | None) -> str:
    """The model card of a PM or an adapter, on disk or on the hub; empty without one."""
    from transformers.utils.hub import cached_file

    folder = Path(source).expanduser()
    path: Any = folder / "README.md"
    if not folder.is_dir():
        optional = {f"_raise_exceptions_for_{w}": False for w in ("gated_repo", "missing_entries", "connection_errors")}
        path = cached_file(source, "README.md", revision=revision, **optional)
    return Path(path).read_text("utf-8", errors="replace") if path and Path(path).is_file() else ""


def is_base(source: str) -> bool:
    """Whether a source is a base: the zoo's, or a model folder without a scalar head."""
    from transformers import AutoConfig

    path = Path(source).expanduser()
    if source == BASE or not (path / "config.json").is_file() or "base" in read_json(path / SETTINGS_FILE):
        return source == BASE
    with as_input_error(f"The model {source}"):
        return not _has_head(AutoConfig.from_pretrained(path, trust_remote_code=False))


def local_or_hub(source: str) -> str:
    """A source as transformers loads it: a folder's path, or a hub id. Raises InputError for a folder without a model."""
    path = base_folder() if source == BASE else Path(source).expanduser()
    if (source.startswith((".", "/", "~")) or path.exists()) and not (path / "config.json").is_file():
        raise InputError(f"{source} is not a model folder: it has no config.json; name one, or a hub id.")
    return str(path) if path.is_dir() else source


def _from_transformers(source: str, dtype: str, place: str, adapter: str | None, options: dict[str, Any]) -> tuple[Any, Any]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    name = local_or_hub(source)
    brought: dict[str, list[int]] = {}
    if adapter is not None:
        from peft import PeftModel, load_peft_weights

        with as_input_error(f"The adapter {adapter}"):
            brought = {key: list(tensor.shape) for key, tensor in load_peft_weights(adapter, device="cpu").items()}
    config = _config(source, name, brought, options)
    with as_input_error(f"The PM {source}"), quiet_transformers() if brought else nullcontext():
        model, info = AutoModelForSequenceClassification.from_pretrained(
            name,
            config=config,
            dtype=getattr(torch, dtype),
            device_map={"": place},
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # checked below
            **options,
        )
    words, at = name, options
    if adapter is not None and (Path(adapter).expanduser() / "tokenizer_config.json").is_file():
        words, at = str(Path(adapter).expanduser()), {**options, "revision": None}
    with as_input_error(f"The tokenizer of {words}"):
        tokenizer = AutoTokenizer.from_pretrained(words, **at)
    if words != name and tokenizer.pad_token_id is not None:  # the padding that the adapter was trained with
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    _check_whole(source, info, brought)
    if adapter is not None:
        with as_input_error(f"The adapter {adapter}"):
            model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return model, tokenizer


def _config(source: str, name: str, brought: dict[str, list[int]], options: dict[str, Any]) -> Any:
    """The config of a PM. Raises InputError where the model is not a PM, or needs code that is not trusted."""
    import transformers

    with as_input_error(f"The PM {source}"):
        stored, _ = transformers.PreTrainedConfig.get_config_dict(name, revision=options["revision"])
        made_as = (stored.get("architectures") or ["model"])[0]
        if stored.get("auto_map") and not hasattr(transformers, made_as) and not options["trust_remote_code"]:
            raise InputError(
                f"{source} is a {made_as}, whose code comes with its checkpoint and would run on this machine; read that "
                "code and pass --trust-remote-code, or name another PM."
            )
        config = transformers.AutoConfig.from_pretrained(name, **options)
    heads = [shape[0] for key, shape in brought.items() if key.endswith(HEADS)]
    if heads:
        config.num_labels = heads[0]
    elif not _has_head(config):
        raise InputError(
            f"{source} is a {made_as}, without a scalar head: its score.weight would be newly initialised; name a "
            "sequence-classification PM, or an --adapter that contains the head."
        )
    return config


def _check_whole(source: str, info: dict[str, Any], brought: dict[str, list[int]]) -> None:
    """Raises InputError where a weight would be newly initialised, or has another shape than in the config."""
    mismatched = sorted(m for m in info.get("mismatched_keys", []) if not any(name.endswith(m[0]) for name in brought))
    if mismatched:
        name, stored, wanted = mismatched[0]
        raise InputError(
            f"{source} holds {name} as {list(stored)}, but its config.json asks for {list(wanted)}; correct the config "
            "(num_labels, for example)."
        )
    missing = [m for m in sorted(info.get("missing_keys", [])) if not any(name.endswith(m) for name in brought)]
    if missing:
        raise InputError(
            f"{source} lacks {', '.join(missing[:3])}: they would be newly initialised and the rewards would be noise; "
            "name a PM whose checkpoint contains its head."
        )


@contextmanager
def as_input_error(what: str) -> Iterator[None]:
    """Turns the errors of transformers and peft into an InputError of one sentence."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{what} could not be loaded ({lines[0].strip(' .:')}); check its name and its files.") from error


def _has_head(config: Any) -> bool:
    """False for a config that names another kind of model, such as a causal LM."""
    return not config.architectures or any("SequenceClassification" in a or "Reward" in a for a in config.architectures)


def output_weights(model: Any, output: int | Sequence[float] | None, head: Any = None) -> Tensor:
    """The weight of each output in the reward, [outputs] float32. Raises InputError where the choice is missing or wrong."""
    if head is not None and output is not None:
        raise InputError("A head of its own has one output; leave out output=, or apply the weights inside the head.")
    n = 1 if head is not None else int(model.config.num_labels)
    if output is None and n != 1:
        raise InputError(f"The PM has {n} outputs, not one; pick one with --output 0 .. {n - 1}, or give {n} weights.")
    if output is None or isinstance(output, int):
        if not 0 <= (output or 0) < n:
            raise InputError(f"There is no --output {output}: the PM has {n} outputs, 0 .. {n - 1}.")
        return torch.eye(n)[output or 0]
    if len(output) != n:
        raise InputError(f"--output has {len(output)} weights, but the PM has {n} outputs; give one weight per output.")
    return torch.tensor(list(output), dtype=torch.float32)


def identity(model: Any, tokenizer: Any, rendering: Rendering, weights: Tensor, head: Any = None) -> str:
    """A content hash of a PM: each tensor's name, shape, sum of bits (no device rounds it) and 64 entries; and the rest."""
    parts = [fingerprint(model), tokenizer(PROBE).input_ids, getattr(tokenizer, "chat_template", None), rendering.as_dict()]
    if weights.tolist() != [1.0]:
        parts.append(weights.tolist())
    if head is not None:
        parts.append([type(head).__name__, fingerprint(head)])
    return content_hash(*parts)


def fingerprint(module: Any) -> list[Any]:
    """Each tensor's name, shape, sum of bits (no device rounds it) and 64 entries."""
    rows = []
    for name, tensor in module.state_dict().items():
        flat = tensor.detach().reshape(-1)
        bits = flat.view(BITS[flat.element_size()])
        step = max(1, flat.numel() // 64)
        rows.append((name, list(tensor.shape), int(bits.sum(dtype=torch.int64)), bits[::step][:64].tolist()))
    return rows

"""Loading a PM, and refusing a model that is not one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn

from rmscope.errors import InputError, one_line
from rmscope.hardware import check_device
from rmscope.io import content_hash, local_path
from rmscope.model.blocks import REFUSALS
from rmscope.model.checkpoint import StoredHead, StoredWeights, check_code, stored_head, stored_weights
from rmscope.model.rendering import SETTINGS_FILE, Rendering, read_json
from rmscope.model.zoo import BASE, base_folder, load_adapted, load_base, quiet_transformers, zoo_folder

HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")
"""Names of the last linear map of a scalar head."""
LOAD_ERRORS = (
    *REFUSALS, OSError, ImportError, NameError, SyntaxError, EOFError, ArithmeticError, UnpicklingError, SafetensorError,
    StrictDataclassError,
)  # fmt: skip
"""What transformers, torch, peft and safetensors raise where a file of a checkpoint is missing, damaged or hostile."""
PROBE = "A probe of the tokenizer: 12,345 words."
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def load(
    source: str, dtype: str, place: str, adapter: str | None, revision: str | None, trust_remote_code: bool
) -> tuple[Any, Any, Rendering, StoredHead | None]:
    """The model on its device, its tokenizer, its rendering, and its head where transformers does not load that itself.

    Raises InputError where the source is not a PM.
    """
    check_device(place)  # one device: hooks, caches and SAEs do not follow a PM over several
    if dtype not in ("float32", "bfloat16", "float16"):
        raise InputError(f"--dtype {dtype} is not known; use float32, bfloat16 or float16.")
    if revision is not None and (source.startswith("zoo:") or local_path(source).exists()):
        raise InputError(f"{source} is here, and only PMs on the hub have revisions; leave --revision out.")
    if source == BASE:
        raise InputError("zoo:smollm2 is a base without a scalar head; use zoo:hh or zoo:planted, or train a PM on it.")
    path = zoo_folder(source[4:]) if source.startswith("zoo:") else local_path(source)
    if "base" in read_json(path / SETTINGS_FILE):
        if adapter is not None:
            raise InputError(f"{source} has its own adapter; --adapter is for PMs and bases in transformers' format.")
        model, tokenizer = load_adapted(path)
        for parameter in model.parameters():  # not the buffers: rotary frequencies in bfloat16 would be wrong later on
            parameter.data = parameter.data.to(getattr(torch, dtype))
        return model.to(place), tokenizer, Rendering.find(path, tokenizer), None
    if adapter is None and (base := _adapted_base(path)):
        source, adapter = base, source
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    model, tokenizer, head = _from_transformers(source, dtype, place, adapter, options)
    check_finite(source, model)
    card = _card(source, revision) + ("" if adapter is None else _card(adapter, None))
    folders = [local_path(p) for p in (adapter, source) if p is not None]
    beside = next((p for p in folders if (p / SETTINGS_FILE).is_file()), None)
    return model, tokenizer, Rendering.find(beside, tokenizer, card), head


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

    path = zoo_folder(source[4:]) if source.startswith("zoo:") else local_path(source)
    settings = read_json(path / SETTINGS_FILE)
    if base is None and "base" in settings:
        model, _ = load_base(settings["blocks"], settings["base"])
        return _as_base(model.base_model, dtype, place), settings["base"]
    base = base or base_name(source, adapter, revision)
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


def base_name(source: str, adapter: str | None, revision: str | None) -> str | None:
    """The name of the base of a PM, from its adapter or its card; it is not loaded. None where none is named."""
    path = zoo_folder(source[4:]) if source.startswith("zoo:") else Path(source).expanduser()
    if "base" in (settings := read_json(path / SETTINGS_FILE)):
        return str(settings["base"])
    return source if adapter is not None else _adapted_base(path) or _base_in_card(_card(source, revision))


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

    folder = local_path(source)
    path: Any = folder / "README.md"
    if not folder.is_dir():
        optional = {f"_raise_exceptions_for_{w}": False for w in ("gated_repo", "missing_entries", "connection_errors")}
        path = cached_file(source, "README.md", revision=revision, **optional)
    return Path(path).read_text("utf-8", errors="replace") if path and Path(path).is_file() else ""


def is_base(source: str) -> bool:
    """Whether a source is a base: the zoo's, or a model folder without a scalar head."""
    from transformers import AutoConfig

    path = local_path(source)
    if source == BASE or not (path / "config.json").is_file() or "base" in read_json(path / SETTINGS_FILE):
        return source == BASE
    with as_input_error(f"The model {source}"):
        return not _has_head(AutoConfig.from_pretrained(path, trust_remote_code=False))


def local_or_hub(source: str) -> str:
    """A source as transformers loads it: a folder's path, or a hub id. Raises InputError for a folder without a model."""
    path = base_folder() if source == BASE else local_path(source)
    if (source.startswith((".", "/", "~")) or path.exists()) and not (path / "config.json").is_file():
        raise InputError(f"{source} is not a model folder: it has no config.json; name one, or a hub id.")
    return str(path) if path.is_dir() else source


def _from_transformers(
    source: str, dtype: str, place: str, adapter: str | None, options: dict[str, Any]
) -> tuple[Any, Any, StoredHead | None]:
    from transformers import AutoModelForSequenceClassification

    name = local_or_hub(source)
    brought: dict[str, list[int]] = {}
    if adapter is not None:
        from peft import PeftModel, load_peft_weights

        with as_input_error(f"The adapter {adapter}"):
            brought = {key: list(tensor.shape) for key, tensor in load_peft_weights(adapter, device="cpu").items()}
    config, weights = _config(source, name, adapter, brought, options)
    with as_input_error(f"The PM {source}"), quiet_transformers() if brought or weights else nullcontext():
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
    if adapter is not None and (local_path(adapter) / "tokenizer_config.json").is_file():
        words, at = str(local_path(adapter)), {**options, "revision": None}
    tokenizer = load_tokenizer(words, at)
    if words != name and tokenizer.pad_token_id is not None:  # the padding that the adapter was trained with
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    head = _other_head(source, name, options["revision"], model, info, weights)
    check_whole(source, info, [*brought, *(["score.weight"] if head is not None else [])])
    check_all_blocks_used(source, info, model)
    if adapter is not None:
        with as_input_error(f"The adapter {adapter}"):
            _grow_embeddings(model, brought)
            model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return model, tokenizer, head


def _config(
    source: str, name: str, adapter: str | None, brought: dict[str, list[int]], options: dict[str, Any]
) -> tuple[Any, StoredWeights | None]:
    """The config of a PM, and its stored weights where the config names another kind of model.

    Raises InputError where the model is not a PM, or needs code that is not trusted.
    """
    import transformers

    with as_input_error(f"The PM {source}"):
        made_as, own_code = check_code(source, name, options)
        config = transformers.AutoConfig.from_pretrained(name, **options)
        text = config.get_text_config()
        pad = getattr(text, "pad_token_id", None)
        if pad is not None and not 0 <= pad < getattr(text, "vocab_size", 1 << 30):
            text.pad_token_id = None  # a token that was added for training, and that the embeddings do not hold
        heads = [shape[0] for key, shape in brought.items() if key.endswith(HEADS)]
        if heads:
            config.num_labels = heads[0]
        if heads or own_code or (_has_head(config) and not getattr(config, "normalize_reward", False)):
            return config, None
        weights = stored_weights(name, options["revision"])
        if adapter is not None:
            beside = stored_weights(adapter)
            weights.files.update(beside.files)
            weights.shapes.update(beside.shapes)
        native = [shape for key, shape in weights.shapes.items() if key.endswith(HEADS)]
        if native:
            config.num_labels = native[0][0]
        elif weights.heads(int(getattr(text, "hidden_size", 0))):
            config.num_labels = 1
        else:
            others = ", ".join(f"{key} {weights.shapes[key]}" for key in sorted(weights.shapes)[:4]) or "nothing"
            raise InputError(
                f"{source} is a {made_as}, without a scalar head: its score.weight would be newly initialised (outside its "
                f"blocks it holds {others}); name a sequence-classification PM, or an --adapter that contains the head."
            )
    return config, weights


def _other_head(
    source: str, name: str, revision: str | None, model: Any, info: dict[str, Any], weights: StoredWeights | None
) -> StoredHead | None:
    """The head of a checkpoint that transformers did not load: another name, a bias, or rewards that are normalised."""
    lacks_head = any(key.endswith(HEADS) for key in info.get("missing_keys", []))
    has_bias = "score.bias" in info.get("unexpected_keys", [])
    asked, has_own_code = getattr(model.config, "normalize_reward", False), hasattr(model.config, "auto_map")
    normalised = asked and weights is not None
    single = isinstance(getattr(model, "score", None), nn.Linear) and model.config.num_labels == 1
    if asked and not has_own_code and not (normalised and single):
        raise InputError(
            f"{source} asks for normalised rewards (normalize_reward), which are followed for a single linear head of a "
            "decoder's own checkpoint; set normalize_reward to false in its config.json to study its rewards as they are."
        )
    if not (lacks_head or has_bias or normalised) or not isinstance(getattr(model, "score", None), nn.Linear):
        return None
    with as_input_error(f"The PM {source}"):
        weights = weights or stored_weights(name, revision)
        if not weights.heads(model.score.in_features):
            return None
        head = stored_head(source, weights, model.config)
    model.score = head
    return head if lacks_head else None  # a head that transformers places itself is read where its own forward reads it


def _grow_embeddings(model: Any, brought: dict[str, list[int]]) -> None:
    """Gives the model as many embeddings as an adapter that was trained with added tokens."""
    own = model.get_input_embeddings()
    place = next(name for name, module in model.named_modules() if module is own).rpartition(".")[2]
    rows = [shape[0] for key, shape in brought.items() if key.endswith(f"{place}.weight")]
    if rows and rows[0] != own.num_embeddings:
        model.resize_token_embeddings(rows[0], mean_resizing=False)


def load_tokenizer(name: str, options: dict[str, Any]) -> Any:
    """The tokenizer of a model folder, or of the hub. InputError where it cannot be loaded."""
    from transformers import AutoTokenizer

    folder = Path(name).expanduser()
    pieces = next((p.name for p in (*folder.glob("*.model"), *folder.glob("*.spm")) if folder.is_dir()), None)
    if pieces and not (folder / "tokenizer.json").is_file() and not find_spec("sentencepiece"):
        raise InputError(
            f"The tokenizer of {name} is a SentencePiece file ({pieces}) alone; pip install sentencepiece protobuf, or add "
            "its tokenizer.json."
        )
    with as_input_error(f"The tokenizer of {name}"):
        return AutoTokenizer.from_pretrained(name, **options)


def check_finite(source: str, model: Any) -> None:
    """Raises InputError where a weight is not finite: every reward would be NaN."""
    for name, weight in model.named_parameters():
        if weight.numel() and not bool(torch.stack(weight.aminmax()).isfinite().all()):  # NaN is the least and the largest
            raise InputError(
                f"{source} holds {name} with numbers that are not finite; fetch the checkpoint again, or load it in float32."
            )


def check_whole(source: str, info: dict[str, Any], brought: Sequence[str]) -> None:
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
            "name a model whose checkpoint contains its head."
        )


def check_all_blocks_used(source: str, info: dict[str, Any], model: Any) -> None:
    """Raises InputError where the checkpoint holds a block that the config does not count."""
    names = list(model.state_dict())
    for key in sorted(info.get("unexpected_keys", [])):
        place = re.match(r"((.*?\.)?\w+\.)\d+\.", key)  # block 3 of model.layers, in model
        if place is None or any(name.startswith(place[0]) for name in names):
            continue
        if any(name.startswith((place[1], place[2] or place[1])) for name in names):
            raise InputError(
                f"{source} holds {key}, of a block that its config.json does not count; correct the config "
                "(num_hidden_layers, for example)."
            )


@contextmanager
def as_input_error(what: str) -> Iterator[None]:
    """Turns the errors of transformers and peft into an InputError of one sentence."""
    try:
        yield
    except LOAD_ERRORS as error:
        raise InputError(f"{what} could not be loaded ({one_line(error)}); check its name and its files.") from error


def _has_head(config: Any) -> bool:
    """False for a config that names another kind of model, such as a causal LM."""
    return not config.architectures or any("SequenceClassification" in a or "Reward" in a for a in config.architectures)


def output_weights(n: int, output: int | Sequence[float] | None, head: Any = None) -> Tensor:
    """The weight of each of ``n`` outputs in the reward, [n] float32. InputError where the choice is missing or wrong."""
    if head is not None and output is not None:
        raise InputError("A head of its own has one output; leave out output=, or apply the weights inside the head.")
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

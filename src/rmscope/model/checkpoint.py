"""What a checkpoint holds, read from its files without loading the model: names and shapes of weights, and scalar heads.

A head is believed by its weight, not by a name: a map of shape [1, d] outside the blocks turns a hidden state into a number.
Value heads of TRL (``v_head.summary``), LLaMA-Factory (``value_head.safetensors`` beside the model or the adapter), OpenRLHF
(``value_head``, with ``mean`` and ``std`` in the config), UltraRM and Beaver are such maps. They read the text's last token.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from rmscope.errors import InputError
from rmscope.model.rendering import read_json

TRUNKS = (("model.safetensors", "model.safetensors.index.json"), ("pytorch_model.bin", "pytorch_model.bin.index.json"))
"""The file and the index of each format, in the order in which transformers takes them."""
VALUE_HEADS = ("value_head.safetensors", "value_head.bin")
NO_HEADS = re.compile(r"\.\d+\.|lm_head|embed|(^|\.)(wte|wpe)\.")
"""Weights inside blocks, vocabulary heads and embeddings."""

OF_HEADS = re.compile("head|score|reward|value|regression")
"""Names of weights that belong to a head."""


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """The weights of a checkpoint outside its blocks: the file and the shape of each, by name."""

    files: dict[str, Path]
    shapes: dict[str, list[int]]

    def read(self, name: str) -> Tensor:
        """One weight, in float32. Raises what safetensors and torch raise where the file is damaged."""
        path = self.files[name]
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as stored:  # type: ignore[no-untyped-call]
                return stored.get_tensor(name).float()  # type: ignore[no-any-return]
        return torch.load(path, map_location="cpu", weights_only=True)[name].float()  # type: ignore[no-any-return]

    def heads(self, d: int) -> list[str]:
        """The names of the weights that map a hidden state of width ``d`` to one number."""
        return [name for name, shape in self.shapes.items() if name.endswith(".weight") and shape == [1, d]]


def stored_weights(source: str, revision: str | None = None) -> StoredWeights:
    """The weights of a folder, or of a model on the hub; none where they have another layout than transformers' own."""
    from transformers.utils.hub import cached_file

    optional = {f"_raise_exceptions_for_{w}": False for w in ("gated_repo", "missing_entries", "connection_errors")}

    def find(name: str) -> Path | None:
        folder = Path(source).expanduser()
        path = folder / name if folder.is_dir() else cached_file(source, name, revision=revision, **optional)
        return Path(path) if path and Path(path).is_file() else None

    files: list[str] = []
    for file, index in TRUNKS:
        if find(file):
            files = [file]
        elif path := find(index):
            names = read_json(path).get("weight_map", {})
            files = sorted({shard for name, shard in names.items() if not NO_HEADS.search(name)})
        if files:  # a second format would be downloaded for nothing
            break
    found = StoredWeights({}, {})
    for path in filter(None, map(find, [*files, *VALUE_HEADS])):
        shapes = {name: shape for name, shape in _shapes(path).items() if not NO_HEADS.search(name)}
        found.files.update(dict.fromkeys(shapes, path))
        found.shapes.update(shapes)
    return found


def _shapes(path: Path) -> dict[str, list[int]]:
    """The shape of each weight in a file, without its numbers."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as stored:  # type: ignore[no-untyped-call]
            return {name: list(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
    weights = torch.load(path, map_location="meta", weights_only=True)
    return {name: list(weight.shape) for name, weight in weights.items() if isinstance(weight, Tensor)}


class StoredHead(nn.Linear):
    """A scalar head that a checkpoint holds under a name that transformers does not load."""

    description: str


def stored_head(source: str, weights: StoredWeights, config: Any) -> StoredHead:
    """The head of a checkpoint, with the normalisation (r - mean) / std of its config folded in.

    Raises:
        InputError: it holds none, or several, or the head has more weights than one map.
    """
    d = int(getattr(config.get_text_config(), "hidden_size", 0))
    names = weights.heads(d)
    if len(names) != 1:
        others = ", ".join(f"{name} {weights.shapes[name]}" for name in sorted(weights.shapes)[:4]) or "nothing"
        told = f"several scalar heads ({', '.join(names)})" if names else f"no scalar head (outside its blocks: {others})"
        raise InputError(
            f"{source} holds {told}; name a PM whose checkpoint has one map of shape [1, {d}], or write the head in Python "
            "(docs/howto/heads.md)."
        )
    (name,) = names
    place = name.removesuffix("weight")
    rest = [n for n in sorted(weights.shapes) if OF_HEADS.search(n) and n not in (name, f"{place}bias")]
    if rest:
        raise InputError(
            f"{source} holds a head of more than one map ({', '.join([name, *rest][:4])}), and the checkpoint does not tell "
            "their order; write the head in Python (docs/howto/heads.md)."
        )
    weight = weights.read(name)
    bias = weights.read(f"{place}bias") if f"{place}bias" in weights.files else torch.zeros(1)
    mean, std = normalisation(config, weights)
    head = StoredHead(d, 1)
    head.weight.data, head.bias.data = weight / std, (bias - mean) / std
    head.description = f"{place.rstrip('.')} of the checkpoint, at the last token"
    if (mean, std) != (0.0, 1.0):
        head.description += f"; (r - {mean:.4g}) / {std:.4g}, as its config says"
    return head


def normalisation(config: Any, weights: StoredWeights) -> tuple[float, float]:
    """The mean and the standard deviation by which a config normalises rewards; 0 and 1 without ``normalize_reward``.

    Raises:
        InputError: they are no numbers, or the deviation is not positive.
    """
    if not getattr(config, "normalize_reward", False):
        return 0.0, 1.0
    found = [getattr(config, name, None) for name in ("mean", "std")]
    values = [
        weights.read(n) if v is None and n in weights.files else v for n, v in zip(("mean", "std"), found, strict=True)
    ]
    try:
        mean, std = (float(torch.as_tensor(value).flatten()[0]) for value in values)
    except (TypeError, ValueError, RuntimeError, IndexError):
        mean, std = 0.0, 0.0
    if not 0 < std < float("inf"):
        raise InputError(
            f"The PM's config asks for normalized rewards (normalize_reward), but its mean and std are {found}; write the "
            "numbers of its training, or set normalize_reward to false."
        )
    return mean, std


def check_code(source: str, name: str, options: dict[str, Any]) -> tuple[str, bool]:
    """(the class that a checkpoint was made as, whether its code comes with it). InputError where it is not trusted."""
    import transformers

    stored, _ = transformers.PreTrainedConfig.get_config_dict(name, revision=options["revision"])
    made_as = str((stored.get("architectures") or ["model"])[0])
    own_code = bool(stored.get("auto_map")) and not hasattr(transformers, made_as)
    if own_code and not options["trust_remote_code"]:
        raise InputError(
            f"{source} is a {made_as}, whose code comes with its checkpoint and would run on this machine; read that "
            "code and pass --trust-remote-code, or name another PM."
        )
    return made_as, own_code

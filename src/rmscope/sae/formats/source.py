"""The files of an SAE: fetched, opened without running anything, and handed to a reader."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rmscope.errors import InputError
from rmscope.sae.formats.keys import Keys, settings_keys
from rmscope.sae.formats.stored import Weights, check_shapes

HUB = "hub:"


@dataclass(frozen=True)
class Source:
    """What a reader gets: the tensors and the settings of an SAE, of which it must use every key."""

    path: Path
    """The file of weights."""
    weights: Keys
    settings: Keys

    @classmethod
    def open(cls, path: Path, settings: Path | None) -> Source:
        """Opens a file of weights and, if there is one, its settings file. InputError where one cannot be read."""
        tensors = Keys(dict(read_tensors(path)), str(path))
        return cls(path, tensors, settings_keys(read_settings(settings) if settings else {}, str(settings or path)))

    @property
    def place(self) -> str:
        """The path as text, in which publishers name the model, the site and k."""
        return self.path.absolute().as_posix()

    def tensors(self, what: str, names: dict[str, str], turned: Collection[str] = ()) -> Weights:
        """The tensors of a layout in float32, by our names. Those of a torch.nn.Linear (``*.weight``) are turned, and those
        in ``turned``.

        Args:
            what: the layout, for messages.
            names: our name of each tensor of the file; all of them must be there.

        Raises:
            InputError: one is missing, they contradict each other, or hold values that are not finite.
        """
        found = {ours: self.weights.need(theirs, what).float() for theirs, ours in names.items()}
        for theirs, ours in names.items():
            if (theirs.endswith(".weight") or ours in turned) and found[ours].ndim == 2:
                found[ours] = found[ours].t()
        check_shapes(found)
        return found

    def number(self, name: str, what: str) -> float:
        """A tensor that holds one number. InputError where it is missing, or holds none or several."""
        tensor = self.weights.need(name, what)
        if tensor.numel() != 1:
            raise InputError(f"{self.path} holds {tensor.numel()} values as {name}, and {what} has one.")
        return float(tensor)

    def close(self, what: str) -> None:
        """InputError that names a tensor or a setting which the reader did not use."""
        self.weights.close(what)
        self.settings.close(what)


def read_settings(path: Path) -> dict[str, Any]:
    """A settings file. InputError where it is missing, or no JSON object."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is missing or not JSON; an SAE needs it beside its weights.") from error
    if not isinstance(settings, dict):
        raise InputError(f"{path} holds no settings (it is no JSON object); an SAE needs them beside its weights.")
    return settings


def read_tensors(path: Path) -> Weights:
    """A file of weights: safetensors, npz, or a state dict of torch. Nothing is ever unpickled.

    Raises InputError: it cannot be read, or holds more than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays}
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} is a pickle that holds more than tensors and could run code, so it is not opened; "
            "save only its state_dict."
        ) from error
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} cannot be read as weights; it may be cut short or of another kind.") from error
    if not isinstance(loaded, dict) or not all(isinstance(w, Tensor) for w in loaded.values()):
        raise InputError(f"{path} is not a dictionary of tensors; save only the state_dict.")
    return dict(loaded)


def fetch_from_hub(source: str, files: list[str]) -> Path:
    """Fetches ``hub:owner/repo/path``, where the path is a folder, a file, or empty; the local cache of the hub keeps it.

    Of a folder, only ``files`` are fetched. Raises InputError where it cannot be fetched.
    """
    from huggingface_hub import snapshot_download

    owner, _, rest = source[len(HUB) :].strip("/").partition("/")
    repo, _, path = rest.partition("/")
    if not owner or not repo:
        raise InputError(f"{source} names no repository of the hub; write hub:owner/repo or hub:owner/repo/path.")
    whole = next((name for name in files if path == name or path.endswith(f"/{name}")), "")
    folder = path[: len(path) - len(whole)].rstrip("/")
    wanted = [f"{folder}/{name}" if folder else name for name in files]
    try:
        root = snapshot_download(f"{owner}/{repo}", allow_patterns=[*wanted, *([path] if path else [])])
    except (OSError, ValueError) as error:  # the hub's own errors are subclasses of these
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{source} could not be fetched from the Hugging Face hub ({reason}); check the name and the network, or "
            "download it and give its folder."
        ) from error
    return Path(root) / path

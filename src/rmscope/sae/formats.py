"""Files of SAEs: SAELens (the format of our own SAEs too), dictionary_learning, sparsify, Gemma Scope, Llama Scope.

Conventions differ in where b_dec is subtracted, in the norm of the decoder rows, and in the scale of x. Reading folds all of
it into the weights, exactly, so that every SAE encodes x - b_dec in the features' own units. A layout that is known by half
is refused, with the name of what is not known. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rmscope.errors import InputError
from rmscope.io import atomic, write_json

SAELENS_VERSION = "6.54.12"
"""The release whose layout is written. From 6 on, SAELens reads all settings from cfg.json and its metadata."""
CFG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
LLAMA_SCOPE = ("hyperparams.json", "checkpoints/final.safetensors")
GEMMA_SCOPE = ("params.npz", "params.safetensors")
FILES = (CFG, WEIGHTS, "ae.pt", "config.json", "sae.safetensors", *LLAMA_SCOPE, *GEMMA_SCOPE)
"""Files in the folders of the tools. The name of one of them may be given in place of its folder."""
BLOCK = re.compile(r"(?:[\w.]+\.)?(?:layers|layer|h|blocks)\.(\d+)(?:\.output(?:\.0|\[0\])?)?")
"""A block as transformers and nnsight name it: model.layers.4, transformer.h.4, gpt_neox.layers.4.output."""
SITE = re.compile(r"embed|(resid_post|diff|base)\.\d+")
HUB = "hub:"
Weights = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class StoredSae:
    """An SAE that encodes x - b_dec, as it is read from, or written to, a file."""

    architecture: str
    weights: Weights
    """W_enc [d, m], W_dec [m, d], b_dec [d], all others [m]."""
    site: str
    """Such as ``resid_post.6``; empty where the file does not name it."""
    metadata: dict[str, Any]
    """Whatever came with the file."""
    settings: dict[str, Any]
    """The family's own settings, such as k."""


def hook_name(site: str) -> str:
    """``resid_post.6`` as ``blocks.6.hook_resid_post``, ``embed`` as ``hook_embed``."""
    kind, _, layer = site.partition(".")
    return f"blocks.{layer}.hook_{kind}" if layer else f"hook_{kind}"


def site_of(hook: str | None) -> str:
    """The site that a hook of TransformerLens, transformers or nnsight names, with ``resid_pre.L`` as ``resid_post.L-1``.

    A hook that is no site keeps its name; an SAE with it is refused when it is read.
    """
    if hook == "hook_embed" or hook == "blocks.0.hook_resid_pre":
        return "embed"
    if part := re.fullmatch(r"blocks\.(\d+)\.hook_(diff|base)", hook or ""):
        return f"{part[2]}.{part[1]}"
    if block := BLOCK.fullmatch(hook or ""):
        return f"resid_post.{block[1]}"
    found = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", hook or "")
    return f"resid_post.{int(found[1]) - (found[2] == 'pre')}" if found else hook or ""


def write_sae(stored: StoredSae, folder: Path) -> None:
    """Writes cfg.json and sae_weights.safetensors in float32, as SAELens >= 6 reads them."""
    m, d = stored.weights["W_dec"].shape
    cfg = {
        "architecture": stored.architecture,
        "d_in": d,
        "d_sae": m,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **stored.settings,
        "metadata": {
            "sae_lens_training_version": None,
            **stored.metadata,
            "sae_lens_version": SAELENS_VERSION,
            "hook_name": hook_name(stored.site) if stored.site else None,
        },
    }
    weights = {name: w.detach().to("cpu", torch.float32).contiguous() for name, w in stored.weights.items()}
    with atomic(folder / WEIGHTS) as temporary:
        save_file(weights, temporary)
    write_json(folder / CFG, cfg)


def read_sae(source: Path | str) -> StoredSae:
    """Reads a folder or file in any known format; ``hub:owner/repo/path`` is fetched from the Hugging Face hub first.

    Raises InputError: nothing there, an unknown format, an unsupported convention, contradicting shapes, a hook that is no
    site, or a pickle that holds more than tensors.
    """
    source = _from_hub(source) if isinstance(source, str) and source.startswith(HUB) else Path(source).expanduser()
    stored = _read(source)
    if stored.site and not SITE.fullmatch(stored.site):
        raise InputError(
            f"The SAE at {source} reads {stored.site}, and only the residual stream after a block (or before block 0) is "
            "studied; name an SAE of that stream, such as blocks.4.hook_resid_post or model.layers.4."
        )
    return stored


def _read(source: Path) -> StoredSae:
    for name in FILES:
        if source.parts[-len(Path(name).parts) :] == Path(name).parts and not source.is_dir():
            source = source.parents[len(Path(name).parts) - 1]
            break
    if (source / WEIGHTS).exists():
        return _from_saelens(_json(source / CFG), _tensors(source / WEIGHTS))
    if (source / "sae.safetensors").exists():
        return _from_sparsify(_json(source / CFG), _tensors(source / "sae.safetensors"), source.name)
    if (source / "ae.pt").exists():
        config = source / "config.json"
        trainer = _json(config).get("trainer", {}) if config.exists() else {}
        return _from_dictionary_learning(_tensors(source / "ae.pt"), trainer)
    for name in GEMMA_SCOPE:
        if (source / name).exists():
            return _from_gemma_scope(_tensors(source / name))
    settings, weights = (source / name for name in LLAMA_SCOPE)
    if weights.exists():
        return _from_llama_scope(_json(settings), _tensors(weights), settings)
    if source.suffix == ".npz" and source.is_file():
        return _from_gemma_scope(_tensors(source))
    if source.is_file():
        weights_alone = _tensors(source)
        if source.suffix == ".safetensors" and "encoder.weight" in weights_alone:
            raise InputError(
                f"{source} holds an encoder and a decoder, and not what belongs between them (ReLU, TopK, a threshold); "
                "give the folder with its settings file."
            )
        return _from_dictionary_learning(weights_alone, {})
    raise InputError(
        f"There is no SAE at {source}; expected a folder with {CFG} and {WEIGHTS}, ae.pt and config.json, sae.safetensors, "
        "params.npz, or hyperparams.json and checkpoints/, or a file of weights (from the hub: hub:owner/repo/path)."
    )


def sae_source(saes: Path | str, site: str) -> str:
    """The source of a site's SAE: ``saes`` with {site} and {L}, the block's number, filled in.

    Without either, ``saes`` is a folder (or hub:owner/repo) with one subfolder per site. Raises InputError where there is
    another name in braces, or {L} is used for ``embed``, which has no block.
    """
    pattern, layer = str(saes), site.partition(".")[2]
    names = set(re.findall(r"\{([^}]*)\}", pattern))
    if unknown := sorted(names - {"site", "L"}):
        raise InputError(
            f"The SAEs {pattern} name {{{unknown[0]}}}, which is not known; use {{site}} or {{L}}, the block's number."
        )
    if "L" in names and not layer:
        raise InputError(f"The SAEs {pattern} are named by their block, but the site {site} is none; use {{site}}.")
    return pattern.replace("{site}", site).replace("{L}", layer) if names else f"{pattern}/{site}"


def _from_hub(source: str) -> Path:
    """Fetches ``hub:owner/repo/path``, where the path is a folder, a file, or empty. Of a folder, only an SAE's files."""
    from huggingface_hub import snapshot_download

    owner, _, rest = source[len(HUB) :].strip("/").partition("/")
    repo, _, path = rest.partition("/")
    if not owner or not repo:
        raise InputError(f"{source} names no repository of the hub; write hub:owner/repo or hub:owner/repo/path.")
    folder, _, name = path.rpartition("/")
    path = folder if name in FILES else path
    wanted = [f"{path}/{name}" if path else name for name in FILES]
    try:
        root = snapshot_download(f"{owner}/{repo}", allow_patterns=[*wanted, *([path] if path else [])])
    except (OSError, ValueError) as error:  # the hub's own errors are subclasses of these
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{source} could not be fetched from the Hugging Face hub ({reason}); check the name and the network, or "
            "download it and give its folder."
        ) from error
    return Path(root) / path


def _from_saelens(cfg: dict[str, Any], weights: Weights) -> StoredSae:
    old = ("hook_name", "model_name", "dataset_path", "context_size")
    metadata = cfg.get("metadata") or {key: cfg[key] for key in old if key in cfg}
    for key in ("normalize_activations", "reshape_activations", "finetuning_scaling_factor"):
        if cfg.get(key) not in ("none", None, False):
            raise InputError(f"This SAE needs {key} = {cfg[key]!r}, which cannot be folded in; save it without.")
    architecture = cfg.get("architecture") or "standard"
    if architecture == "standard" and (cfg.get("activation_fn_str") or cfg.get("activation_fn")) == "topk":
        architecture = "topk"  # as older releases wrote it
    weights.pop("scaling_factor", None)
    _check_shapes(weights)
    if not cfg.get("apply_b_dec_to_input", True):
        _unsubtract(weights)
    if cfg.get("rescale_acts_by_decoder_norm"):
        _unit_decoder(weights)
    k = cfg["k"] if "k" in cfg else (cfg.get("activation_fn_kwargs") or {}).get("k")
    return StoredSae(architecture, weights, site_of(metadata.get("hook_name")), metadata, _settings(architecture, k))


def _from_sparsify(cfg: dict[str, Any], weights: Weights, name: str) -> StoredSae:
    if cfg.get("transcode") or cfg.get("skip_connection") or cfg.get("activation", "topk") != "topk":
        raise InputError("Of the sparsify formats, plain TopK SAEs are supported; this is another kind.")
    names = {"encoder.weight": "W_enc", "encoder.bias": "b_enc"}
    weights = {names.get(key, key): w.t() if key == "encoder.weight" else w for key, w in weights.items()}
    _check_shapes(weights)
    layer = re.search(r"layers\.(\d+)$", name)
    site = f"resid_post.{layer[1]}" if layer else ""
    return StoredSae("topk", weights, site, {"sparsify": cfg}, _settings("topk", cfg.get("k")))


def _from_dictionary_learning(weights: Weights, trainer: dict[str, Any]) -> StoredSae:
    """``ae.pt`` of dictionary_learning, or a bare state dict. The keys identify the family."""
    kind, k = str(trainer.get("dict_class", "")), None
    linear, subtracted = "encoder.weight" in weights, "decoder.bias" not in weights
    if "r_mag" in weights:
        architecture = "gated"
        names = {"decoder_bias": "b_dec", "gate_bias": "b_gate", "mag_bias": "b_mag"}
    elif "threshold" in weights and "W_enc" in weights and weights["threshold"].numel() == 1:
        # Matryoshka BatchTopK: one threshold, and b_dec is subtracted
        architecture, names, subtracted = "jumprelu", {}, True
        if (least := float(weights["threshold"])) < 0:
            raise InputError("This Matryoshka BatchTopK SAE never set its threshold; train it past threshold_start_step.")
        weights = {key: w for key, w in weights.items() if key not in ("k", "group_sizes")}
        weights["threshold"] = torch.full((weights["W_enc"].shape[1],), least)
    elif "threshold" in weights and "W_enc" in weights:
        architecture, names, subtracted = "jumprelu", {}, False
    elif "b_dec" in weights and linear:
        k, threshold = weights.pop("k", trainer.get("k")), weights.pop("threshold", None)
        names = {"encoder.bias": "b_enc"}
        if "Batch" in kind and threshold is not None:
            architecture = "jumprelu"
            weights["threshold"] = threshold.float().expand(len(weights["encoder.weight"])).clone()
        else:
            architecture, k = "topk", None if k is None else int(k)
    elif linear:
        architecture = "standard"
        names = {"encoder.bias": "b_enc", "bias": "b_dec", "decoder.bias": "b_dec"}
    else:
        raise InputError(f"These weights are of no known SAE: {', '.join(sorted(weights)) or 'no tensors'}.")
    names |= {"encoder.weight": "W_enc", "decoder.weight": "W_dec"}
    weights = {names.get(key, key): w.t() if linear and key.endswith(".weight") else w for key, w in weights.items()}
    _check_shapes(weights)
    if not subtracted:
        _unsubtract(weights)
    if architecture in ("gated", "jumprelu"):
        _unit_decoder(weights)
    layer, hook = trainer.get("layer"), str(trainer.get("submodule_name", ""))
    site = f"resid_post.{layer}" if isinstance(layer, int) and "resid" in hook else ""
    return StoredSae(architecture, weights, site, {"model_name": trainer.get("lm_name")}, _settings(architecture, k))


def _from_gemma_scope(weights: Weights) -> StoredSae:
    """Gemma Scope (Lieberum et al. 2024): JumpReLU on x itself, one threshold per feature. The file names no site."""
    names = {"w_enc": "W_enc", "w_dec": "W_dec"}
    weights = {names.get(key, key): w.float() for key, w in weights.items()}
    expected = {"W_enc", "W_dec", "b_enc", "b_dec", "threshold"}
    _check_names(weights, expected, "a Gemma Scope SAE (transcoders and affine skips are not read)")
    _check_shapes(weights)
    _unsubtract(weights)
    _unit_decoder(weights)
    return StoredSae("jumprelu", weights, "", {}, {})


def _from_llama_scope(cfg: dict[str, Any], weights: Weights, path: Path) -> StoredSae:
    """Llama Scope (He et al. 2024): JumpReLU with one threshold, on x scaled to mean norm sqrt(d) over its dataset."""
    norms = cfg.get("dataset_average_activation_norm") or {}
    needed = {
        "act_fn": cfg.get("act_fn") == "jumprelu",
        "jump_relu_threshold": isinstance(cfg.get("jump_relu_threshold"), int | float),
        "norm_activation": cfg.get("norm_activation") == "dataset-wise" and isinstance(norms.get("in"), int | float),
        "hook_point_out": cfg.get("hook_point_in") is not None and cfg.get("hook_point_out") == cfg.get("hook_point_in"),
        "apply_decoder_bias_to_pre_encoder": not cfg.get("apply_decoder_bias_to_pre_encoder", False),
    }
    if wrong := [name for name, fits in needed.items() if not fits]:
        raise InputError(
            f"{path} does not describe a JumpReLU SAE of one stream as Llama Scope has them ({wrong[0]} is "
            f"{cfg.get(wrong[0])!r}); it is not read by guess."
        )
    names = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec", "decoder.bias": "b_dec"}
    weights = {names.get(key, key): w.float().t() if key.endswith(".weight") else w.float() for key, w in weights.items()}
    _check_names(weights, set(names.values()), "a Llama Scope SAE")
    _check_shapes(weights)
    m, d = weights["W_dec"].shape
    if cfg.get("sparsity_include_decoder_norm") and not torch.allclose(
        weights["W_dec"].norm(dim=1), torch.ones(m), atol=1e-2
    ):
        raise InputError(f"{path} counts decoder norms into its activations, and they are not 1; fold them in first.")
    scale = d**0.5 / float(norms["in"])
    weights["threshold"] = torch.full((m,), float(cfg["jump_relu_threshold"]))
    for name in ("b_enc", "b_dec", "threshold"):
        weights[name] = weights[name] / scale
    _unsubtract(weights)
    _unit_decoder(weights)
    return StoredSae("jumprelu", weights, site_of(cfg["hook_point_in"]), {"llama_scope": cfg}, {})


def _check_names(weights: Weights, expected: set[str], what: str) -> None:
    """InputError that names a missing or an unknown tensor."""
    if wrong := sorted(expected.symmetric_difference(weights)):
        kind = "holds no" if wrong[0] in expected else "holds"
        raise InputError(f"This file {kind} {wrong[0]}, so it is not {what}; it is not read by guess.")


def _settings(architecture: str, k: Any) -> dict[str, Any]:
    if architecture != "topk":
        return {}
    if not isinstance(k, int):
        raise InputError("This TopK SAE does not name its k; add it to its config.")
    return {"k": k}


def _check_shapes(weights: Weights) -> None:
    """Checks, before anything is folded: W_enc [d, m], W_dec [m, d], b_dec [d], all others [m]."""
    missing = {"W_enc", "W_dec", "b_dec"} - weights.keys()
    if missing or weights["W_dec"].ndim != 2:
        raise InputError(f"These SAE weights contain no {', '.join(sorted(missing)) or 'decoder matrix'}.")
    m, d = weights["W_dec"].shape
    for name, w in weights.items():
        expected = {"W_enc": (d, m), "W_dec": (m, d), "b_dec": (d,)}.get(name, (m,))
        if tuple(w.shape) != expected:
            raise InputError(f"The SAE's weights contradict each other: {name} is {list(w.shape)} beside W_dec {[m, d]}.")


def _unsubtract(weights: Weights) -> None:
    """Folds an encoder of x itself into one of x - b_dec: x W + b = (x - b_dec) W + (b + b_dec W)."""
    shift = weights["b_dec"].double() @ weights["W_enc"].double()
    for name in ("b_enc", "b_gate"):
        if name in weights:
            weights[name] = (weights[name].double() + shift).float()
    if "b_mag" in weights:
        weights["b_mag"] = (weights["b_mag"].double() + weights["r_mag"].double().exp() * shift).float()


def _unit_decoder(weights: Weights) -> None:
    """Makes the decoder rows d_j unit and measures features as f_j |d_j|; the reconstruction stays the same.

    A row of zeros stays as it is: its feature does nothing.
    """
    norms = weights["W_dec"].norm(dim=1)
    norms = torch.where(norms > 0, norms, 1.0)
    weights["W_dec"] = weights["W_dec"] / norms[:, None]
    if "r_mag" in weights:  # only the magnitude is scaled: of the gate, only the sign counts
        weights["r_mag"] = weights["r_mag"] + norms.log()
        weights["b_mag"] = weights["b_mag"] * norms
        return
    weights["W_enc"] = weights["W_enc"] * norms
    for name in ("b_enc", "threshold"):
        if name in weights:
            weights[name] = weights[name] * norms


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is missing or not JSON; an SAE needs it beside its weights.") from error


def _tensors(path: Path) -> Weights:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays}
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} is a pickle that holds more than tensors and could run code, so it is not opened; "
            "save only its state_dict."
        ) from error
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError) as error:
        raise InputError(f"{path} cannot be read as weights; it may be cut short or of another kind.") from error
    if not isinstance(loaded, dict) or not all(isinstance(w, Tensor) for w in loaded.values()):
        raise InputError(f"{path} is not a dictionary of tensors; save only the state_dict.")
    return dict(loaded)

"""SAELens: ``cfg.json`` and ``sae_weights.safetensors``, before and after release 6. Our own SAEs are saved like this.

Followed: b_dec on the input or not, decoder norms counted into activations, ``scaling_factor``, thresholds in log, k in its
old places, checkpoints of BatchTopK and Matryoshka (one threshold), matching pursuit. Other normalisations are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rmscope.errors import InputError
from rmscope.io import atomic, write_json
from rmscope.model.site_names import hook_name
from rmscope.sae.formats.place import site_named
from rmscope.sae.formats.source import Source
from rmscope.sae.formats.stored import StoredSae, Weights, equal_thresholds, topk_settings, unit_decoder, unsubtract

WHAT = "an SAE of SAELens"
SAELENS_VERSION = "6.54.12"
"""The release whose layout is written. From 6 on, SAELens reads all settings from cfg.json and its metadata."""
CFG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
PARAMETERS = {
    "standard": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "topk": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "jumprelu": ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"),
    "gated": ("W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag"),
    "batchtopk": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "matryoshka_batchtopk": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "matching_pursuit": ("W_dec", "b_dec"),
}
"""The tensors of each family that is read."""
WITH_ONE_THRESHOLD = ("batchtopk", "matryoshka_batchtopk")
"""Families of training checkpoints; SAELens itself saves them as JumpReLU in the end."""
METADATA = (
    "model_name", "hook_name", "hook_point", "hook_layer", "hook_point_layer", "hook_head_index", "hook_point_head_index",
    "hook_name_out", "dataset_path", "context_size", "prepend_bos", "model_from_pretrained_kwargs", "neuronpedia_id",
    "model_class_name", "seqpos_slice", "exclude_special_tokens", "sae_lens_training_version", "hook_layer_out",
    "hook_head_index_out",
)  # fmt: skip
"""What stood in cfg.json itself before release 6, and stands in its metadata since."""
OF_TRAINING = (
    "d_out", "noise_scale", "mse_loss_normalization", "normalize_sae_decoder", "scale_sparsity_penalty_by_decoder_norm",
    "lp_norm", "decoder_heuristic_init", "decoder_heuristic_init_norm", "decoder_orthogonal_init", "decoder_init_norm",
    "init_encoder_as_decoder_transpose", "jumprelu_init_threshold", "jumprelu_sparsity_loss_mode", "jumprelu_tanh_scale",
    "use_sparse_activations", "matryoshka_widths", "use_matryoshka_aux_loss", "detach_matryoshka_losses",
    "activations_mixing_fraction", "dead_feature_threshold", "feature_reinit_scale", "topk_threshold_lr",
    "include_final_matryoshka_loss", "cached_activations_path", "use_cached_activations",
)  # fmt: skip
"""Settings of training whose names would pass for settings of the SAE."""


def read_saelens(source: Source) -> StoredSae:
    cfg = source.settings
    metadata = {**{key: cfg.values[key] for key in METADATA if key in cfg}, **cfg.section("metadata").values}
    cfg.take(*METADATA, *OF_TRAINING, "dataset_trust_remote_code", "use_error_term")
    family, k = _family(source)
    for key, allowed in (("normalize_activations", ("none", False)), ("reshape_activations", ("none",))):
        cfg.allow(key, *allowed)
    _check_metadata(metadata, cfg.place)
    hook = metadata.get("hook_name", metadata.get("hook_point"))
    site = site_named(hook, cfg.place, metadata.get("hook_name_out"))

    weights = _tensors(source, family)
    m, d = weights["W_dec"].shape
    cfg.agree("d_in", d)
    cfg.agree("d_sae", m)
    subtracts = cfg.take("apply_b_dec_to_input", default=True)
    if family == "matching_pursuit":
        if not subtracts:  # then it is not added either
            weights["b_dec"] = torch.zeros(d)
        least = cfg.take("residual_threshold", default=1e-2)
        if not isinstance(least, int | float) or not least > 0:
            raise InputError(f"{cfg.place} says residual_threshold = {least!r}, which is no threshold.")
        return StoredSae(family, weights, site, metadata, {"residual_threshold": float(least)})
    if not subtracts:
        unsubtract(weights)
    if cfg.take("rescale_acts_by_decoder_norm", default=False):
        unit_decoder(weights, with_threshold=False)
    if family in WITH_ONE_THRESHOLD:
        return StoredSae("jumprelu", weights, site, {**metadata, "l0": k}, {})
    settings = topk_settings(k, cfg.place) if family == "topk" else {}
    return StoredSae(family, weights, site, metadata, settings)


def _family(source: Source) -> tuple[str, Any]:
    """The family and its k. InputError where it is a transcoder, or a family that is not read."""
    cfg = source.settings
    family, function = cfg.name("architecture", "standard"), cfg.take("activation_fn", "activation_fn_str")
    kwargs = cfg.section("activation_fn_kwargs")
    k = cfg.take("k", default=kwargs.take("k"))
    kwargs.allow("signed", False)
    kwargs.close(WHAT)
    if family == "standard" and function == "topk":
        family = "topk"  # as older releases wrote it
    elif function not in (None, "relu") and (family, function) != ("topk", "topk"):
        raise InputError(f"{cfg.place} says activation_fn = {function!r}, which cannot be followed; ReLU and TopK are read.")
    if "transcoder" in family:
        raise InputError(
            f"{cfg.place} is a {family}: it computes one stream from another, and only SAEs are studied; name an SAE."
        )
    if family == "temporal":
        raise InputError(f"{cfg.place} is a temporal SAE: its features depend on the tokens before; name another SAE.")
    if family not in PARAMETERS:
        raise InputError(f"{cfg.place}: there is no SAE family {family}; known: {', '.join(sorted(PARAMETERS))}.")
    return family, k


def _tensors(source: Source, family: str) -> Weights:
    weights, names = source.weights, {name: name for name in PARAMETERS[family]}
    if family == "matching_pursuit":  # the encoder is the decoder
        weights.values["W_enc"] = weights.need("W_dec", WHAT)
        names["W_enc"] = "W_enc"
    if "log_threshold" in weights:  # of older checkpoints
        weights.values["threshold"] = weights.take("log_threshold").float().exp()
    found = source.tensors(WHAT, names, turned=("W_enc",) if family == "matching_pursuit" else ())
    if family in WITH_ONE_THRESHOLD:
        equal_thresholds(found, source.number("topk_threshold", WHAT))
    if "threshold" in found:
        found["threshold"] = found["threshold"].clamp(min=0)  # SAELens applies a ReLU beside the threshold
    _scale(source, found)
    return found


def _scale(source: Source, found: Weights) -> None:
    """Folds ``scaling_factor`` [m], which multiplies features before they are decoded."""
    factor: Tensor | None = source.weights.take("scaling_factor", "finetuning_scaling_factor")
    is_on = source.settings.take("finetuning_scaling_factor", default=False)
    if factor is not None and factor.shape != (len(found["W_dec"]),):
        raise InputError(f"{source.path} holds a scaling_factor of shape {list(factor.shape)}, which are no features.")
    if factor is None or torch.allclose(factor.float(), torch.ones(len(factor))):
        if is_on and factor is None:
            raise InputError(f"{source.settings.place} asks for a scaling factor, and {source.path} holds none.")
        return
    if not is_on:
        raise InputError(
            f"{source.path} holds a scaling_factor that is not 1, and {source.settings.place} does not say whether it "
            "counts (finetuning_scaling_factor); it is not read by guess."
        )
    found["W_dec"] = found["W_dec"] * factor.float()[:, None]


def _check_metadata(metadata: dict[str, Any], place: str) -> None:
    """InputError where the SAE reads one head, or the stream of a model with changed weights."""
    head = metadata.get("hook_head_index", metadata.get("hook_point_head_index"))
    if head is not None:
        raise InputError(f"{place} reads head {head} alone, and only the whole residual stream is studied.")
    options = metadata.get("model_from_pretrained_kwargs")
    if isinstance(options, dict) and options.get("center_writing_weights"):
        raise InputError(
            f"{place} was trained on a model with centred weights (center_writing_weights), whose stream is not that of the "
            "checkpoint; name an SAE of the model as it is."
        )


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
    listed = PARAMETERS.get(stored.architecture, stored.weights)
    weights = {name: stored.weights[name].detach().to("cpu", torch.float32).contiguous() for name in listed}
    with atomic(folder / WEIGHTS) as temporary:
        save_file(weights, temporary)
    write_json(folder / CFG, cfg)

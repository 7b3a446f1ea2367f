"""OpenMOSS: Llama Scope (He et al. 2024), ``hyperparams.json`` and ``checkpoints/final.safetensors``, and what Llamascopium
(formerly lm-saes) saves, ``config.json`` and ``sae_weights.safetensors``.

The encoder reads x itself, scaled to mean norm sqrt(d) over its dataset. With ``sparsity_include_decoder_norm`` the
activation function decides on h_j |d_j|. Llama Scope has one threshold, in its settings, Llamascopium one per feature, in
the weights.
"""

from __future__ import annotations

import torch

from rmscope.errors import InputError
from rmscope.sae.formats.place import site_named
from rmscope.sae.formats.source import Source
from rmscope.sae.formats.stored import (
    StoredSae,
    Weights,
    equal_thresholds,
    raw_scale,
    topk_settings,
    unit_decoder,
    unsubtract,
)

WHAT = "an SAE of Llama Scope or Llamascopium"
HYPERPARAMS = "hyperparams.json"
OLD = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec", "decoder.bias": "b_dec"}
NEW = {"W_E": "W_enc", "b_E": "b_enc", "W_D": "W_dec", "b_D": "b_dec"}
LOG_THRESHOLDS = ("activation_function.log_jumprelu_threshold", "log_jumprelu_threshold")
NORM = "dataset_average_activation_norm"
OF_TRAINING = (
    "init_decoder_norm", "init_encoder_norm", "decoder_exactly_fixed_norm", "use_batch_norm_mse", "use_triton_kernel",
    "jumprelu_threshold_window", "sparsity_threshold_for_triton_spmm_kernel", "sae_pretrained_name_or_path",
    "strict_loading",
)  # fmt: skip
FAMILIES = {"relu": "standard", "topk": "topk", "jumprelu": "jumprelu"}


def read_openmoss(source: Source) -> StoredSae:
    cfg = source.settings
    cfg.take(*OF_TRAINING)
    function = _function(source)
    names = NEW if "W_E" in source.weights else OLD
    if cfg.take("use_decoder_bias") is False:
        decoder, bias = list(names)[2:]
        source.weights.values[bias] = torch.zeros(source.weights.need(decoder, WHAT).shape[-1 if names is NEW else 0])
    weights = source.tensors(WHAT, names)
    m, d = weights["W_dec"].shape
    cfg.agree("d_model", d)
    cfg.agree("d_sae", m)
    hook = cfg.need("hook_point_in", WHAT)
    site = site_named(hook, cfg.place, cfg.take("hook_point_out"))
    if function == "jumprelu":
        _thresholds(source, weights)
    raw_scale(weights, d**0.5 / norm if (norm := _norm(source, hook)) else 1.0)
    unsubtract(weights)
    _decoder_norms(source, weights, function)
    k = cfg.take("top_k")
    metadata = {"model_name": cfg.take("model_name"), "l0": k if function == "jumprelu" else None}
    settings = topk_settings(k, cfg.place) if function == "topk" else {}
    return StoredSae(FAMILIES[function], weights, site, metadata, settings)


def _is_llama_scope(source: Source) -> bool:
    return source.settings.place.endswith(HYPERPARAMS)


def _function(source: Source) -> str:
    """The activation function. InputError where it, or the kind of dictionary, is not read."""
    cfg = source.settings
    if (kind := cfg.name("sae_type", "sae")) != "sae":
        raise InputError(f"{cfg.place} is a {kind}, and only SAEs of one stream are studied; name an SAE.")
    cfg.allow("use_glu_encoder", False)
    cfg.allow("apply_decoder_bias_to_pre_encoder", False)
    function = str(cfg.need("act_fn", WHAT)).lower()
    known = ("jumprelu",) if _is_llama_scope(source) else tuple(FAMILIES)
    if function not in known:
        raise InputError(
            f"{cfg.place} says act_fn = {function!r}; {', '.join(known)} can be followed, it is not read by guess."
        )
    return function


def _thresholds(source: Source, weights: Weights) -> None:
    logs = [key for key in LOG_THRESHOLDS if key in source.weights]
    if logs:
        weights["threshold"] = source.weights.take(*logs).float().exp()
        return
    threshold = source.settings.need("jump_relu_threshold", WHAT)
    if not isinstance(threshold, int | float) or threshold < 0:
        raise InputError(f"{source.settings.place} says jump_relu_threshold = {threshold!r}, which is no threshold.")
    equal_thresholds(weights, float(threshold))


def _norm(source: Source, hook: str) -> float | None:
    """The mean norm over the dataset that x was scaled by; None where the weights are for x as it is."""
    cfg, stored = source.settings, [key for key in source.weights.values if key.startswith(f"{NORM}.")]
    source.weights.take(*stored)
    stated = cfg.section(NORM).values
    mode = cfg.name("norm_activation", "dataset-wise")
    if mode == "inference":
        return None
    norm = source.number(own, WHAT) if (own := f"{NORM}.{hook}") in source.weights else stated.get("in")
    if mode != "dataset-wise" or not isinstance(norm, int | float) or norm <= 0 or stated.get("out", norm) != norm:
        raise InputError(
            f"{cfg.place} scales x (norm_activation = {mode!r}), and its files do not name one norm by which "
            f"({NORM} = {stated or norm!r}); it is not read by guess."
        )
    return float(norm)


def _decoder_norms(source: Source, weights: Weights, function: str) -> None:
    """Makes the decoder rows unit, with norms counted as the settings say.

    Of Llama Scope two public readers disagree here (OpenMOSS's own counts the norms, SAELens' does not), so there the rows
    must be unit already.
    """
    old = _is_llama_scope(source)
    counts = bool(source.settings.take("sparsity_include_decoder_norm", default=not old))
    norms = weights["W_dec"].norm(dim=1)
    if old and counts and not torch.allclose(norms[norms > 0], torch.ones(()), atol=1e-2):
        raise InputError(
            f"{source.settings.place} counts decoder norms into its activations, and they are not 1; fold them in first."
        )
    if counts or function != "topk":
        unit_decoder(weights, with_threshold=not counts)

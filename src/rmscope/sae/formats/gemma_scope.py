"""Gemma Scope: ``params.npz`` (1, Lieberum et al. 2024) and ``params.safetensors`` with ``config.json`` (2).

JumpReLU on x itself, one threshold per feature. Version 1 names no site in its files; the repository's name tells which kind
of stream it is of.
"""

from __future__ import annotations

import re

from rmscope.errors import InputError
from rmscope.sae.formats.place import site_named
from rmscope.sae.formats.source import Source
from rmscope.sae.formats.stored import StoredSae, unit_decoder, unsubtract

NAMES = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
OTHER_STREAMS = re.compile(
    r"gemma-scope-\w+-\w+-(mlp|att|transcoders)\b|\b(attn_out|mlp_out|transcoder|crosscoder|clt)(_all)?/layer_\d+"
)
"""Names of the repositories and folders of what is no SAE of the residual stream."""


def read_gemma_scope(source: Source) -> StoredSae:
    cfg, weights = source.settings, source.weights
    what = "a Gemma Scope SAE"
    if "affine_skip_connection" in weights or cfg.take("affine_connection"):
        raise InputError(f"{source.path} has an affine skip connection beside its features, so it is not {what} alone.")
    if (kind := cfg.name("type", "sae")) != "sae":
        raise InputError(f"{cfg.place} is a {kind}, and only SAEs are studied; name an SAE of resid_post.")
    cfg.allow("architecture", "jump_relu", "jumprelu")
    _check_repository(source)
    second = "w_enc" in weights
    named = {(name.replace("W_", "w_") if second else name): name for name in NAMES}
    found = source.tensors(what, named)
    found["threshold"] = found["threshold"].clamp(min=0)
    cfg.agree("width", found["W_dec"].shape[0])
    site = site_named(cfg.take("hf_hook_point_in"), cfg.place, cfg.take("hf_hook_point_out"))
    stated = re.search(r"average_l0_(\d+)", source.place)
    metadata = {
        "model_name": cfg.take("model_name", default=_model(source.place)),
        "l0": cfg.take("l0", default=int(stated[1]) if stated else None),
    }
    unsubtract(found)
    unit_decoder(found)
    return StoredSae("jumprelu", found, site, {key: value for key, value in metadata.items() if value is not None}, {})


def _check_repository(source: Source) -> None:
    """InputError where the path is that of a published repository of another stream."""
    named = OTHER_STREAMS.search(source.place)
    if named:
        raise InputError(
            f"{source.path} is of {named[0]}, and only the residual stream is studied; name one of gemma-scope-...-res, or "
            "of resid_post in Gemma Scope 2."
        )
    if re.search(r"gemma-scope-\w+-\w+-res\b.*/embedding/", source.place):
        raise InputError(f"{source.path} reads embeddings before Gemma scales them, which is no site; name one of a block.")


def _model(place: str) -> str | None:
    """The model of a published repository of version 1, such as gemma-scope-2b-pt-res."""
    named = re.search(r"gemma-scope-(\d+b)-(pt|it)-res\b", place)
    return f"google/gemma-2-{named[1]}{'-it' if named[2] == 'it' else ''}" if named else None

"""dictionary_learning: ``ae.pt`` and ``config.json``, and bare state dicts such as the reference study's ``ae_layer12.pt``.

Each class has its own tensors and equations. The config names the class; without one, only tensors that no two classes share
decide. BatchTopK and Matryoshka BatchTopK fire above one threshold for all features, and subtract b_dec.
"""

from __future__ import annotations

import re
from typing import Any

from rmscope.errors import InputError
from rmscope.model.site_names import site_of_hook
from rmscope.sae.formats.keys import Keys
from rmscope.sae.formats.place import site_named
from rmscope.sae.formats.source import Source
from rmscope.sae.formats.stored import StoredSae, equal_thresholds, topk_settings, unit_decoder, unsubtract

LINEAR = {"encoder.weight": "W_enc", "decoder.weight": "W_dec"}
BIASED = LINEAR | {"encoder.bias": "b_enc"}
MATRICES = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
LAYOUTS = {
    "AutoEncoder": BIASED | {"bias": "b_dec"},
    "AutoEncoderNew": BIASED | {"decoder.bias": "b_dec"},
    "AutoEncoderTopK": BIASED | {"b_dec": "b_dec"},
    "BatchTopKSAE": BIASED | {"b_dec": "b_dec"},
    "MatryoshkaBatchTopKSAE": MATRICES,
    "GatedAutoEncoder": LINEAR | {"decoder_bias": "b_dec", "r_mag": "r_mag", "gate_bias": "b_gate", "mag_bias": "b_mag"},
    "JumpReluAutoEncoder": MATRICES | {"threshold": "threshold"},
}
"""Our name of each tensor, by class."""
FAMILIES = {
    "AutoEncoder": "standard", "AutoEncoderNew": "standard", "AutoEncoderTopK": "topk", "GatedAutoEncoder": "gated",
    "BatchTopKSAE": "jumprelu", "MatryoshkaBatchTopKSAE": "jumprelu", "JumpReluAutoEncoder": "jumprelu",
}  # fmt: skip
READ_X_ITSELF = ("AutoEncoderNew", "JumpReluAutoEncoder")
OF_TRAINING = (
    "trainer_class", "threshold_beta", "threshold_start_step", "group_fractions", "group_weights", "group_sizes",
    "sparsity_function", "decoder_init_norm",
)  # fmt: skip


def read_dictionary_learning(source: Source) -> StoredSae:
    trainer = source.settings.section("trainer")
    trainer.take(*OF_TRAINING)
    kind = _class(source.weights, trainer)
    what = f"a {kind} of dictionary_learning"
    weights = source.tensors(what, LAYOUTS[kind])
    m, d = weights["W_dec"].shape
    trainer.agree("activation_dim", d)
    trainer.agree("dict_size", m)
    k = trainer.take("k")
    if kind in ("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        k = int(source.number("k", what)) if "k" in source.weights else k
        source.weights.take("threshold", "group_sizes")
        trainer.agree("k", k)
    if kind in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        equal_thresholds(weights, _threshold(source, what))
    if "threshold" in weights:
        weights["threshold"] = weights["threshold"].clamp(min=0)  # a ReLU stands beside the threshold
    if kind in READ_X_ITSELF:
        unsubtract(weights)
    family = FAMILIES[kind]
    if family in ("gated", "jumprelu"):
        unit_decoder(weights)
    metadata: dict[str, Any] = {"model_name": trainer.take("lm_name"), "dict_class": kind}
    if family == "jumprelu" and k is not None:
        metadata["l0"] = k
    site = _site(source, trainer)
    trainer.close(what)
    return StoredSae(family, weights, site, metadata, topk_settings(k, source.place) if family == "topk" else {})


def _class(weights: Keys, trainer: Keys) -> str:
    """The class that the config names, or the only one that has these tensors. InputError where that is not known."""
    kind = trainer.name("dict_class", "")
    if kind in LAYOUTS:
        return kind
    if kind:
        raise InputError(f"{trainer.place} names the class {kind}, which is not read; known: {', '.join(sorted(LAYOUTS))}.")
    for unique, found in (("r_mag", "GatedAutoEncoder"), ("group_sizes", "MatryoshkaBatchTopKSAE"), ("bias", "AutoEncoder")):
        if unique in weights:
            return found
    if "k" in weights and "encoder.weight" in weights and "threshold" not in weights:
        return "AutoEncoderTopK"
    named = ", ".join(sorted(weights.values)) or "no tensors"
    raise InputError(
        f"{weights.place} holds {named}: that is of no known SAE, or of several that differ in what belongs between encoder "
        "and decoder (ReLU, TopK, a threshold); give its folder with config.json, which names the class."
    )


def _threshold(source: Source, what: str) -> float:
    if (threshold := source.number("threshold", what)) < 0:
        raise InputError(f"{source.path} never set its threshold; train it past threshold_start_step.")
    return threshold


def _site(source: Source, trainer: Keys) -> str:
    """The site from ``layer`` and ``submodule_name``, or from a file's name such as ``ae_layer12.pt``."""
    layer, module = trainer.take("layer"), trainer.name("submodule_name", "")
    end = source.settings.section("buffer").name("io", "out")
    if end != "out":
        raise InputError(
            f"{source.settings.place} says io = {end!r}: the SAE reads another place than a block's output; name one of a "
            "block's output."
        )
    if not module:
        named = re.fullmatch(r"ae_layer(\d+)\.pt", source.path.name)
        return f"resid_post.{named[1]}" if named else ""
    if isinstance(layer, int) and re.fullmatch(rf"resid(_post)?(_layer_?{layer})?", module):
        return f"resid_post.{layer}"
    if isinstance(layer, int) and re.fullmatch(rf"resid_pre(_layer_?{layer})?", module):
        return site_of_hook(f"blocks.{layer}.hook_resid_pre") or ""
    return site_named(module, source.settings.place)

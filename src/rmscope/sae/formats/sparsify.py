"""sparsify (EleutherAI): ``cfg.json`` and ``sae.safetensors`` in a folder that is named after the module it reads.

Plain TopK of x - b_dec. Skip connections, transcoders and other activations are refused.
"""

from __future__ import annotations

import re

from rmscope.errors import InputError
from rmscope.sae.formats.place import site_named
from rmscope.sae.formats.source import Source
from rmscope.sae.formats.stored import StoredSae, topk_settings

WHAT = "a TopK SAE of sparsify"
NAMES = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
REFUSED = {
    "transcode": "is a transcoder: it computes one stream from another",
    "skip_connection": "has a linear skip connection beside its features",
    "embed_skip": "has a skip connection from the embeddings",
    "gram_lookup": "subtracts a table of n-grams first",
    "signed": "keeps negative activations too (signed TopK)",
}


def read_sparsify(source: Source) -> StoredSae:
    cfg = source.settings
    for key, reason in REFUSED.items():
        if cfg.take(key):
            raise InputError(f"{cfg.place} {reason}, which is not studied; of sparsify, plain TopK SAEs are read.")
    cfg.allow("activation", "topk")
    cfg.take("normalize_decoder", "multi_topk", "expansion_factor", "lookup_max_order", "gram_table_hash")
    weights = source.tensors(WHAT, NAMES)
    m, d = weights["W_dec"].shape
    cfg.agree("d_in", d)
    if cfg.take("num_latents"):
        cfg.agree("num_latents", m)
    folder = source.path.absolute().parent.name
    names_module = re.match(r"(\w+\.)*(layers|layer|h|blocks)\.\d+", folder)
    hook = cfg.take("hookpoint", default=folder if names_module else "")
    settings = topk_settings(cfg.take("k"), cfg.place)
    return StoredSae("topk", weights, site_named(hook, cfg.place), {}, settings)

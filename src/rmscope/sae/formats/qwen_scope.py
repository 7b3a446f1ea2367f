"""Qwen-Scope: ``layerN.sae.pt``, TopK on x itself. W_enc is [m, d] and W_dec [d, m] in the file.

The file names neither k nor the model. They are in the repository's name, such as SAE-Res-Qwen3-8B-Base-W64K-L0_50, which
the hub's cache and a copied folder keep. Activations below zero are set to zero; among the k largest of thousands there are
none.
"""

from __future__ import annotations

import re

from rmscope.errors import InputError
from rmscope.sae.formats.source import Source
from rmscope.sae.formats.stored import StoredSae, topk_settings, unsubtract

WHAT = "an SAE of Qwen-Scope"
FILE = re.compile(r"layer(\d+)\.sae\.pt")
REPOSITORY = re.compile(r"SAE-(?P<stream>\w+)-(?P<model>Qwen[^/]*?)-W\d+K-L0_(?P<k>\d+)")
CARD = re.compile(r"Top-?K[\s|:*]+(\d+)", re.IGNORECASE)


def read_qwen_scope(source: Source) -> StoredSae:
    names = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    weights = source.tensors(WHAT, names, turned=("W_enc", "W_dec"))
    unsubtract(weights)
    named = REPOSITORY.search(source.place)
    if named and named["stream"] != "Res":
        raise InputError(f"{source.path} reads another stream ({named[0]}), and only the residual stream is studied.")
    card = source.path.parent / "README.md"
    stated = CARD.search(card.read_text("utf-8", "replace")) if not named and card.is_file() else None
    k = int(named["k"]) if named else int(stated[1]) if stated else None
    if k is None:
        raise InputError(
            f"{source.path} does not name its k: Qwen-Scope has it in the repository's name; keep the file in a folder such "
            "as SAE-Res-Qwen3-8B-Base-W64K-L0_50, or beside the README.md of its repository."
        )
    block = FILE.fullmatch(source.path.name)
    site = f"resid_post.{block[1]}" if block else ""
    metadata = {"model_name": f"Qwen/{named['model']}"} if named else {}
    return StoredSae("topk", weights, site, metadata, topk_settings(k, source.place))

"""Goodfire: one file of two linear layers, ReLU on x itself, such as Llama-3.1-8B-Instruct-SAE-l19.pth."""

from __future__ import annotations

import re

from rmscope.sae.formats.source import Source
from rmscope.sae.formats.stored import StoredSae, unsubtract

WHAT = "an SAE of Goodfire"
NAMES = {
    "encoder_linear.weight": "W_enc",
    "encoder_linear.bias": "b_enc",
    "decoder_linear.weight": "W_dec",
    "decoder_linear.bias": "b_dec",
}
FILE = re.compile(r"(?P<model>.+)-SAE-l(?P<block>\d+)\.pth?")


def read_goodfire(source: Source) -> StoredSae:
    weights = source.tensors(WHAT, NAMES)
    unsubtract(weights)
    named = FILE.fullmatch(source.path.name)
    site = f"resid_post.{named['block']}" if named else ""
    return StoredSae("standard", weights, site, {"model_name": named["model"]} if named else {}, {})

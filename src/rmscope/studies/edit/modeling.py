"""The model class of an exported patch. ``rmscope edit --export`` copies this file into the folder that it writes.

There it runs without rmscope, as remote code of transformers: the PM's own class, with the edits of the patch in its
blocks. ``config.rmscope_edits`` holds the arguments of one :class:`SiteEdit` per layer; the checkpoint holds the weights.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from rmscope.model.edits import install

NAME, MODEL_TYPE = "EditedForSequenceClassification", "rmscope_edited"
PER_FEATURE = {
    "topk": ("b_enc",), "jumprelu": ("b_enc", "threshold"), "standard": ("b_enc",), "gated": ("b_gate", "b_mag", "r_mag"),
}  # fmt: skip
"""The families of SAEs, and the parameters of each that have one entry per feature."""


class SiteEdit(nn.Module):
    """x' = x + Σ_j (f'_j - f_j) d_j over some of the ``width`` features f of an encoder, with f' = kept f + added."""

    def __init__(self, d: int, layer: int, kind: str, k: Any, width: int, features: list[int], **terms: list[float]) -> None:
        super().__init__()
        self.layer, self.kind, self.k, self.features, self.terms = layer, kind, k, features, terms
        shapes = {"W_enc": (d, width), "W_dec": (len(features), d), "b_dec": (d,)}
        for name, shape in (shapes | dict.fromkeys(PER_FEATURE[kind], (width,))).items():
            setattr(self, name, nn.Parameter(torch.zeros(shape), requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        w = {name: p.float() for name, p in self.named_parameters()}
        kept, added = (torch.tensor(self.terms[name], device=x.device) for name in ("kept", "added"))
        f = self.encode((x.float() - w["b_dec"]) @ w["W_enc"], w)[..., self.features]
        return x + ((f * (kept - 1) + added) @ w["W_dec"]).to(x.dtype)

    def encode(self, u: Tensor, w: dict[str, Tensor]) -> Tensor:
        if self.kind == "gated":
            return (u * w["r_mag"].exp() + w["b_mag"]).relu() * (u + w["b_gate"] > 0)
        h = u + w["b_enc"]
        if self.kind == "topk":
            values, places = h.topk(self.k, dim=-1)
            return torch.zeros_like(h).scatter(-1, places, values.relu())
        return h.relu() * (h > w["threshold"]) if self.kind == "jumprelu" else h.relu()


def edited_classes(config_class: str, model_class: str) -> tuple[type, type]:
    """The configuration class and the model class of a patched PM, from the names of the PM's own classes."""
    base, own = getattr(transformers, model_class), getattr(transformers, config_class)

    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        plain = copy.deepcopy(config)
        plain.__class__ = own  # transformers finds a PM's inner model by the class of its configuration
        base.__init__(self, plain, *args, **kwargs)
        self.config, edits = config, {}
        for row in config.rmscope_edits:
            edits[row["layer"]] = SiteEdit(config.get_text_config().hidden_size, **row)
            setattr(self, f"edit_{row['layer']}", edits[row["layer"]])
        blocks = max((m for m in self.base_model.modules() if isinstance(m, nn.ModuleList)), key=len)
        install(self.base_model, blocks, edits)

    config = type("EditedConfig", (own,), {"model_type": MODEL_TYPE})
    names = {"__init__": init, "config_class": config, "__module__": __name__}
    return config, type(NAME, (base,), names)

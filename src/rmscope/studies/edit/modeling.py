"""The model class of an exported patch. ``rmscope edit --export`` copies this file into the folder that it writes.

There it runs without rmscope, as remote code of transformers: the PM's own class, with the edits of the patch in its
blocks. ``config.rmscope_edits`` holds one :class:`SiteRow` per site; the weights are stored in the checkpoint.
"""

from __future__ import annotations

import copy
from typing import Any, TypedDict

import torch
import transformers
from torch import Tensor, nn

from rmscope.model.edits import install

NAME, MODEL_TYPE = "EditedForSequenceClassification", "rmscope_edited"
PER_FEATURE = {
    "topk": ("b_enc",), "jumprelu": ("b_enc", "threshold"), "standard": ("b_enc",), "gated": ("b_gate", "b_mag", "r_mag"),
}  # fmt: skip
"""The families of SAEs, and the parameters of each that have one entry per feature."""


class SiteRow(TypedDict):
    """The edit of one site: f' = kept f + added."""

    layer: int
    kind: str  # the SAE's family
    k: Any  # of a top-k encoder; else None
    width: int  # features of the encoder
    features: list[int]  # those of the encoder that are edited
    kept: list[float]
    added: list[float]


class SiteEdit(nn.Module):
    """x' = x + Σ_j (f'_j - f_j) d_j at one site; f is encoded from x."""

    def __init__(self, d: int, row: SiteRow) -> None:
        super().__init__()
        self.row = row
        self.W_enc = nn.Parameter(torch.zeros(d, row["width"]), requires_grad=False)
        self.W_dec = nn.Parameter(torch.zeros(len(row["features"]), d), requires_grad=False)
        self.b_dec = nn.Parameter(torch.zeros(d), requires_grad=False)
        for name in PER_FEATURE[row["kind"]]:
            setattr(self, name, nn.Parameter(torch.zeros(row["width"]), requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        kept, added = (torch.tensor(values, device=x.device) for values in (self.row["kept"], self.row["added"]))
        f = self.encode(x.float() - self.b_dec.float())[..., self.row["features"]]
        return x + ((f * (kept - 1) + added) @ self.W_dec.float()).to(x.dtype)

    def encode(self, centred: Tensor) -> Tensor:
        u, w = centred @ self.W_enc.float(), {name: p.float() for name, p in self.named_parameters()}
        if self.row["kind"] == "gated":
            return (u * w["r_mag"].exp() + w["b_mag"]).relu() * (u + w["b_gate"] > 0)
        h = u + w["b_enc"]
        if self.row["kind"] == "jumprelu":
            return h.relu() * (h > w["threshold"])
        if self.row["kind"] == "topk":
            values, places = h.topk(self.row["k"], dim=-1)
            return torch.zeros_like(h).scatter(-1, places, values.relu())
        return h.relu()


def edited_classes(config_class: str, model_class: str) -> tuple[type, type]:
    """The configuration class and the model class of a patched PM, from the names of the PM's own classes."""
    base, own = getattr(transformers, model_class), getattr(transformers, config_class)

    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        plain = copy.deepcopy(config)
        plain.__class__ = own  # transformers finds a PM's inner model by the class of its configuration
        base.__init__(self, plain, *args, **kwargs)
        self.config, edits = config, {}
        for row in config.rmscope_edits:
            edits[row["layer"]] = SiteEdit(config.get_text_config().hidden_size, row)
            setattr(self, f"edit_{row['layer']}", edits[row["layer"]])
        blocks = max((m for m in self.base_model.modules() if isinstance(m, nn.ModuleList)), key=len)
        install(self.base_model, blocks, edits)

    config = type("EditedConfig", (own,), {"model_type": MODEL_TYPE})
    names = {"__init__": init, "config_class": config, "__module__": __name__}
    return config, type(NAME, (base,), names)

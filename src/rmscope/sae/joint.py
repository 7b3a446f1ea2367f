"""The two dictionaries of one block side by side: that of what preference training wrote, and that of the base's stream.

A joint SAE works on the stream [δ, b] of width 2 d (site ``both.L``). Its first features are those of the difference SAE,
the others those of the base's, and each reads and writes its own half. So a set of features may hold some of either, and
ablating feature j is x - f_j d_j whichever half it belongs to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rmscope.errors import InputError
from rmscope.io import content_hash
from rmscope.model.site_names import parts_of
from rmscope.sae.base import Sae
from rmscope.sae.formats import sae_source


class JointSae(Sae):
    """Two SAEs as one, of the stream [δ, b]. It is not trained: its parts are."""

    architecture = "joint"
    feature_parameters = ()
    biases = ()

    def __init__(self, difference: Sae, base: Sae, site: str) -> None:
        """Raises InputError where the two SAEs read streams of different widths."""
        nn.Module.__init__(self)
        if difference.d != base.d:
            raise InputError(
                f"The SAEs of {site} read streams of widths {difference.d} and {base.d}; both must be of the same PM."
            )
        self.d, self.m, self.site, self.cfg = 2 * base.d, difference.m + base.m, site, dict[str, Any]()
        self.metadata, self._device_copy = dict(base.metadata), ()
        self.difference, self.base = difference, base
        for name in ("W_enc", "W_dec"):
            blocks = torch.block_diag(getattr(difference, name), getattr(base, name))
            setattr(self, name, nn.Parameter(blocks, requires_grad=False))
        self.b_dec = nn.Parameter(torch.cat([difference.b_dec, base.b_dec]), requires_grad=False)

    @property
    def parts(self) -> tuple[Sae, Sae]:
        """The difference SAE and the base's."""
        return self.difference, self.base

    def encode(self, x: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens m"]:
        """Features of both halves, those of the difference first."""
        return torch.cat([sae.encode(half) for sae, half in zip(self.parts, x.tensor_split(2, -1), strict=True)], -1)

    def _active(self, x: Float[Tensor, "n d"]) -> tuple[Tensor, Tensor, Tensor]:
        own, other = (sae._active(half) for sae, half in zip(self.parts, x.tensor_split(2, -1), strict=True))
        token, feature = torch.cat([own[0], other[0]]), torch.cat([own[1], other[1] + self.difference.m])
        order = (token * self.m + feature).argsort()
        return token[order], feature[order], torch.cat([own[2], other[2]])[order]

    def identity(self) -> str:
        return content_hash(self.architecture, *(sae.identity() for sae in self.parts))

    @property
    def width(self) -> int:
        return self.d // 2

    def save(self, folder: Path | str) -> None:
        """Writes each part to a folder of its own site, such as diff.6 and base.6, beside ``folder``."""
        for sae, site in zip(self.parts, parts_of(self.site), strict=True):
            sae.save(Path(folder).parent / site)


def load_site(saes: Path | str, site: str) -> Sae:
    """The SAE of a site from a folder with one subfolder per site, or from a pattern with {site} or {L}.

    Raises InputError as :meth:`Sae.load` does, and where an SAE names another site.
    """
    loaded = []
    for part in parts_of(site):
        sae = Sae.load(source := sae_source(saes, part))
        sae.check_site(part, source)
        sae.site = part  # bare weights do not say where they belong, and a base model's own SAE is one of base.L
        loaded.append(sae)
    return join_parts(loaded, site)


def join_parts(parts: list[Sae], site: str) -> Sae:
    """The SAE of a site from those of its parts: itself, or a joint one."""
    return parts[0] if len(parts) == 1 else JointSae(parts[0], parts[1], site)

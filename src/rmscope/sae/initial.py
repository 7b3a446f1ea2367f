"""Training that goes on from existing weights, such as a published SAE of a base model, or that of an earlier run."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch

from rmscope.errors import InputError
from rmscope.sae.base import Sae
from rmscope.sae.config import SaeConfig
from rmscope.sae.formats import sae_source
from rmscope.sae.formats.stored import unit_decoder
from rmscope.sae.training import storage

TRAINABLE = {
    "topk": ("topk",), "gated": ("gated",), "standard": ("standard",), "jumprelu": ("jumprelu", "batchtopk", "matryoshka"),
}  # fmt: skip
"""The trainings that can go on from each family."""
DEFAULT = SaeConfig.model_fields["architecture"].default
SHORT = 0.2
"""Norm of the encoder row of a feature that is drawn anew, relative to the mean of the others (Bricken et al. 2023)."""


def load_initial(config: SaeConfig, site: str, d: int) -> Sae | None:
    """The SAE from which the training at a site goes on; None where the settings name none.

    ``init`` is a pattern with {site} or {L}, a folder with one subfolder per site, or an SAE itself. Raises InputError as
    :meth:`Sae.load` does, and where the SAE is of another site or width, or of a family that cannot be trained.
    """
    if config.init is None:
        return None
    whole = "{" not in config.init and not (Path(config.init).expanduser() / site).is_dir()
    source = config.init if whole else sae_source(config.init, site)
    sae = Sae.load(source)
    sae.check_site(site, source)
    if sae.d != d:
        raise InputError(f"The SAE at {source} reads a stream of width {sae.d}, and {site} has {d}; name one of this model.")
    settled(config, sae)
    return sae


def settled(config: SaeConfig, initial: Sae | None) -> SaeConfig:
    """The settings with what the initial weights decide: the family, the number of features, and k where none is given.

    Raises InputError where a setting asks for something else.
    """
    if initial is None:
        return config
    trainings = TRAINABLE.get(initial.architecture, ())
    if not trainings:
        raise InputError(f"Training cannot go on from a {initial.architecture} SAE; those of {', '.join(TRAINABLE)} can be.")
    trained_as = initial.metadata.get("trained_as")
    family = config.architecture
    if family not in trainings:
        if family != DEFAULT:
            raise InputError(
                f"The initial SAE is a {initial.architecture} SAE, and the settings ask for {family}; leave architecture "
                f"out, or choose {' or '.join(trainings)}."
            )
        family = trained_as if trained_as in trainings else trainings[0]
    if config.d_sae not in (None, initial.m):
        raise InputError(f"The initial SAE has {initial.m} features, and d_sae is {config.d_sae}; leave d_sae out.")
    stated = initial.cfg.get("k", initial.metadata.get("l0"))
    k = config.k or (max(1, round(stated)) if isinstance(stated, int | float) else None)
    return config.model_copy(update={"architecture": family, "d_sae": initial.m, "k": k})


def without_initial(config: SaeConfig, initial: Mapping[str, Sae]) -> SaeConfig:
    """The settings of the same training from new weights: of the family and size of the first initial SAE."""
    return settled(config, next(iter(initial.values()), None)).model_copy(update={"init": None})


@torch.no_grad()
def start_from(initial: Sae, config: SaeConfig, scale: float, generator: torch.Generator) -> Sae:
    """A copy of the initial SAE in the units of training (``scale`` times x), with unit decoder rows.

    Features whose row is zero are drawn anew. In a TopK SAE whose rows have different norms, other features may be among the
    k largest; else the copy computes the same. BatchTopK and Matryoshka get one threshold for all features, the median.
    """
    weights = {name: p.data.clone() for name, p in initial.named_parameters()}
    zero = weights["W_dec"].norm(dim=1) == 0
    unit_decoder(weights)
    if n := int(zero.sum()):
        rows = torch.nn.functional.normalize(torch.randn(n, initial.d, generator=generator))
        weights["W_dec"][zero] = rows
        others = weights["W_enc"][:, ~zero].norm(dim=0)
        weights["W_enc"][:, zero] = rows.t() * (SHORT * float(others.mean()) if len(others) else 1.0)
    sae = copy.deepcopy(initial).fill(weights)
    sae.change_units(1 / scale)
    if config.architecture in ("batchtopk", "matryoshka"):
        threshold = storage(sae)["threshold"]
        threshold.fill_(float(threshold.median()))
    if "k" in sae.cfg:
        sae.cfg = {**sae.cfg, "k": config.k}
    return sae

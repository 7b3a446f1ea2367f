"""A sparse autoencoder at a site, f = encode(x) >= 0 and x^ = f W_dec + b_dec, and the registry of its families."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from rmscope.errors import InputError
from rmscope.io import content_hash
from rmscope.model.site_names import same_stream
from rmscope.sae.formats import read_sae
from rmscope.sae.formats.saelens import write_sae
from rmscope.sae.formats.stored import StoredSae

MODULES = ("topk", "batchtopk", "matryoshka", "jumprelu", "gated", "standard", "matching_pursuit")
"""The families' own modules. They register themselves when they are imported, at the first look-up."""
_SAES: dict[str, Any] = {}
_TRAININGS: dict[str, Any] = {}
T = TypeVar("T", bound=type[Any])


def register_sae(cls: T) -> T:
    """Class decorator: registers an SAE under its ``architecture``. Raises ValueError if the name is taken."""
    return _register(_SAES, cls.architecture, cls, "an SAE family")


def register_training(architecture: str) -> Callable[[T], T]:
    """Class decorator: registers how a family is trained. Raises ValueError if the name is taken."""
    return lambda cls: _register(_TRAININGS, architecture, cls, "a training for")


def _register(table: dict[str, Any], architecture: str, cls: T, kind: str) -> T:
    if architecture in table:
        raise ValueError(f"There is already {kind} {architecture}.")
    table[architecture] = cls
    return cls


def sae_class(architecture: str) -> Any:
    """The family's subclass of :class:`Sae`. Raises InputError that lists the known families."""
    return _find(_SAES, architecture, "There is no SAE family {}; known: {}.")


def training_class(architecture: str) -> Any:
    """The family's subclass of :class:`~rmscope.sae.training.Training`. Raises InputError that lists the known ones."""
    return _find(_TRAININGS, architecture, "SAEs of the family {} cannot be trained here; choose one of {}.")


def _find(table: dict[str, Any], architecture: str, refusal: str) -> Any:
    for name in MODULES:
        import_module(f"rmscope.sae.{name}")
    if architecture not in table:
        raise InputError(refusal.format(architecture, ", ".join(sorted(table))))
    return table[architecture]


@dataclass(frozen=True, slots=True)
class Active:
    """The features that fire, sorted by token, then by feature. Values are > 0, in the stream's own units."""

    token: Int[Tensor, " nnz"]
    feature: Int[Tensor, " nnz"]
    value: Float[Tensor, " nnz"]
    n_tokens: int

    def rows(self) -> Int[Tensor, " n_tokens_plus_1"]:
        """Offsets: the entries of token t are ``rows[t] : rows[t + 1]``."""
        counts = torch.bincount(self.token, minlength=self.n_tokens)
        return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


class Sae(nn.Module, ABC):
    """The base of every family: W_enc [d, m], W_dec [m, d], b_dec [d], and the family's own parameters of shape [m].

    All families encode x - b_dec (SAELens' ``apply_b_dec_to_input``); loading folds other conventions into the biases.
    Parameters take no gradient by default: training uses the closed forms in each family's file. W_enc is stored feature by
    feature (its transpose is contiguous), so that single features are read from one stretch of memory.

    ``d`` is the width of the stream, ``m`` the number of features, ``site`` a name such as ``resid_post.6``. ``cfg`` holds
    the family's own settings (as in SAELens' cfg.json), ``metadata`` whatever came with the file.
    """

    architecture: ClassVar[str]
    feature_parameters: ClassVar[tuple[str, ...]]
    """Names of the family's own parameters, which have the shape [m]."""
    biases: ClassVar[tuple[str, ...]]
    """The parameters in the units of x; a change of units scales them."""

    W_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter

    def __init__(self, d: int, m: int, site: str = "", metadata: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.d, self.m, self.site, self.cfg, self.metadata = d, m, site, dict[str, Any](), dict(metadata or {})
        self._device_copy: tuple[Sae, ...] = ()  # a tuple, so that torch does not register it as a submodule
        self.W_enc = nn.Parameter(torch.zeros(m, d).t(), requires_grad=False)
        self.W_dec = nn.Parameter(torch.zeros(m, d), requires_grad=False)
        self.b_dec = nn.Parameter(torch.zeros(d), requires_grad=False)
        for name in self.feature_parameters:
            setattr(self, name, nn.Parameter(torch.zeros(m), requires_grad=False))

    @abstractmethod
    def encode(self, x: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens m"]:
        """Features, dense, in the stream's own units."""

    def decode(self, f: Float[Tensor, "*tokens m"]) -> Float[Tensor, "*tokens d"]:
        return f @ self.W_dec + self.b_dec

    def forward(self, x: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens d"]:
        return self.decode(self.encode(x))

    @torch.no_grad()
    def active(self, x: Float[Tensor, "tokens d"], chunk: int = 2048) -> Active:
        """The features of :meth:`encode` in sparse form, on the device of x. At most [chunk, m] is held at once."""
        sae = self._device_copy[0] if self._device_copy else self
        tokens, features, values = [], [], []
        for i, part in enumerate(x.to(sae.W_dec.device).split(chunk)):
            token, feature, value = sae._active(part)
            tokens.append(token + i * chunk)
            features.append(feature)
            values.append(value.float())
        token, feature, value = (torch.cat(column).to(x.device) for column in (tokens, features, values))
        return Active(token, feature, value, len(x))

    def encode_on(self, device: torch.device) -> None:
        """Makes :meth:`active` encode on ``device``, with a copy of the present weights.

        Encoding takes d m multiplications per token, so it belongs on the fastest device; the few active entries come back
        to the device of x. Call it again after a change of weights: a change of units and :meth:`fill` drop the copy.
        """
        self._device_copy = ()
        if device != self.W_dec.device:
            self._device_copy = (copy.deepcopy(self).to(device),)

    def _active(self, x: Float[Tensor, "n d"]) -> tuple[Tensor, Tensor, Tensor]:
        f = self.encode(x)
        token, feature = f.nonzero(as_tuple=True)
        return token, feature, f[token, feature]

    def decode_active(self, active: Active) -> Float[Tensor, "tokens d"]:
        """The reconstruction from sparse features; equals ``decode(encode(x))``."""
        return self.b_dec + F.embedding_bag(
            active.feature, self.W_dec, active.rows()[:-1], mode="sum", per_sample_weights=active.value.to(self.W_dec.dtype)
        )

    def centre(self, x: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens d"]:
        """x - b_dec."""
        return x.to(self.W_dec.dtype) - self.b_dec

    @torch.no_grad()
    def change_units(self, s: float) -> None:
        """Turns an SAE that works on s x into one that works on x, with features in the units of x.

        This is exact for every family whose active set does not depend on the overall scale: the matrices stay, and the
        parameters in the units of x (biases, thresholds) are divided by s.
        """
        self._device_copy = ()
        for name in self.biases:
            getattr(self, name).div_(s)

    def identity(self) -> str:
        """Content hash of the family, its settings and its weights."""
        parts: list[Any] = [self.architecture, self.cfg]
        for name, p in sorted(self.named_parameters()):
            parts += [name, list(p.shape), p.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()]
        return content_hash(*parts)

    def save(self, folder: Path | str) -> None:
        """Writes ``cfg.json`` and ``sae_weights.safetensors``, which SAELens opens without conversion."""
        weights = {name: p.data for name, p in self.named_parameters()}
        write_sae(StoredSae(self.architecture, weights, self.site, self.metadata, self.cfg), Path(folder))

    @staticmethod
    def load(source: Path | str) -> Sae:
        """Opens an SAE in any format of :mod:`rmscope.sae.formats`: a folder, a file, or ``hub:owner/repo/path``.

        Raises InputError: nothing there, an unknown format or family, contradicting shapes, or a pickle with code.
        """
        stored = read_sae(source)
        m, d = stored.weights["W_dec"].shape
        sae: Sae = sae_class(stored.architecture)(d, m, stored.site, stored.metadata, **stored.settings)
        return sae.fill({name: w.float() for name, w in stored.weights.items()})

    @property
    def width(self) -> int:
        """The width of the PM's stream: d, or half of it where both of its parts are read."""
        return self.d

    def check_width(self, d_model: int, model: str) -> None:
        """Raises InputError where the SAE reads a stream of another width than that of the PM, ``model``."""
        if self.width != d_model:
            raise InputError(
                f"This SAE reads a stream of width {self.width}, but {model} has d_model {d_model}; it was trained on "
                f"another model ({self.metadata.get('model_name') or 'which it does not name'})."
            )

    def check_site(self, site: str, source: str = "") -> None:
        """Raises InputError where the SAE (from ``source``) was trained at another site than ``site``, where it is used."""
        if self.site and not same_stream(self.site, site):
            which = f"The SAE at {source}" if source else "This SAE"
            raise InputError(
                f"{which} was trained at {self.site}, and is to be used at {site}; name the SAE of {site}, or study "
                f"{self.site}."
            )

    def fill(self, weights: dict[str, Tensor]) -> Self:
        """Sets all parameters, float32. Raises InputError where one is missing, unknown or of another shape."""
        expected = {name: list(p.shape) for name, p in self.named_parameters()}
        given = {name: list(p.shape) for name, p in weights.items()}
        if expected != given:
            wrong = sorted(name for name in expected | given if expected.get(name) != given.get(name))
            told = "; ".join(f"{name}: {given.get(name)}, expected {expected.get(name)}" for name in wrong)
            raise InputError(f"The weights do not fit a {self.architecture} SAE ({told}).")
        self._device_copy = ()
        for name, p in self.named_parameters():
            p.data.copy_(weights[name])
        return self

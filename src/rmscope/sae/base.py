"""A sparse autoencoder at a site: features f = encode(x) >= 0, reconstruction x^ = f W_dec + b_dec."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from rmscope.errors import InputError
from rmscope.io import content_hash

Self = TypeVar("Self", bound="Sae")


@dataclass(frozen=True, slots=True)
class Active:
    """The features that fire, sorted by token, then feature; values in the stream's own units, all > 0."""

    token: Int[Tensor, " nnz"]
    feature: Int[Tensor, " nnz"]
    value: Float[Tensor, " nnz"]
    n_tokens: int

    def rows(self) -> Int[Tensor, " n_tokens_plus_1"]:
        """Offsets: the entries of token t are ``rows[t] : rows[t + 1]``."""
        counts = torch.bincount(self.token, minlength=self.n_tokens)
        return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


class Sae(nn.Module, ABC):
    """What every family shares: W_enc [d, m], W_dec [m, d], b_dec [d]; further parameters are the family's.

    All families encode x - b_dec (SAELens' ``apply_b_dec_to_input``); other conventions are folded into the
    biases on load. Parameters take no gradient until asked to: training uses the closed forms in each
    family's file. W_enc is stored feature by feature (its transpose is contiguous), so that single features
    are read in one stretch.

    ``site`` is a name such as ``resid_post.6``, ``cfg`` the family's own settings (as in SAELens' cfg.json),
    ``metadata`` whatever came with the file.
    """

    architecture: ClassVar[str]
    biases: ClassVar[tuple[str, ...]]
    """The parameters measured in the units of x, which a change of units scales with it."""

    W_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter

    def __init__(self, d: int, m: int, site: str = "", metadata: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.site, self.cfg, self.metadata = site, dict[str, Any](), dict(metadata or {})
        self._elsewhere: tuple[Sae, ...] = ()  # in a tuple it is no submodule
        self.W_enc = nn.Parameter(torch.zeros(m, d).t(), requires_grad=False)
        self.W_dec = nn.Parameter(torch.zeros(m, d), requires_grad=False)
        self.b_dec = nn.Parameter(torch.zeros(d), requires_grad=False)
        for name in self.feature_parameters():
            setattr(self, name, nn.Parameter(torch.zeros(m), requires_grad=False))

    @classmethod
    @abstractmethod
    def feature_parameters(cls) -> tuple[str, ...]:
        """Names of the parameters of shape [m] beside the matrices."""

    @property
    def d(self) -> int:
        return self.W_dec.shape[1]

    @property
    def m(self) -> int:
        return self.W_dec.shape[0]

    @abstractmethod
    def encode(self, x: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens m"]:
        """Features, dense, in the stream's own units."""

    def decode(self, f: Float[Tensor, "*tokens m"]) -> Float[Tensor, "*tokens d"]:
        return f @ self.W_dec + self.b_dec

    def forward(self, x: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens d"]:
        return self.decode(self.encode(x))

    @torch.no_grad()
    def active(self, x: Float[Tensor, "tokens d"], chunk: int = 2048) -> Active:
        """The same features as :meth:`encode`, sparse, where x lies; at most [chunk, m] is ever held."""
        if self._elsewhere:
            [there] = self._elsewhere
            found = there.active(x.to(there.W_dec.device), chunk)
            return Active(found.token.to(x.device), found.feature.to(x.device), found.value.to(x.device), len(x))
        parts = [self._active(part) for part in x.split(chunk)]
        starts = range(0, len(x), chunk)
        empty = torch.empty(0, dtype=torch.int64, device=x.device)
        return Active(
            torch.cat([empty, *(token + start for (token, _, _), start in zip(parts, starts, strict=False))]),
            torch.cat([empty, *(feature for _, feature, _ in parts)]),
            torch.cat([torch.empty(0, device=x.device), *(value.float() for _, _, value in parts)]),
            len(x),
        )

    def encode_on(self, device: torch.device) -> None:
        """From now on :meth:`active` looks for features on ``device``, with a copy of the weights as they are now (after a
        change of weights, ask again): that is where an SAE's work lies, d m multiplications a token, while the few entries
        that come of it stay with x."""
        self._elsewhere = ()
        if device != self.W_dec.device:
            self._elsewhere = (copy.deepcopy(self).to(device),)

    def _active(self, x: Float[Tensor, "n d"]) -> tuple[Tensor, Tensor, Tensor]:
        f = self.encode(x)
        token, feature = f.nonzero(as_tuple=True)
        return token, feature, f[token, feature]

    def decode_active(self, active: Active) -> Float[Tensor, "tokens d"]:
        """The reconstruction from sparse features; equals ``decode(encode(x))``."""
        return self.b_dec + F.embedding_bag(
            active.feature,
            self.W_dec,
            active.rows()[:-1],
            mode="sum",
            per_sample_weights=active.value.to(self.W_dec.dtype),
        )

    def centred(self, x: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens d"]:
        return x.to(self.W_dec.dtype) - self.b_dec

    @torch.no_grad()
    def change_units(self, s: float) -> None:
        """Turns an SAE that works on s x into one that works on x, features then in the units of x.

        Exact for every family whose active set does not depend on the overall scale: the matrices stay, what
        is measured in the units of x (biases, thresholds) is divided by s.
        """
        self._elsewhere = ()
        for name in self.biases:
            getattr(self, name).div_(s)

    def identity(self) -> str:
        """Content hash of the family, its settings and its weights."""
        weights = {name: p.detach().to("cpu", torch.float32) for name, p in sorted(self.named_parameters())}
        raw = [(name, list(p.shape), p.contiguous().numpy().tobytes()) for name, p in weights.items()]
        return content_hash(
            self.architecture, self.cfg, *(part for name, shape, data in raw for part in (name, shape, data))
        )

    def save(self, folder: Path | str) -> None:
        """Writes ``cfg.json`` and ``sae_weights.safetensors``, which SAELens opens as they are."""
        from rmscope.sae.formats import save_sae

        save_sae(self, Path(folder))

    @staticmethod
    def load(source: Path | str) -> Sae:
        """Opens a folder or a file in any format that :mod:`rmscope.sae.formats` knows, from disk or, as
        ``hub:owner/repo/path``, from the Hugging Face hub.

        Raises:
            InputError: nothing there, unknown format, shapes that contradict each other, or a pickle with
                code.
        """
        from rmscope.sae.formats import load_sae

        return load_sae(source)

    def check_width(self, d_model: int, model: str) -> None:
        """InputError where the SAE reads a stream of another width than the PM's."""
        if self.d != d_model:
            raise InputError(
                f"This SAE reads a stream of width {self.d}, but {model} has d_model {d_model}; it was trained on another "
                f"model ({self.metadata.get('model_name') or 'which it does not name'})."
            )

    def fill(self: Self, weights: dict[str, Tensor]) -> Self:
        """Sets all parameters, float32.

        Raises:
            InputError: one is missing, unknown or of another shape.
        """
        expected = {name: list(p.shape) for name, p in self.named_parameters()}
        given = {name: list(p.shape) for name, p in weights.items()}
        if expected != given:
            wrong = sorted(name for name in expected | given if expected.get(name) != given.get(name))
            told = "; ".join(f"{name}: {given.get(name)}, expected {expected.get(name)}" for name in wrong)
            raise InputError(f"The weights do not fit a {self.architecture} SAE ({told}).")
        self._elsewhere = ()
        for name, p in self.named_parameters():
            p.data.copy_(weights[name])
        return self

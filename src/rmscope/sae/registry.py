"""The families by name: how each is opened, and how it is trained where it can be."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TypeVar

from rmscope.errors import InputError
from rmscope.sae.base import Sae
from rmscope.sae.training import Training

FILES = ("topk", "batchtopk", "matryoshka", "jumprelu", "gated", "standard")
"""The families' own modules, imported when one is first looked up."""

_SAES: dict[str, type[Sae]] = {}
_TRAININGS: dict[str, type[Training]] = {}
S = TypeVar("S", bound=type[Sae])
T = TypeVar("T", bound=type[Training])


def family(cls: S) -> S:
    """Class decorator: registers an SAE under its ``architecture``; a second of that name is refused."""
    if cls.architecture in _SAES:
        raise ValueError(f"There is already an SAE family {cls.architecture}.")
    _SAES[cls.architecture] = cls
    return cls


def trains(architecture: str) -> Callable[[T], T]:
    """Class decorator: registers how a family is trained."""

    def register(cls: T) -> T:
        if architecture in _TRAININGS:
            raise ValueError(f"There is already a training for {architecture}.")
        _TRAININGS[architecture] = cls
        return cls

    return register


def sae_class(architecture: str) -> type[Sae]:
    """The family of that name, or an InputError that lists the known ones."""
    _import_all()
    if architecture not in _SAES:
        raise InputError(f"There is no SAE family {architecture}; known: {', '.join(sorted(_SAES))}.")
    return _SAES[architecture]


def training_class(architecture: str) -> type[Training]:
    """How that family is trained, or an InputError that lists those that can be."""
    _import_all()
    if architecture not in _TRAININGS:
        known = ", ".join(sorted(_TRAININGS))
        raise InputError(f"SAEs of the family {architecture} cannot be trained here; choose one of {known}.")
    return _TRAININGS[architecture]


def _import_all() -> None:
    for name in FILES:
        import_module(f"rmscope.sae.{name}")

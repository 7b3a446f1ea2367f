"""The SAE families by name: the class of each, and how it is trained if it can be."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, ClassVar, Protocol, TypeVar

from rmscope.errors import InputError

MODULES = ("topk", "batchtopk", "matryoshka", "jumprelu", "gated", "standard")
"""The families' own modules. They register themselves when they are imported, at the first look-up."""

_SAES: dict[str, Any] = {}
_TRAININGS: dict[str, Any] = {}


class Family(Protocol):
    """A class that names its architecture."""

    architecture: ClassVar[str]


S = TypeVar("S", bound=type[Family])
T = TypeVar("T")


def register_sae(cls: S) -> S:
    """Class decorator: registers an SAE under its ``architecture``. Raises ValueError if the name is taken."""
    return _add(_SAES, cls.architecture, cls, "an SAE family")


def register_training(architecture: str) -> Callable[[T], T]:
    """Class decorator: registers how a family is trained. Raises ValueError if the name is taken."""
    return lambda cls: _add(_TRAININGS, architecture, cls, "a training for")


def _add(table: dict[str, Any], architecture: str, cls: T, kind: str) -> T:
    if architecture in table:
        raise ValueError(f"There is already {kind} {architecture}.")
    table[architecture] = cls
    return cls


def sae_class(architecture: str) -> Any:
    """The family's subclass of :class:`~rmscope.sae.base.Sae`. Raises InputError that lists the known families."""
    if architecture not in _after_imports(_SAES):
        raise InputError(f"There is no SAE family {architecture}; known: {', '.join(sorted(_SAES))}.")
    return _SAES[architecture]


def training_class(architecture: str) -> Any:
    """The family's subclass of :class:`~rmscope.sae.training.Training`. Raises InputError that lists the known ones."""
    if architecture not in _after_imports(_TRAININGS):
        known = ", ".join(sorted(_TRAININGS))
        raise InputError(f"SAEs of the family {architecture} cannot be trained here; choose one of {known}.")
    return _TRAININGS[architecture]


def _after_imports(table: dict[str, Any]) -> dict[str, Any]:
    for name in MODULES:
        import_module(f"rmscope.sae.{name}")
    return table

"""rmscope: a microscope for preference models, the reward models of RLHF."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rmscope.activations.harvest import harvest
    from rmscope.activations.stream import stream
    from rmscope.api import ablate, attribute, ledger, open_run, rank
    from rmscope.model.reward_model import RewardModel
    from rmscope.pairs.pair import Pair
    from rmscope.pairs.readers import load_pairs
    from rmscope.sae import Sae, SaeConfig, train_saes
    from rmscope.studies.edit.patch import load_edited

_WHERE = {
    "RewardModel": "rmscope.model.reward_model",
    "Pair": "rmscope.pairs.pair",
    "load_edited": "rmscope.studies.edit.patch",
    "load_pairs": "rmscope.pairs.readers",
    "open_run": "rmscope.api",
    "harvest": "rmscope.activations.harvest",
    "stream": "rmscope.activations.stream",
    "train_saes": "rmscope.sae",
    "Sae": "rmscope.sae",
    "SaeConfig": "rmscope.sae",
    "attribute": "rmscope.api",
    "ablate": "rmscope.api",
    "ledger": "rmscope.api",
    "rank": "rmscope.api",
}

__all__ = [
    "Pair",
    "RewardModel",
    "Sae",
    "SaeConfig",
    "ablate",
    "attribute",
    "harvest",
    "ledger",
    "load_edited",
    "load_pairs",
    "open_run",
    "rank",
    "stream",
    "train_saes",
]


def __getattr__(name: str) -> Any:
    """Public names are imported on first use, so that the command line starts quickly."""
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'rmscope' has no attribute {name!r}")

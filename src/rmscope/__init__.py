"""rmscope: a microscope for preference models, the reward models of RLHF."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rmscope.activations.harvest import harvest, stream
    from rmscope.api.effects import ablate, attribute, doctor, ledger, rank
    from rmscope.api.plan import plan
    from rmscope.api.studies import audit, compare, edit, evaluate, experiment, export, gate, jailbreak, label, sufficiency
    from rmscope.model.judge import load_judge
    from rmscope.model.reward_model import RewardModel
    from rmscope.pairs.pair import Pair
    from rmscope.pairs.readers import load_pairs
    from rmscope.run.run import Run
    from rmscope.run.settings import RunConfig
    from rmscope.sae import Sae, SaeConfig, train_saes
    from rmscope.statistics import Figure
    from rmscope.studies.edit.patch import load_edited

_MODULES = {
    "rmscope.activations.harvest": ("harvest", "stream"),
    "rmscope.api.effects": ("ablate", "attribute", "doctor", "ledger", "rank"),
    "rmscope.api.plan": ("plan",),
    "rmscope.model.judge": ("load_judge",),
    "rmscope.model.reward_model": ("RewardModel",),
    "rmscope.pairs.pair": ("Pair",),
    "rmscope.pairs.readers": ("load_pairs",),
    "rmscope.run.run": ("Run",),
    "rmscope.run.settings": ("RunConfig",),
    "rmscope.sae": ("Sae", "SaeConfig", "train_saes"),
    "rmscope.statistics": ("Figure",),
    "rmscope.studies.edit.patch": ("load_edited",),
    "rmscope.api.studies": (
        "audit", "compare", "edit", "evaluate", "experiment", "export", "gate", "jailbreak", "label", "sufficiency",
    ),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "Figure", "Pair", "RewardModel", "Run", "RunConfig", "Sae", "SaeConfig", "ablate", "attribute", "audit", "compare",
    "doctor", "edit", "evaluate", "experiment", "export", "gate", "harvest", "jailbreak", "label", "ledger", "load_edited",
    "load_judge", "load_pairs", "plan", "rank", "stream", "sufficiency", "train_saes",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Public names are imported on first use, so that the command line starts quickly."""
    if name in _MODULE_OF:
        return getattr(import_module(_MODULE_OF[name]), name)
    raise AttributeError(f"module 'rmscope' has no attribute {name!r}")

"""Settings and tensors of which every key must be used: a layout that is known by half is refused.

A reader takes what it follows. What is left when it is done is unknown, and the SAE is refused with the name of the key: a
scale, a threshold or a skip that nobody applies would give other features without a word. Two kinds of settings may be left:
those without a value, and those that only tell how the SAE was trained (:data:`TRAINING`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from rmscope.errors import InputError

TRAINING = re.compile(
    r"(.*_)?(lr|seed|device|devices|dtype|steps|epochs|verbose|tags|version|streaming|wandb|lp|l0|l1|tokens|beta\d?|betas"
    r"|batch|batches|batch_size|path|dir|alpha|coefficient|coeff|penalty|bandwidth|loss|project|entity|run_name|nonce)"
    r"|(lr|l0|l1|lp|adam|wandb|log|optimi[sz]er|warm_?up|decay|dead|resample?|feature_sampling|checkpoint|dataset|eval|buffer"
    r"|train|training|init|autocast|compile|finetuning|prepend|exclude|use_ghost|use_cached|cached|store|tp|ddp|anneal"
    r"|sparsity_warm_?up|k_warm_?up|k_anneal|k_decay|auxk?|top_k_aux|k_aux|n_batches|n_checkpoints|is_dataset|expansion"
    r"|b_dec_init|bias_init|p_start|p_end|target_l0|noise|mse_loss|act_store|hook_eval|hook_point_eval|synthetic|model_kwargs"
    r"|from_pretrained|seqpos|context|neuronpedia|clip_grad|grad|loss|sweep|resume)(_.*)?"
)
"""Names of settings of training, in the configs of all tools."""
MEANING = re.compile(r"norm|scal|activation|threshold|bias(?!_init)|skip|rescale|(^|_)(in|out)put|_out$")
"""Parts of a name that make it a setting of the SAE, however else it is named."""


def is_training(key: str) -> bool:
    """Whether a setting tells only how an SAE was trained."""
    return bool(TRAINING.fullmatch(key.lower())) and not MEANING.search(key.lower())


class Keys:
    """The values of a file by their keys, and which keys were used.

    ``place`` names the file in messages, ``is_inert`` tells which values need no use.
    """

    def __init__(self, values: dict[str, Any], place: str, is_inert: Callable[[str, Any], bool] = lambda *_: False) -> None:
        self.values, self.place, self._is_inert = values, place, is_inert
        self._used: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def take(self, *keys: str, default: Any = None) -> Any:
        """The value of the first of some keys that is there and not null; all of them count as used."""
        self._used.update(keys)
        return next((self.values[key] for key in keys if self.values.get(key) is not None), default)

    def section(self, key: str) -> Keys:
        """The settings within a setting. InputError where it is no object."""
        place = f"{self.place} ({key})"
        values = self.take(key, default={})
        if not isinstance(values, dict):
            raise InputError(f"{place} is {values!r:.40}, and not an object of settings.")
        return Keys(values, place, self._is_inert)

    def name(self, key: str, default: str) -> str:
        """A setting that is a word."""
        return str(self.take(key, default=default))

    def need(self, key: str, what: str) -> Any:
        """The value of a key. InputError where it is missing, so that the file is not ``what``."""
        value = self.take(key)
        if value is None:
            raise InputError(f"{self.place} holds no {key}, so it is not {what}; it is not read by guess.")
        return value

    def allow(self, key: str, *values: Any) -> None:
        """InputError where a setting is there and is none of the values that can be followed."""
        value = self.take(key)
        if value is not None and value not in values:
            raise InputError(f"{self.place} says {key} = {value!r}, which cannot be followed; save the SAE without it.")

    def agree(self, key: str, value: Any) -> None:
        """InputError where a setting is there and contradicts the weights."""
        stated = self.take(key)
        if stated is not None and stated != value:
            raise InputError(f"{self.place} says {key} = {stated!r}, but the weights have {value!r}; one is of another SAE.")

    def left(self) -> list[str]:
        """The keys that were not used and may have a meaning."""
        return sorted(k for k, value in self.values.items() if k not in self._used and not self._is_inert(k, value))

    def close(self, what: str) -> None:
        """InputError that names a key which nothing used."""
        if unknown := self.left():
            raise InputError(
                f"{self.place} holds {', '.join(unknown[:3])}, which is not known of {what}; its features could be others, "
                "so it is not read by guess."
            )


def settings_keys(values: dict[str, Any], place: str) -> Keys:
    """The keys of a settings file: null and empty values, and settings of training, need no use."""
    return Keys(values, place, lambda key, value: value is None or value in ({}, [], "") or is_training(key))

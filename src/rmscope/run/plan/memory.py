"""How much memory of a device each stage takes at its peak."""

from __future__ import annotations

from rmscope.model.onednn import MOST_BYTES
from rmscope.model.reward_model import TOKEN_BUDGET
from rmscope.model.site_names import BOTH, is_difference, kind_of
from rmscope.run.plan.case import Case

ITEM = {"float32": 4, "bfloat16": 2, "float16": 2}
LIBRARIES = {"cpu": 2.0e9, "card": 1.0e9}
"""Bytes that python and torch take before a PM is loaded, of a machine's memory or of a card's. With it a run of
zoo:planted takes 2.7 GB (2.65 were seen), one of zoo:hh 3.0 (2.96)."""
TRAINING_BYTES = 34
"""Per weight of an encoder in training: weights, gradients and two moments of both matrices are 32 (9 GB at d 4,096 and m
65,536 on one H200)."""
USABLE = 0.95
"""The share of a device's memory that can be filled before it breaks into pieces."""


def stage_bytes(case: Case, stage: str, ranks: int, on_cpu: bool) -> float:
    """The peak of a stage on one device. Everything a process holds is on its device."""
    total = model_bytes(case, on_cpu) + LIBRARIES["cpu" if on_cpu else "card"]
    if stage in ("train", "seeds"):
        total += training_bytes(case, ranks)
    elif stage in ("estimate", "decompose"):
        total += activation_bytes(case, max(map(case.after, case.sites)))
    else:
        total += activation_bytes(case, 1)
    if stage not in ("load", "preflight", "score", "harvest", "train"):
        total += sae_bytes(case) * (case.config.seeds if stage == "measure" and case.trained else 1)
    return total


def model_bytes(case: Case, on_cpu: bool) -> float:
    """The PM and what of the base is not its own; on a CPU a second copy of small PMs in a faster layout."""
    linear = ITEM["float32"] * case.pm.blocks * case.pm.block
    copied = linear if on_cpu and case.config.dtype == "float32" and linear <= MOST_BYTES else 0.0
    return ITEM[case.config.dtype] * (case.pm.weights + case.pm.base_weights) + copied


def activation_bytes(case: Case, blocks: int) -> float:
    """What some blocks hold of a batch: the results of their products, one number per row of their weights, and scores."""
    tokens = max(TOKEN_BUDGET, case.data.packed)
    products = case.pm.block / case.pm.d
    scores = case.data.packed * case.pm.attention / 64  # a head has some 64 dimensions
    return ITEM[case.config.dtype] * tokens * blocks * (products + scores)


def training_bytes(case: Case, ranks: int) -> float:
    """The SAEs that one rank trains at once: those of the differences, or those of the whole stream."""
    groups = [[p for p in case.trained if is_difference(p) == which] for which in (True, False)]
    largest = 0.0
    for parts in groups:
        own = sorted((case.features(part) for part in parts), reverse=True)[: -(-len(parts) // ranks)]
        largest = max(largest, float(TRAINING_BYTES * case.pm.d * sum(own)))
    return largest


def sae_bytes(case: Case) -> float:
    """Encoder and decoder of every site in float32. Those of ``both.L`` hold zeros in the halves that are not theirs."""
    return sum(8.0 * case.of_site(s) * case.pm.d * (2 if kind_of(s) == BOTH else 1) for s in case.sites)

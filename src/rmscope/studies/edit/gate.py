"""A gate for owners of PMs: did the reward of a named concept move between two versions by more than a bound?

A concept is a set of twins, as a planted cue is, without training: the same response with one of the concept's texts and
with filler of equal length. What a PM gives it is the mean Δr over twins in SD(Δr) of that PM over the plain pairs (the
scale of rewards is each version's own). *Moved* is tested one-sided against the bound, in the direction in which the mean
moved, by sign flips per prompt; two directions could have been tried, so p counts twice. Holm's correction over the
concepts: with nothing beyond the bound, the chance that the gate fails at all is at most :data:`LEVEL`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jaxtyping import Float
from pydantic import ValidationError

from rmscope.errors import InputError
from rmscope.io import Progress, silent
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.demo import zoo_plants
from rmscope.pairs.pair import Pair
from rmscope.pairs.planting import twins
from rmscope.pairs.plants import Plant
from rmscope.statistics import Array, beyond_p, flip_matrix, holm, mean_interval

LEVEL = 0.05
TWINS = 64
"""Twins a concept is measured on."""
SCALE_PAIRS = 168
"""Plain pairs that give SD(Δr), one a prompt while prompts last."""
FEWEST = 8
"""Prompts below which sign flips cannot reject after a correction over some concepts."""


def read_concepts(path: Path | None) -> tuple[Plant, ...]:
    """The concepts of a YAML file, rows of ``name`` and ``texts`` (or a ``kind`` of its own, as in plants.yaml); without
    a file the zoo's six cues.

    Raises:
        InputError: the file is missing or malformed, a row does not fit, a name stands twice, or a phrase has no texts.
    """
    if path is None:
        return zoo_plants()
    if not path.is_file():
        raise InputError(f"The concepts {path} are not there; name a YAML file.")
    try:
        rows = yaml.safe_load(path.read_text("utf-8"))
    except yaml.YAMLError as error:
        raise InputError(f"The concepts {path} are no YAML: {str(error).splitlines()[0]}.") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path} holds no list of concepts; write rows of a name and texts.")
    concepts = tuple(_concept(path, number, row) for number, row in enumerate(rows, 1))
    names = [c.name for c in concepts]
    if doubled := next((n for n in names if names.count(n) > 1), None):
        raise InputError(f"{path} names the concept {doubled} twice; give each a name of its own.")
    return concepts


def _concept(path: Path, number: int, row: Mapping[str, Any]) -> Plant:
    try:
        concept = Plant(**{"kind": "phrase", "sign": 1, **row})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(p) for p in first["loc"])
        raise InputError(f"Concept {number} in {path}: {where}: {first['msg'].lower()}; see plants.yaml.") from error
    if concept.kind == "phrase" and not concept.texts:
        raise InputError(
            f"Concept {number} in {path} ({concept.name}) has no texts; give the wordings that are the concept."
        )
    return concept


def measure(
    rm: RewardModel, concepts: Sequence[Plant], pairs: Sequence[Pair], seed: int, progress: Progress = silent
) -> dict[str, tuple[Float[Array, " twins"], list[str]]]:
    """Each concept's Δr over its twins in SD(Δr) of this PM, and the twins' prompts; the same twins for every PM."""
    plain = _one_a_prompt(pairs, SCALE_PAIRS)
    progress(0, len(concepts) + 1, "plain pairs")
    sd = float(rm.score(plain).delta.std())
    found = {}
    for i, concept in enumerate(concepts):
        progress(i + 1, len(concepts) + 1, f"concept {concept.name}")
        made = twins(pairs, concept, TWINS, seed, held_out=None)
        delta = rm.score(made).delta.numpy().astype(float) / sd
        found[concept.name] = (delta, [str(p.meta["group"]) for p in made])
    progress(len(concepts) + 1, len(concepts) + 1, "")
    return found


def _one_a_prompt(pairs: Sequence[Pair], most: int) -> list[Pair]:
    """At most ``most`` pairs, one a prompt: the place of the pair within its prompt changes from prompt to prompt."""
    by_prompt: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_prompt.setdefault(pair.first_human_turn(), []).append(pair)
    return [rows[i % len(rows)] for i, rows in enumerate(by_prompt.values())][:most]


def verdicts(
    base: Mapping[str, tuple[Array, Sequence[str]]], new: Mapping[str, tuple[Array, Sequence[str]]], bound: float, seed: int
) -> list[dict[str, Any]]:
    """A row a concept: its ATE in either PM, the move with its interval, p against the bound, Holm's p, and ``moved``.

    Raises:
        InputError: the bound is negative, or the prompts are too few to test.
    """
    if not bound >= 0:
        raise InputError(f"--bound {bound} is no bound; give a number of SD(Δr), 0 or more.")
    rows = []
    for name, (before, prompts) in base.items():
        old, now = (_by_prompt(values, prompts) for values in (before, new[name][0]))
        move = now - old
        if move.size < FEWEST:
            raise InputError(f"The concept {name} has twins on {move.size} prompts; give pairs with {FEWEST} or more.")
        low, high = mean_interval(move)
        rows.append({
            "concept": name, "prompts": int(move.size), "base": float(old.mean()), "new": float(now.mean()),
            "move": {"value": float(move.mean()), "low": low, "high": high},
            "p": beyond_p(move, bound, flip_matrix(move.size, seed)),
        })  # fmt: skip
    for row, q in zip(rows, holm(np.array([row["p"] for row in rows])), strict=True):
        row |= {"holm": float(q), "moved": bool(q < LEVEL)}
    return rows


def _by_prompt(values: Array, prompts: Sequence[str]) -> Float[Array, " prompts"]:
    """Means over each prompt's twins."""
    _, index = np.unique(np.array(prompts), return_inverse=True)
    return np.bincount(index, values) / np.bincount(index)

"""A gate for owners of PMs: did the reward of a named concept move between two PMs by more than a bound?

A concept is a set of twins: the same response with one of the concept's texts, and with filler of equal length. Its effect
is the PM's mean Δr over the twins, in SD(Δr) of that PM over the plain pairs, because each PM has its own scale of rewards.

The move is tested against the bound by sign flips per prompt (:func:`~rmscope.statistics.beyond_p`), with Holm's correction
over the concepts: if none moved beyond the bound, the gate fails with a probability of at most :data:`LEVEL`.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from pydantic import ValidationError

from rmscope.errors import InputError
from rmscope.io import Display, NoDisplay, Progress, silent
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.demo import plain_demo_pairs, zoo_plants
from rmscope.pairs.pair import Pair
from rmscope.pairs.planting import twins
from rmscope.pairs.plants import Plant
from rmscope.pairs.readers import load_pairs
from rmscope.run.inputs import load_pm
from rmscope.settings import parse_yaml
from rmscope.statistics import Array, beyond_p, flip_matrix, holm, interval
from rmscope.studies.edit.patch import is_patch, load_edited
from rmscope.studies.edit.result import LEVEL, ConceptMove, GateResult
from rmscope.studies.edit.settings import GateConfig

TWINS, SCALE_PAIRS, FEWEST = 64, 168, 8
"""Twins on which a concept is measured; plain pairs that give SD(Δr), one per prompt; prompts of a concept, because with
fewer sign flips cannot reject after a correction over some concepts."""


def analyse_gate(config: GateConfig, display: Display | None = None) -> GateResult:
    """Compares the concepts' effects under two PMs with the bound. The result's ``exit_code`` is 1 where one moved.

    1. Read the concepts and the plain pairs.
    2. Measure the concepts under the base PM, and under the new one: another PM, or the base PM with a patch.
    3. Test each move against the bound.

    Raises:
        InputError: the concepts or pairs cannot be read, the patch is of another PM, or the prompts are too few.
    """
    started, display = time.time(), display or NoDisplay()
    concepts = read_concepts(config.concepts)  # 1
    pairs = load_pairs(config.data, limit=config.limit) if config.data else plain_demo_pairs()[: config.limit]
    effects = list[dict[str, Array]]()
    for model in (config.base, config.new):  # 2
        patched = bool(effects) and is_patch(model)
        rm = load_pm(config.base if patched else model, config)
        if patched:
            load_edited(rm, model)
        with display.stage(model) as progress:
            effects.append(measure_concepts(rm, concepts, pairs, config.seed, progress))
    moves = concept_moves(effects[0], effects[1], config.bound, config.seed)  # 3
    moved = [m.concept for m in moves if m.moved]
    given = config.model_dump(include={"base", "new", "bound"})
    return GateResult(**given, passed=not moved, moved=moved, concepts=moves, seconds=round(time.time() - started, 1))


def read_concepts(path: Path | None) -> tuple[Plant, ...]:
    """The concepts of a YAML file: a list, each with a ``name`` and ``texts``, or with a ``kind`` as in a plants file.
    Without a file: the zoo's six cues. InputError where the file is missing or malformed, or a concept does not fit."""
    if path is None:
        return zoo_plants()
    rows = parse_yaml(path, "file of concepts")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path} holds no list of concepts; write a list whose entries have a name and texts.")
    concepts = tuple(_concept(row, f"Concept {number} in {path}") for number, row in enumerate(rows, 1))
    names = [c.name for c in concepts]
    if doubled := next((n for n in names if names.count(n) > 1), None):
        raise InputError(f"{path} names the concept {doubled} twice; give each concept its own name.")
    return concepts


def _concept(row: Mapping[Any, Any], where: str) -> Plant:
    if others := [key for key in row if not isinstance(key, str)]:
        raise InputError(f"{where} has a key that is no name ({others[0]!r}); write a name.")
    try:
        concept = Plant(**{"kind": "phrase", "sign": 1, **row})
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise InputError(f"{where}: {field}: {first['msg'].lower()}; see plants.yaml.") from error
    if concept.kind == "phrase" and not concept.texts:
        raise InputError(f"{where} ({concept.name}) has no texts; give the wordings of the concept.")
    return concept


def measure_concepts(
    rm: RewardModel, concepts: Sequence[Plant], pairs: Sequence[Pair], seed: int, progress: Progress = silent
) -> dict[str, Float[Array, " prompts"]]:
    """Each concept's mean Δr over the twins of each prompt, in SD(Δr) of this PM. The twins are the same for every PM."""
    progress(0, len(concepts) + 1, "plain pairs")
    sd = float(rm.score(_rotate_within_prompts(pairs, SCALE_PAIRS)).delta.std())
    measured = {}
    for i, concept in enumerate(concepts):
        progress(i + 1, len(concepts) + 1, f"concept {concept.name}")
        texts = twins(pairs, concept, TWINS, seed, held_out=None)
        delta = rm.score(texts).delta.numpy().astype(float) / sd
        _, prompts = np.unique([p.prompt_key for p in texts], return_inverse=True)
        measured[concept.name] = np.bincount(prompts, delta) / np.bincount(prompts)
    progress(len(concepts) + 1, len(concepts) + 1, "")
    return measured


def _rotate_within_prompts(pairs: Sequence[Pair], most: int) -> list[Pair]:
    """One pair per prompt: the first prompt's first, the second's second, ... because the demo orders them by quality."""
    by_prompt: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        by_prompt[pair.prompt_key].append(pair)
    return [rows[i % len(rows)] for i, rows in enumerate(by_prompt.values())][:most]


def concept_moves(base: Mapping[str, Array], new: Mapping[str, Array], bound: float, seed: int) -> list[ConceptMove]:
    """The move of each concept, tested against a bound in SD(Δr). InputError where the prompts are too few to test."""
    moves = []
    for name, before in base.items():
        if before.size < FEWEST:
            raise InputError(f"The concept {name} has twins on {before.size} prompts; give pairs with {FEWEST} or more.")
        move, means = new[name] - before, (float(before.mean()), float(new[name].mean()))
        p = beyond_p(move, bound, flip_matrix(before.size, seed))
        moves.append(ConceptMove(name, before.size, *means, interval(move, unit="SD(Δr)"), p))
    corrected = holm(np.array([m.p for m in moves])).tolist()
    return [replace(m, holm=q, moved=q < LEVEL) for m, q in zip(moves, corrected, strict=True)]

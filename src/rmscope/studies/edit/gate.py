"""A gate for owners of PMs: did the reward of a named concept move between two PMs by more than a bound?

A concept is a set of twins, like a planted cue but without training: the same response with one of the concept's texts, and
with filler of equal length. A PM's effect of the concept is its mean Δr over the twins, in SD(Δr) of that PM over the plain
pairs, because each PM has its own scale of rewards.

The move is tested against the bound, one-sided in the direction of the mean move, by sign flips per prompt. Two directions
could have been tried, so p counts twice. Holm's correction covers the concepts: if no concept moved beyond the bound, the
gate fails with a probability of at most :data:`LEVEL`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
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
from rmscope.statistics import Array, beyond_p, flip_matrix, holm, interval
from rmscope.studies.edit.patch import is_patch, load_edited
from rmscope.studies.edit.result import LEVEL, ConceptMove, GateResult
from rmscope.studies.edit.settings import GateConfig

TWINS = 64
"""Twins on which a concept is measured."""
SCALE_PAIRS = 168
"""Plain pairs that give SD(Δr), one per prompt."""
FEWEST = 8
"""With fewer prompts, sign flips cannot reject after a correction over some concepts."""


@dataclass(frozen=True, slots=True)
class ConceptDeltas:
    """A concept under one PM."""

    delta: Float[Array, " twins"]
    """Δr of each twin in SD(Δr) of the PM."""
    prompts: Sequence[str]
    """The prompt of each twin."""

    def by_prompt(self) -> Float[Array, " prompts"]:
        """Mean Δr of each prompt's twins."""
        _, index = np.unique(np.array(self.prompts), return_inverse=True)
        return np.bincount(index, self.delta) / np.bincount(index)


def analyse_gate(config: GateConfig, display: Display | None = None) -> GateResult:
    """Compares the concepts' effects under two PMs with the bound. The result's ``exit_code`` is 1 where one moved.

    1. Read the concepts and the plain pairs.
    2. Measure the concepts under the base PM, and under the new one: another PM, or the base PM with a patch.
    3. Test each move against the bound.

    Raises:
        InputError: the concepts or pairs cannot be read, the patch is of another PM, or the prompts are too few.
    """
    started, display = time.time(), display or NoDisplay()
    # 1. Concepts and pairs
    concepts = read_concepts(config.concepts)
    pairs = load_pairs(config.data, limit=config.limit) if config.data else plain_demo_pairs()[: config.limit]

    # 2. Both PMs
    def measure(model: str, patch: str | None) -> dict[str, ConceptDeltas]:
        rm = load_pm(model, config)
        if patch is not None:
            load_edited(rm, patch)
        with display.stage(patch or model) as progress:
            return measure_concepts(rm, concepts, pairs, config.seed, progress)

    base = measure(config.base, None)
    new = measure(config.base, config.new) if is_patch(config.new) else measure(config.new, None)
    # 3. Tests
    moves = concept_moves(base, new, config.bound, config.seed)
    moved = [m.concept for m in moves if m.moved]
    return GateResult(
        base=config.base,
        new=config.new,
        bound=config.bound,
        passed=not moved,
        moved=moved,
        concepts=moves,
        seconds=round(time.time() - started, 1),
    )


def read_concepts(path: Path | None) -> tuple[Plant, ...]:
    """The concepts of a YAML file: a list, each with a ``name`` and ``texts``, or with a ``kind`` as in a plants file.
    Without a file: the zoo's six cues.

    Raises:
        InputError: the file is missing or malformed, a concept does not fit, a name is used twice, or a phrase has no texts.
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
        raise InputError(f"{path} holds no list of concepts; write a list whose entries have a name and texts.")
    concepts = tuple(_concept(path, number, row) for number, row in enumerate(rows, 1))
    names = [c.name for c in concepts]
    if doubled := next((n for n in names if names.count(n) > 1), None):
        raise InputError(f"{path} names the concept {doubled} twice; give each concept its own name.")
    return concepts


def _concept(path: Path, number: int, row: Mapping[str, Any]) -> Plant:
    try:
        concept = Plant(**{"kind": "phrase", "sign": 1, **row})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(p) for p in first["loc"])
        raise InputError(f"Concept {number} in {path}: {where}: {first['msg'].lower()}; see plants.yaml.") from error
    if concept.kind == "phrase" and not concept.texts:
        raise InputError(f"Concept {number} in {path} ({concept.name}) has no texts; give the wordings of the concept.")
    return concept


def measure_concepts(
    rm: RewardModel, concepts: Sequence[Plant], pairs: Sequence[Pair], seed: int, progress: Progress = silent
) -> dict[str, ConceptDeltas]:
    """Each concept's Δr over its twins in SD(Δr) of this PM. The twins are the same for every PM."""
    plain = _rotate_within_prompts(pairs, SCALE_PAIRS)
    progress(0, len(concepts) + 1, "plain pairs")
    sd = float(rm.score(plain).delta.std())
    measured = {}
    for i, concept in enumerate(concepts):
        progress(i + 1, len(concepts) + 1, f"concept {concept.name}")
        texts = twins(pairs, concept, TWINS, seed, held_out=None)
        delta = rm.score(texts).delta.numpy().astype(float) / sd
        measured[concept.name] = ConceptDeltas(delta, [p.prompt_key for p in texts])
    progress(len(concepts) + 1, len(concepts) + 1, "")
    return measured


def _rotate_within_prompts(pairs: Sequence[Pair], most: int) -> list[Pair]:
    """At most ``most`` pairs, one per prompt: the first prompt's first pair, the second prompt's second pair, and so on.

    The demo orders a prompt's pairs by quality, so always taking the first would compare its two best responses only.
    """
    by_prompt: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_prompt.setdefault(pair.prompt_key, []).append(pair)
    return [rows[i % len(rows)] for i, rows in enumerate(by_prompt.values())][:most]


def concept_moves(
    base: Mapping[str, ConceptDeltas], new: Mapping[str, ConceptDeltas], bound: float, seed: int
) -> list[ConceptMove]:
    """The move of each concept, tested against a bound in SD(Δr).

    Raises:
        InputError: the prompts are too few to test.
    """
    tested = []
    for name, measured in base.items():
        before, after = measured.by_prompt(), new[name].by_prompt()
        if before.size < FEWEST:
            raise InputError(f"The concept {name} has twins on {before.size} prompts; give pairs with {FEWEST} or more.")
        tested.append((name, before, after, beyond_p(after - before, bound, flip_matrix(before.size, seed))))
    corrected = holm(np.array([p for *_, p in tested])).tolist()
    return [
        ConceptMove(
            concept=name,
            prompts=before.size,
            base=float(before.mean()),
            new=float(after.mean()),
            move=interval(after - before, unit="SD(Δr)"),
            p=p,
            holm=q,
            moved=q < LEVEL,
        )
        for (name, before, after, p), q in zip(tested, corrected, strict=True)
    ]

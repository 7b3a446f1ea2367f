"""Passages of responses, with the activation of a concept on each token.

A passage is a run of 24 tokens of a stored response. Passages of half of the prompts are shown to the language model; those
of the other half test it. The model is shown the strongest passages, and others evenly spaced over the rest. Detection asks
about passages that are evenly spaced in the order of their peaks, so weak ones are among them; fuzzing draws at random.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Int

from rmscope.activations.store import ActivationStore
from rmscope.ranking.concepts import Concept, concept_activations
from rmscope.run.inputs import evenly
from rmscope.sae.base import Sae
from rmscope.statistics import Array

LENGTH = 24
"""Tokens of a passage."""
MARKED = 0.3
"""A token is marked from this share of the passage's peak on."""
FIRES = 0.1
"""A passage counts as firing from this share of the concept's peak on. Those below it and above 0 are not used."""
OPEN, CLOSE = "⟦", "⟧"
"""What marks a token."""


@dataclass(frozen=True, slots=True)
class Passage:
    """The tokens of a passage, and the activation on each as a share of the concept's peak."""

    tokens: tuple[str, ...]
    levels: tuple[float, ...]

    @property
    def peak(self) -> float:
        return max(self.levels)

    @property
    def text(self) -> str:
        return on_one_line("".join(self.tokens))

    def marked(self, places: Sequence[int] | None = None) -> str:
        """The text with tokens marked: those of ``places``, or those on which the concept fires."""
        at = set(self.firing if places is None else places)
        return on_one_line(
            "".join(f"{OPEN}{t}{CLOSE}" if i in at else t for i, t in enumerate(self.tokens)).replace(CLOSE + OPEN, "")
        )

    @property
    def firing(self) -> list[int]:
        """The places of the tokens on which the concept fires."""
        return [i for i, level in enumerate(self.levels) if level > 0 and level >= MARKED * self.peak]


@dataclass(frozen=True, slots=True)
class ConceptPassages:
    """What a concept fires on and what it does not, of two halves of the prompts; firing ones by falling peak."""

    shown: list[Passage]
    firing: list[Passage]
    silent: list[Passage]


def on_one_line(text: str) -> str:
    """The text on one line."""
    return " ".join(text.split())


def concept_passages(
    store: ActivationStore, sae: Sae, concept: Concept, half: Callable[[int], bool], decode: Callable[[int], str]
) -> ConceptPassages:
    """The passages of the stored responses.

    ``half`` says of a pair's number in the store whether its passages may be shown to the language model; ``decode`` gives
    the text of a token.
    """
    rows, active = concept_activations(store, sae, concept)
    token, pair, region = (store.column(concept.site, name).numpy()[rows] for name in ("token", "pair", "region"))
    top = float(active.max()) if active.size else 0.0
    texts = {int(t): decode(int(t)) for t in np.unique(token)}
    shown, firing, silent = list[Passage](), list[Passage](), list[Passage]()
    for low, high in passage_bounds(pair, region):
        levels = active[low:high] / top if top > 0 else active[low:high]
        passage = Passage(tuple(texts[int(t)] for t in token[low:high]), tuple(levels.round(4).tolist()))
        if not passage.text:
            continue
        is_shown = half(int(pair[low]))
        if passage.peak >= FIRES:
            (shown if is_shown else firing).append(passage)
        elif passage.peak == 0 and not is_shown:
            silent.append(passage)
    for listed in (shown, firing):
        listed.sort(key=lambda passage: -passage.peak)
    seen = {passage.text for passage in shown}
    firing, silent = ([passage for passage in listed if passage.text not in seen] for listed in (firing, silent))
    return ConceptPassages(distinct(shown), distinct(firing), distinct(silent))


def passage_bounds(pair: Int[Array, " n"], region: Int[Array, " n"]) -> list[tuple[int, int]]:
    """(first, end) of each passage: every response is cut into runs of :data:`LENGTH` tokens."""
    if not pair.size:
        return []
    changes = np.flatnonzero((np.diff(pair) != 0) | (np.diff(region) != 0)) + 1
    bounds = []
    for low, high in pairwise([0, *changes.tolist(), pair.size]):
        bounds += [(at, min(at + LENGTH, high)) for at in range(low, high, LENGTH)]
    return bounds


def distinct(passages: Sequence[Passage]) -> list[Passage]:
    """Each text once: pairs that differ in a few words share passages."""
    first: dict[str, Passage] = {}
    for passage in passages:
        first.setdefault(passage.text, passage)
    return list(first.values())


def strongest_and_others(passages: Sequence[Passage], n: int) -> list[Passage]:
    """The strongest half of ``n`` passages, and as many at even distances over the others."""
    first = (n + 1) // 2
    return [*passages[:first], *evenly(passages[first:], n - first)]


def in_first_half(prompt_key: str) -> bool:
    """Splits prompts in two by their text, the same way in every run."""
    return hashlib.sha256(f"label {prompt_key}".encode()).digest()[0] % 2 == 0


def other_tokens(passage: Passage, rng: np.random.Generator) -> list[int]:
    """As many other tokens of a passage as the concept fires on; fewer where there are not so many."""
    firing = passage.firing
    others = [i for i, level in enumerate(passage.levels) if level == 0 and passage.tokens[i].strip()]
    return sorted(rng.permutation(others)[: len(firing)].tolist())

"""Names without a language model: the words, positions and repetitions that a concept singles out.

Each token of a response belongs to a word, and its context is the last words up to it. N-grams of one to three words are
scored by how much more often they are in the contexts on which the concept fires than in all others: the log-odds ratio with
an informative prior, in SD (Monroe, Colaresi and Quinn 2008, "Fightin' Words", section 3.5). The best n-grams that together
cover most of the activation are the name. Where a position, a link or a repetition covers more than words do, that is the
name. A concept named by a position or by punctuation is *form*, and all others are *content*.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Float, Int

from rmscope.statistics import Array

CONTEXT = 6
"""Words of a context."""
TERMS = 3
"""N-grams of a name, at most."""
LEAST, ENOUGH = 0.15, 0.7
"""An n-gram must cover this share of the activation; more of them are added until they cover so much."""
COMMON = 0.05
"""A single word in more of all contexts than this (the, and, is) names nothing."""
PRIOR = 0.05
"""Occurrences of an n-gram, per occurrence in all contexts, that the prior adds."""
CLEAR = 0.5
"""A position, a link or a repetition names a concept from this share of its activation on."""
WITH_WORDS = 0.4
"""Where a position covers most, words are told too if they cover this share of the activation."""
ENDS = "ends of sentences"
REPEATED_TOKENS = 4
"""Tokens in a row that make a repetition."""
LINK = re.compile(r"https?|www|\.(com|org|net|io)\b|://")


@dataclass(frozen=True, slots=True)
class Name:
    """A name, the share of the activation that it covers, and whether it is of form or of content."""

    text: str
    covers: float
    form: bool


class WordIndex:
    """The words, repetitions and positions of the responses in a store."""

    def __init__(
        self, token: Int[Array, " n"], response: Int[Array, " n"], decode: Callable[[int], str], special: Sequence[int]
    ) -> None:
        """``token`` and ``response`` (its number) of each row, in order."""
        pieces = {int(t): decode(int(t)) for t in np.unique(token)}
        marks = {t for t, piece in pieces.items() if re.fullmatch(r"\s*<[^<>\s]+>\s*", piece)}
        self.special = np.isin(token, list(marks.union(special)))
        self.text = ["" if is_special else pieces[int(t)] for t, is_special in zip(token, self.special, strict=True)]
        starts = np.flatnonzero(np.r_[True, response[1:] != response[:-1]])
        self.bounds = list(pairwise([*starts.tolist(), len(token)]))
        self.repeats = self._repeats(token)
        self.grams = self._contexts()
        self.total = Counter(g for row in self.grams for g in row)

    def _repeats(self, token: Array) -> Array:
        """Whether the last four tokens were in the response before."""
        out = np.zeros(len(token), dtype=bool)
        for low, high in self.bounds:
            seen: set[tuple[int, ...]] = set()
            ids = token[low:high].tolist()
            for i in range(REPEATED_TOKENS, len(ids) + 1):
                gram = tuple(ids[i - REPEATED_TOKENS : i])
                out[low + i - 1] = gram in seen
                seen.add(gram)
        return out

    def _contexts(self) -> list[frozenset[tuple[str, ...]]]:
        """The n-grams of the last words up to each token."""
        rows: list[frozenset[tuple[str, ...]]] = []
        for low, high in self.bounds:
            words: list[str] = []
            for i in range(low, high):
                piece = self.text[i]
                word = re.sub(r"[^\w']", "", piece).lower()
                if word and (piece[:1].isspace() or not words or not self.text[i - 1][-1:].isalnum()):
                    words.append(word)
                elif word and words:
                    words[-1] += word
                last = words[-CONTEXT:]
                grams = {tuple(last[a : a + n]) for n in (1, 2, 3) for a in range(len(last) - n + 1)}
                rows.append(frozenset(grams))
        return rows

    def name(self, activation: Float[Array, " n"]) -> Name:
        """The name of what fires with ``activation`` on each row."""
        fires = np.flatnonzero(activation > 0)
        if not fires.size:
            return Name("silent", 0.0, True)
        mass = activation / activation.sum()
        places = self._places(mass)
        words, covered = self._words(fires, mass)
        best, share = max(places.items(), key=lambda item: item[1][0], default=("", (0.0, True)))
        told = " · ".join(f"“{' '.join(gram)}”" for gram in words)
        if share[0] >= CLEAR:
            if share[1] and covered >= WITH_WORDS:
                return Name(f"sentences with {told}" if best == ENDS else f"{told}, {best}", covered, False)
            if share[0] >= covered:
                return Name(best, share[0], share[1])
        return Name(told, covered, False) if words else Name(best or "no single word", share[0], True)

    def _places(self, mass: Array) -> dict[str, tuple[float, bool]]:
        """The share of the activation on each kind of place, and whether that kind is form."""
        last = np.zeros(len(mass), dtype=bool)
        first = np.zeros(len(mass), dtype=bool)
        for low, high in self.bounds:
            first[low : low + 2] = True
            last[max(low, high - 2) : high] = True
        kinds: dict[str, tuple[Array, bool]] = {
            "repeated text": (self.repeats, False),
            "links": (np.array([bool(LINK.search(t.lower())) for t in self.text]), False),
            "the end of the text": (self.special | last, True),
            "the first words": (first, True),
            ENDS: (np.array([bool(re.search(r"[.!?]\s*$", t)) for t in self.text]), True),
            "commas and dashes": (np.array([bool(re.fullmatch(r"\s*[,;:—–-]+\s*", t)) for t in self.text]), True),
            "line breaks": (np.array(["\n" in t for t in self.text]), True),
        }
        return {name: (float(mass[at].sum()), form) for name, (at, form) in kinds.items()}

    def _words(self, fires: Array, mass: Array) -> tuple[list[tuple[str, ...]], float]:
        """(the n-grams of the name, the share of the activation that they cover)."""
        weight = mass / mass.max()
        inside: dict[tuple[str, ...], float] = defaultdict(float)
        for i in fires:
            for gram in self.grams[i]:
                inside[gram] += weight[i]
        n_in, n_all = float(weight.sum()), float(len(mass))
        left = {int(i) for i in fires}
        chosen: list[tuple[str, ...]] = []
        covered = 0.0
        scores = {
            gram: self._log_odds(y, self.total[gram], n_in, n_all)
            for gram, y in inside.items()
            if y >= LEAST * n_in / 2 and (len(gram) > 1 or self.total[gram] <= COMMON * n_all)
        }
        while len(chosen) < TERMS and covered < ENOUGH:
            best, gain = None, 0.0
            for gram, z in scores.items():
                if z <= 0 or any(set(gram) & set(other) for other in chosen):
                    continue
                share = sum(mass[i] for i in left if gram in self.grams[i])
                if share >= LEAST and (value := share * z * len(gram) ** 0.5) > gain:
                    best, gain = gram, value
            if best is None:
                break
            chosen.append(best)
            covered += sum(mass[i] for i in left if best in self.grams[i])
            left = {i for i in left if best not in self.grams[i]}
        return chosen, float(covered)

    def _log_odds(self, inside: float, everywhere: float, n_in: float, n_all: float) -> float:
        """The log-odds ratio of an n-gram in the contexts that fire against the others, in SD."""
        prior, n_prior = PRIOR * everywhere, PRIOR * n_all
        outside, n_out = max(everywhere - inside, 0.0), max(n_all - n_in, 1.0)
        a, b = inside + prior, outside + prior
        odds = np.log(a / max(n_in + n_prior - a, 1e-9)) - np.log(b / max(n_out + n_prior - b, 1e-9))
        return float(odds / (1 / a + 1 / b) ** 0.5)

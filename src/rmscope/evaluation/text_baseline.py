"""What text statistics alone explain of the reward difference: words, phrases and simple style, without an SAE.

Each statistic gives a response a number φ: 1 where it holds a phrase of one to four words, or a count such as that of its
words. Δr is fitted by a few of them, Δr^ = Σ_i c_i (φ_i chosen - φ_i rejected), without an intercept: so the fit is the same
whichever side is called chosen. Terms are chosen one after the other by orthogonal matching pursuit (Pati, Rezaiifar and
Krishnaprasad 1993), and their number by cross-validation over prompts. A claim about features has to add to what this
explains of fresh pairs.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict
from scipy.sparse import csc_array

from rmscope.pairs.pair import Pair
from rmscope.statistics import Array

LONGEST = 4
"""Words of a phrase."""
MOST = 30
"""Terms of a baseline, at most."""
LEAST_PROMPTS = 10
"""A statistic must differ between the sides on pairs of this many prompts."""
FOLDS = 5
WORD = re.compile(r"\w+(?:['’]\w+)*")
SENTENCE = re.compile(r"(?<=[.!?])\s+")


def _repeated_sentences(text: str) -> float:
    counts = Counter(s.strip().lower() for s in SENTENCE.split(text) if len(WORD.findall(s)) > 2)
    return float(sum(n - 1 for n in counts.values()))


def _count(pattern: str) -> Callable[[str], float]:
    compiled = re.compile(pattern, re.MULTILINE)
    return lambda text: float(len(compiled.findall(text)))


STYLE: dict[str, Callable[[str], float]] = {
    "words": lambda text: float(len(WORD.findall(text))),
    "sentences": lambda text: float(len(SENTENCE.split(text.strip()))),
    "repeated sentences": _repeated_sentences,
    "links": _count(r"https?://|www\."),
    "words in capitals": _count(r"\b[A-Z]{2,}\b"),
    "exclamation marks": _count(r"!"),
    "question marks": _count(r"\?"),
    "commas": _count(r","),
    "numbers": _count(r"\b\d+\b"),
    "line breaks": _count(r"\n"),
    "list items": _count(r"^\s*(?:[-*•]|\d+[.)])\s"),
    "bold or headings": _count(r"\*\*[^*\n]+\*\*|^#+\s"),
    "an open end": lambda text: float(not re.search(r"[.!?\"'”)\]]\s*$", text)),
}
"""Simple style, by name."""


class Term(BaseModel):
    """A term of a baseline."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    """A phrase in quotes, or a name of :data:`STYLE`."""
    coefficient: float
    """Reward per unit of its statistic."""
    prompts: int
    """Prompts of the pairs on which it was fitted where it differs between the sides."""

    def value(self, text: str) -> float:
        """Its statistic of a response."""
        return STYLE[self.name](text) if self.name in STYLE else float(_unquoted(self.name) in phrases(text))


class TextBaseline(BaseModel):
    """A fitted baseline. Its terms are in the order in which they were chosen."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    terms: list[Term]

    def predict(self, pairs: Sequence[Pair]) -> Float[Array, " pairs"]:
        """Δr^ of each pair."""
        return np.array([sum(t.coefficient * (t.value(p.chosen) - t.value(p.rejected)) for t in self.terms) for p in pairs])


def phrases(text: str) -> set[tuple[str, ...]]:
    """The phrases of one to four words in a text, in lower case."""
    words = [word.lower() for word in WORD.findall(text)]
    return {tuple(words[i : i + n]) for n in range(1, LONGEST + 1) for i in range(len(words) - n + 1)}


def _quoted(phrase: tuple[str, ...]) -> str:
    return f"“{' '.join(phrase)}”"


def _unquoted(name: str) -> tuple[str, ...]:
    return tuple(name[1:-1].split(" "))


def fit_text_baseline(pairs: Sequence[Pair], delta: Float[Array, " pairs"]) -> TextBaseline:
    """The baseline of some pairs and their Δr; without terms where nothing helps on other prompts."""
    prompts = np.unique([p.prompt_key for p in pairs], return_inverse=True)[1]
    names, columns, support = _statistics(pairs, prompts)
    if not names:
        return TextBaseline(terms=[])
    folds = np.random.default_rng(0).permutation(prompts.max() + 1)[prompts] % FOLDS
    left = np.stack([_held_out(columns, delta, folds == fold) for fold in np.unique(folds)]).sum(0)
    chosen, coefficients = _pursue(columns, delta, int(left.argmin()))
    ordered = zip(chosen, coefficients, strict=True)
    return TextBaseline(terms=[Term(name=names[j], coefficient=float(c), prompts=support[j]) for j, c in ordered])


def _statistics(pairs: Sequence[Pair], prompts: Array) -> tuple[list[str], csc_array, list[int]]:
    """(names, φ chosen - φ rejected as columns, the prompts on which each differs). Longer phrases come first: where two
    differ on the same pairs, the longer one is told."""
    differs: dict[tuple[str, ...], dict[int, float]] = defaultdict(dict)
    for i, pair in enumerate(pairs):
        chosen, rejected = phrases(pair.chosen), phrases(pair.rejected)
        for phrase in chosen ^ rejected:
            differs[phrase][i] = 1.0 if phrase in chosen else -1.0
    columns: list[tuple[str, dict[int, float]]] = [
        (_quoted(phrase), differs[phrase]) for phrase in sorted(differs, key=lambda g: (-len(g), g))
    ]
    for name, value in STYLE.items():
        difference = {i: value(p.chosen) - value(p.rejected) for i, p in enumerate(pairs)}
        columns.append((name, {i: d for i, d in difference.items() if d}))
    support = [len({int(prompts[i]) for i in rows}) if len(rows) >= LEAST_PROMPTS else 0 for _, rows in columns]
    kept = [k for k, n in enumerate(support) if n >= LEAST_PROMPTS]
    ends = np.cumsum([0, *(len(columns[k][1]) for k in kept)])
    rows = np.fromiter((i for k in kept for i in columns[k][1]), dtype=np.int64, count=int(ends[-1]))
    values = np.fromiter((d for k in kept for d in columns[k][1].values()), dtype=np.float64, count=int(ends[-1]))
    matrix = csc_array((values, rows, ends), shape=(len(pairs), len(kept)))
    return [columns[k][0] for k in kept], matrix, [support[k] for k in kept]


def _held_out(columns: csc_array, delta: Array, out: Array) -> Float[Array, " sizes"]:
    """Σ(Δr - Δr^)² on the pairs ``out`` with 0, 1, ... terms chosen and fitted on the others."""
    inside, outside = columns[np.flatnonzero(~out)], columns[np.flatnonzero(out)]
    chosen, _ = _pursue(csc_array(inside), delta[~out], MOST)
    left = [float((delta[out] ** 2).sum())]
    for size in range(1, MOST + 1):
        used = chosen[:size]
        coefficients = _fit(inside[:, used].toarray(), delta[~out])
        left.append(float(((delta[out] - outside[:, used].toarray() @ coefficients) ** 2).sum()))
    return np.array(left)


def _pursue(columns: csc_array, delta: Array, size: int) -> tuple[list[int], Array]:
    """(the columns chosen by orthogonal matching pursuit, their coefficients)."""
    norms = np.sqrt((columns**2).sum(0))
    chosen: list[int] = []
    coefficients, rest = np.zeros(0), delta.astype(float)
    for _ in range(min(size, columns.shape[1])):
        along = np.abs(columns.T @ rest) / np.where(norms > 0, norms, np.inf)
        along[chosen] = -1.0
        if along.max() <= 0:
            break
        chosen.append(int(along.argmax()))
        used = columns[:, chosen].toarray()
        coefficients = _fit(used, delta)
        rest = delta - used @ coefficients
    return chosen, coefficients


def _fit(used: Float[Array, "pairs terms"], delta: Float[Array, " pairs"]) -> Float[Array, " terms"]:
    return np.linalg.lstsq(used, delta, rcond=None)[0]


def added_by(
    delta: Float[Array, " pairs"],
    known: Float[Array, "pairs a"],
    more: Float[Array, "pairs b"],
    prompts: Array,
) -> tuple[Float[Array, " pairs"], Float[Array, " pairs"]]:
    """(Δr^ from ``known``, Δr^ from ``known`` and ``more``), each pair's by a fit on the pairs of other prompts."""
    groups = np.unique(prompts, return_inverse=True)[1]
    folds = np.random.default_rng(0).permutation(groups.max() + 1)[groups] % FOLDS
    predictions = []
    for columns in (known, np.hstack([known, more])):
        hat = np.zeros(len(delta))
        for fold in np.unique(folds):
            out = folds == fold
            hat[out] = columns[out] @ _fit(columns[~out], delta[~out])
        predictions.append(hat)
    return predictions[0], predictions[1]


def detects(term: Term, with_cue: Sequence[str], without: Sequence[str]) -> float:
    """F1 of "the statistic is larger than on the same response without the cue" over twins of responses."""
    larger = [term.value(a) > term.value(b) for a, b in zip(with_cue, without, strict=True)]
    smaller = [term.value(a) < term.value(b) for a, b in zip(with_cue, without, strict=True)]
    hits, false = sum(larger), sum(smaller)
    return 2 * hits / max(1, hits + false + len(larger))

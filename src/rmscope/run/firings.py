"""Where the features of a site fire: rates, a histogram, and stored texts with the activation on every token.

A text is a stretch of stored rows: a prompt, or a response from where it first differs from the other one. A feature's
texts are chosen as SAEDashboard chooses them: those of its largest activations, and some from each of five intervals between
0 and its maximum. The first token of a prompt is often an attention sink and counts as silent.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from rmscope.activations.store import ActivationStore
from rmscope.run.inputs import evenly
from rmscope.sae.base import Sae
from rmscope.sae.stored import active_entries
from rmscope.statistics import Array

BEFORE, AFTER = 63, 32
"""Tokens that are shown on either side of the peak, where the text has them."""
TOP = 10
"""Texts of the largest activations."""
INTERVALS, PER_INTERVAL = 5, 3
BARS = 20
"""Bars of the histogram."""
TOP_BIN = (-1.0, -1.0)
"""What SAEDashboard writes as the lower end and the share of the texts of largest activations."""


@dataclass(frozen=True, slots=True)
class FiringText:
    """A part of a stored text around the largest activation of a feature in it."""

    rows: Int[Array, " n"]
    """The rows of the store."""
    values: Float[Array, " n"]
    """The activation on each token."""
    low: float
    high: float
    """The ends of the interval that the text stands for; low is -1 for the texts of largest activations."""
    share: float
    """The share of stored tokens on which the activation is in that interval; -1 for the texts of largest activations."""

    @property
    def peak(self) -> int:
        """The place of the largest activation."""
        return int(self.values.argmax())


class SiteFirings:
    """The active entries of a site over its stored rows, read once and sorted by feature, then by row."""

    def __init__(self, store: ActivationStore, sae: Sae, site: str, most: int | None = None) -> None:
        """``most`` bounds the tokens that are read: every so many texts are taken, whole."""
        pair, region = (store.column(site, name).numpy() for name in ("pair", "region"))
        first = np.r_[True, (np.diff(pair) != 0) | (np.diff(region) != 0)]
        self._text = np.cumsum(first) - 1
        self.stride = 1 if most is None else max(1, -(-pair.size // most))
        """One of so many texts was read."""
        keep = np.flatnonzero((store.column(site, "position").numpy() > 0) & (self._text % self.stride == 0))
        parts = [(keep[place], feature, value) for place, feature, value in active_entries(store, sae, site, keep)]
        row, feature, value = (np.concatenate(each) for each in zip(*parts, strict=True))
        order = np.lexsort((row, feature))
        self.tokens, self._token = keep.size, store.column(site, "token").numpy()
        """The tokens that were read, without the first of each prompt."""
        self._row, self._value = row[order], value[order].astype(float)
        self._starts = np.searchsorted(feature[order], np.arange(sae.m + 1))
        self._first = np.flatnonzero(first)
        self._end = np.r_[self._first[1:], pair.size]
        self._matrix: tuple[sparse.csc_matrix, Array, Array] | None = None

    @property
    def texts(self) -> int:
        """Stored texts."""
        return self._first.size

    def features(self) -> list[int]:
        """The features that fire."""
        return np.flatnonzero(np.diff(self._starts)).tolist()

    def of(self, feature: int) -> tuple[Int[Array, " n"], Float[Array, " n"]]:
        """(rows on which a feature fires, its activations there)."""
        own = slice(self._starts[feature], self._starts[feature + 1])
        return self._row[own], self._value[own]

    def rate(self, feature: int) -> float:
        """The share of stored tokens on which a feature fires."""
        return self.of(feature)[0].size / self.tokens

    def token_ids(self, rows: Int[Array, " n"]) -> Int[Array, " n"]:
        """The token of each stored row."""
        return self._token[rows]

    def token_sums(self, feature: int) -> dict[int, float]:
        """The feature's activation summed over the stored tokens with each token id."""
        rows, values = self.of(feature)
        sums = np.bincount(self._token[rows], values)
        return {int(token): float(sums[token]) for token in np.flatnonzero(sums)}

    def correlations(self, feature: int) -> Float[Array, " m"]:
        """Pearson's r of each feature's activation with that of one feature, over the stored tokens; 0 for silent ones."""
        if self._matrix is None:
            shape = (self._text.size, self._starts.size - 1)
            matrix = sparse.csc_matrix((self._value, self._row, self._starts), shape=shape)
            sums, squares = (np.asarray(m.sum(0)).ravel() for m in (matrix, matrix.multiply(matrix)))
            self._matrix = matrix, sums, squares - sums**2 / self.tokens
        matrix, sums, spread = self._matrix
        own = np.zeros(matrix.shape[0])
        rows, values = self.of(feature)
        own[rows] = values
        covariance = matrix.T @ own - sums * values.sum() / self.tokens
        scale = np.sqrt(spread * spread[feature])
        return np.divide(covariance, scale, out=np.zeros_like(covariance), where=scale > 0)

    def histogram(self, feature: int) -> tuple[list[float], list[int]]:
        """(middle of each bar, tokens in it) of the activations above 0; nothing for a silent feature."""
        _, values = self.of(feature)
        if not values.size:
            return [], []
        counts, edges = np.histogram(values, bins=BARS, range=(0.0, values.max()))
        return ((edges[:-1] + edges[1:]) / 2).tolist(), counts.tolist()

    def firing_texts(self, feature: int) -> list[FiringText]:
        """The feature's texts of largest activations, then some of each interval, the highest interval first."""
        rows, values = self.of(feature)
        if not rows.size:
            return []
        text = self._text[rows]
        begins = np.flatnonzero(np.r_[True, np.diff(text) != 0])
        ends = np.r_[begins[1:], rows.size]
        peaks = np.array([low + values[low:high].argmax() for low, high in zip(begins, ends, strict=True)])
        ordered = peaks[np.argsort(-values[peaks], kind="stable")]
        top, rest = ordered[:TOP], ordered[TOP:]
        chosen = [self._around(rows, values, at, TOP_BIN[0], values.max(), TOP_BIN[1]) for at in top]
        edges = np.linspace(0, values.max(), INTERVALS + 1)
        for low, high in reversed(list(pairwise(edges.tolist()))):
            share = ((values > low) & (values <= high)).sum() / self.tokens
            inside = rest[(values[rest] > low) & (values[rest] <= high)]
            chosen += [self._around(rows, values, at, low, high, share) for at in evenly(inside.tolist(), PER_INTERVAL)]
        return chosen

    def _around(
        self, rows: Int[Array, " n"], values: Float[Array, " n"], at: int, low: float, high: float, share: float
    ) -> FiringText:
        """The text around an active entry."""
        row = rows[at]
        text = self._text[row]
        shown = np.arange(max(self._first[text], row - BEFORE), min(self._end[text], row + AFTER + 1))
        inside = slice(*np.searchsorted(rows, [shown[0], shown[-1] + 1]))
        level = np.zeros(shown.size)
        level[rows[inside] - shown[0]] = values[inside]
        return FiringText(shown, level, float(low), float(high), float(share))

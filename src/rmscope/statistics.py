"""Statistics: figures with their 95 % interval, bootstrap by prompt, weighted rank correlation, tests of means, FDR."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Float

FLIPS = 10_000
RESAMPLES = 1_000
FEW = 8
"""Fewer values than this have no studentised bootstrap."""
Array = np.ndarray


@dataclass(frozen=True, slots=True)
class Figure:
    """A value with its 95 % interval. All three are None where there was nothing to measure."""

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    """How many prompts (or hits and misses) it rests on."""
    unit: str = ""
    """Empty for a share or another number without a unit."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def scaled(self, factor: float, unit: str = "") -> Figure:
        """The figure in another unit; a negative factor turns the interval around."""
        if self.value is None or self.low is None or self.high is None:
            return Figure(None, None, None, self.n, unit)
        low, high = sorted((factor * self.low, factor * self.high))
        return Figure(factor * self.value, low, high, self.n, unit)


NOTHING = Figure(None, None, None, 0)
"""The figure of no measurement."""


def interval(
    values: Array | Sequence[float],
    prompts: Array | Sequence[Any] | None = None,
    statistic: Callable[[Array], float] | None = None,
    unit: str = "",
    seed: int = 0,
) -> Figure:
    """The mean of ``values`` [n], or another ``statistic`` of [n, ...], with its 95 % bootstrap interval.

    Whole prompts are resampled: ``prompts`` [n] names each value's prompt; left out, each value has its own.
    """
    rows = np.asarray(values, dtype=float)
    if not len(rows):
        return NOTHING
    if prompts is None and statistic is None:
        return Figure(float(rows.mean()), *mean_interval(rows, seed), len(rows), unit)
    groups = np.arange(len(rows)) if prompts is None else np.asarray(prompts)
    value = statistic or (lambda v: float(v.mean()))
    return Figure(float(value(rows)), *bootstrap(rows, groups, value, seed), len(np.unique(groups)), unit)


def ratio(part: Array, whole: Array, prompts: Array | Sequence[Any], unit: str = "") -> Figure:
    """Σ part / Σ whole [n] with its 95 % interval, resampling whole prompts; nan where ``whole`` sums to 0."""
    total, groups = whole.sum(), np.asarray(prompts)
    value = float(part.sum() / total) if total else float("nan")
    return Figure(value, *ratio_interval(part, whole, groups), len(np.unique(groups)), unit)


def one_minus(part: Array, whole: Array, prompts: Array | Sequence[Any]) -> Figure:
    """1 - Σ part / Σ whole [n] with its 95 % interval, resampling whole prompts."""
    r = ratio(part, whole, prompts)
    value, low, high = (1 - float(v) for v in (r.value, r.high, r.low))  # type: ignore[arg-type]
    return Figure(value, low, high, r.n)


def share(hits: int, n: int) -> Figure:
    """``hits`` of ``n`` with the exact 95 % interval (Clopper and Pearson 1934); value None and (0, 1) where n is 0."""
    return Figure(hits / n if n else None, *share_interval(hits, n), n)


def weighted_spearman(a: Array, b: Array, weights: Array) -> float:
    """Spearman of a and b where item i stands for ``weights[i]`` items of the population; nan where one is constant."""
    ra, rb = _weighted_ranks(a, weights), _weighted_ranks(b, weights)
    w = weights / weights.sum()
    ra, rb = ra - w @ ra, rb - w @ rb
    spread = np.sqrt((w @ ra**2) * (w @ rb**2))
    return float((w * ra) @ rb / spread) if spread > 0 else float("nan")


def _weighted_ranks(values: Array, weights: Array) -> Array:
    """The mean rank each item has when it is repeated by its weight; ties share theirs."""
    order = np.argsort(values, kind="stable")
    v, w = values[order], weights[order]
    starts = np.r_[True, v[1:] != v[:-1]]
    group = np.cumsum(starts) - 1
    total = np.bincount(group, w)
    middle = np.cumsum(total) - total / 2
    ranks = np.empty_like(values, dtype=float)
    ranks[order] = middle[group]
    return ranks


def bootstrap(values: Array, groups: Array, statistic: Callable[[Array], float], seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of a statistic of ``values`` [n, ...], resampling whole groups (prompts)."""
    rng = np.random.default_rng(seed)
    _, index = np.unique(groups, return_inverse=True)
    members = [np.flatnonzero(index == g) for g in range(index.max() + 1)]
    draws = [
        statistic(values[np.concatenate([members[g] for g in rng.integers(0, len(members), len(members))])])
        for _ in range(RESAMPLES)
    ]
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return float(low), float(high)


def accuracy(delta: Array, longer: Array, prompts: Array) -> tuple[Figure, float]:
    """(share of pairs [n] with Δr > 0, ties counting half; what length alone reaches).

    ``longer`` is the difference of the sides' lengths. Length alone is the better of "longer wins" and "shorter wins".
    """
    hits, wins = ((v > 0) + 0.5 * (v == 0) for v in (delta, longer))
    longer_wins = float(wins.mean())
    return interval(hits, prompts), max(longer_wins, 1 - longer_wins)


def ratio_interval(part: Array, whole: Array, groups: Array, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of Σ part / Σ whole [n], resampling whole groups (prompts); nan where whole sums to 0."""
    _, index = np.unique(groups, return_inverse=True)
    n = int(index.max()) + 1
    sums = np.stack([np.bincount(index, values, n) for values in (part, whole)], 1)
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), RESAMPLES) @ sums
    ratios = np.divide(draws[:, 0], draws[:, 1], out=np.full(RESAMPLES, np.nan), where=draws[:, 1] != 0)
    if np.isnan(ratios).all():
        return float("nan"), float("nan")
    low, high = np.nanpercentile(ratios, [2.5, 97.5])
    return float(low), float(high)


def mean_interval(values: Array, seed: int = 0) -> tuple[float, float]:
    """95 % interval of a mean, one value a prompt, by the studentised bootstrap (Efron and Tibshirani 1993, section 12.5).

    Of skewed effects on 24 prompts a percentile interval covers the mean less often. With fewer than :data:`FEW` values
    it is a percentile interval: their resampled standard errors can be 0. The interval stays within the range of the values:
    where all but one are nearly equal, resampled errors are nearly 0, and its ends would be anywhere.
    """
    mean, error = float(values.mean()), standard_error(values)
    if values.size < FEW or error == 0:
        means = values[np.random.default_rng(seed).integers(0, values.size, (RESAMPLES, values.size))].mean(1)
        low, high = np.percentile(means, [2.5, 97.5])
        return float(low), float(high)
    low, high = np.percentile(studentised_draws(values, seed), [2.5, 97.5])
    return max(mean - float(high) * error, float(values.min())), min(mean - float(low) * error, float(values.max()))


def standard_error(values: Array) -> float:
    """That of the mean; 0 for values that are all the same."""
    return float(values.std(ddof=1)) / values.size**0.5 if values.size > 1 and np.ptp(values) > 0 else 0.0


def studentised_draws(values: Array, seed: int = 0) -> Float[Array, " resamples"]:
    """(mean of a resample - mean) / the resample's standard error. Resamples of one repeated value are left out."""
    n, weights = values.size, _resamples(values.size, seed)
    means = weights @ values / n
    variances = weights @ values**2 / n - means**2
    spread = variances > 1e-12 * values.var()
    return (means[spread] - values.mean()) / np.sqrt(variances[spread] / (n - 1))


@lru_cache(maxsize=32)
def _resamples(n: int, seed: int) -> Float[Array, "resamples n"]:
    """How often each of n values is drawn in each resample."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), FLIPS).astype(np.float64)


def studentised_p(values: Array, seed: int = 0) -> float:
    """One-sided p of mean(values) > 0 by the studentised bootstrap, one value a prompt.

    It holds for skewed values, of which sign flips assume that they are symmetric. 1 for fewer than :data:`FEW` values.
    """
    if values.size < FEW:
        return 1.0
    if not (error := standard_error(values)):
        return 1.0 if values.mean() <= 0 else 1 / (1 + FLIPS)
    draws = studentised_draws(values, seed)
    return float((1 + (draws >= values.mean() / error).sum()) / (1 + len(draws)))


def share_interval(hits: int, n: int) -> tuple[float, float]:
    """95 % interval of a share ``hits`` of ``n``, exact (Clopper and Pearson 1934); (0, 1) where n is 0."""
    if n == 0:
        return 0.0, 1.0
    from scipy import stats  # takes half a second: only what needs it pays

    found = stats.binomtest(hits, n).proportion_ci(0.95, "exact")
    return float(found.low), float(found.high)


def flip_matrix(prompts: int, seed: int) -> Array:
    """Signs [FLIPS, prompts]: the same flips serve every feature, so that their tests are dependent as their data are."""
    return np.random.default_rng(seed).integers(0, 2, (FLIPS, prompts)).astype(np.int8) * 2 - 1


def sign_flip_p(values: Array, signs: Array) -> float:
    """One-sided p of mean(values) > 0 under sign flips, one value a prompt; the observed signs count as one flip."""
    flipped = signs @ values
    return float((1 + (flipped >= values.sum() - 1e-12).sum()) / (1 + len(flipped)))


def beyond_p(values: Array, bound: float, signs: Array) -> float:
    """p of |mean(values)| > bound by sign flips, tested in the direction in which the mean lies, one value a prompt.

    Two directions could have been tried, so p counts twice.
    """
    return min(1.0, 2 * sign_flip_p(np.sign(values.mean()) * values - bound, signs))


def benjamini_hochberg(p: Array) -> Array:
    """q-values of a list of p-values."""
    from scipy import stats

    return np.asarray(stats.false_discovery_control(p)) if p.size else p


def q_values_of(p: Array, family: Array) -> Array:
    """The q at which each p would just be rejected, in a family of p-values that Benjamini and Hochberg's rule controls."""
    ordered = np.sort(family)
    adjusted = np.minimum.accumulate((ordered * family.size / np.arange(1, family.size + 1))[::-1])[::-1]
    place = np.searchsorted(ordered, p, side="left")
    return np.where(place < family.size, np.r_[np.minimum(adjusted, 1.0), 1.0][place], 1.0)


def correlation(a: Array, b: Array) -> float:
    """Pearson correlation, 0 where one of the two does not vary."""
    if a.size < 3 or a.std() == 0 or b.std() == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def partial_correlation(a: Array, b: Array, given: Array) -> float:
    """Pearson correlation of what is left of a and b after a straight line in ``given``; 0 where nothing is left."""
    if a.size < 4:
        return 0.0
    line = np.stack([np.ones_like(given), given], axis=1)
    rest = [v - line @ np.linalg.lstsq(line, v, rcond=None)[0] for v in (a, b)]
    still = [
        np.where(np.abs(r).max() > 1e-9 * max(1e-12, np.abs(v).max()), r, 0.0) for r, v in zip(rest, (a, b), strict=True)
    ]
    return correlation(*still)


def holm(p: Array) -> Array:
    """Holm's p-values: rejecting those below a level keeps the chance of any false rejection below it."""
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1))
    out = np.empty_like(p)
    out[order] = np.minimum(stepped, 1.0)
    return out

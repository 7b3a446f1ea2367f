"""Estimates against exact ablation on every active feature of held-out pairs, at an early, a middle and a late site.

usage: RMSCOPE_DATA=DIR screen.py --cache DIR [--pairs 10] [--models zoo:hh zoo:planted]

float32, all active features of both sides. Prints one JSON line per PM, site and estimator. ``spearman``: within a response,
median over responses. ``spearman_large``, ``sign_large``: among features with |R| > .01 SD(Δr). ``missed``: share of a
response's true top tenth that the estimate's top tenth misses. ``missed_expected``: the same as a run estimates it from 48
sampled features per response (mean over 20 samplings; ``missed_high`` is the mean of its upper bounds).
``joint, zero, 4`` is the reference study's estimate: a joint path from the zero baseline, 4 steps.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import polars as pl
from pms import StudiedPm, arguments, emit, load_studied_pm
from scipy.stats import spearmanr

from rmscope.effects.gradients import METHODS, estimate
from rmscope.effects.ledger import Path as StraightPath
from rmscope.effects.requests import ablations
from rmscope.model.rendering import PairTokens
from rmscope.pairs.pair import SIDES
from rmscope.ranking.estimate_quality import PER_RESPONSE, estimate_quality, sample

SAMPLINGS = 20
Key = tuple[str, int, str]
"""Site, pair, side."""


def reference(s: StudiedPm, site: str, tokens: list[PairTokens]) -> Iterator[tuple[Key, dict[int, float]]]:
    """The joint path from the zero baseline in 4 equal steps (midpoints)."""
    sae = s.saes[site]
    for batch in s.rm.batches(tokens):
        path = StraightPath(s.rm, site, batch, sae.b_dec)
        gradient = sum(path.gradient(share) for share in (0.125, 0.375, 0.625, 0.875)) / 4
        for text in batch.texts:
            at = text.span
            active = sae.active(path.x[text.row, at])
            effect = active.value * (gradient[text.row, at][active.token] * sae.W_dec[active.feature]).sum(-1)
            sums = np.bincount(active.feature.numpy(), effect.numpy(), sae.m)
            yield (site, text.pair, text.side), {int(j): float(sums[j]) for j in active.feature.unique()}


def figures(rows: pl.DataFrame, sd: float) -> dict[str, float]:
    """Agreement of ``estimate`` with ``effect`` (exact): all features of each response."""
    within, large, missed, signs = [], [], [], []
    for _, part in rows.group_by("response", maintain_order=True):
        estimate_, exact = part["estimate"].to_numpy(), part["effect"].to_numpy()
        big = np.abs(exact) > 0.01 * sd
        within.append(spearmanr(estimate_, exact).statistic)
        if big.sum() >= 8:
            large.append(spearmanr(estimate_[big], exact[big]).statistic)
        signs += (np.sign(estimate_) == np.sign(exact))[big].tolist()
        k = max(1, len(exact) // 10)
        top = [set(np.argsort(-np.abs(v), kind="stable")[:k].tolist()) for v in (exact, estimate_)]
        missed.append(1 - len(top[0] & top[1]) / k)
    return {
        "spearman": float(np.median(within)),
        "spearman_p10": float(np.percentile(within, 10)),
        "spearman_large": float(np.median(large)) if large else float("nan"),
        "sign_large": float(np.mean(signs)),
        "missed": float(np.mean(missed)),
    }


def expected_missed(rows: pl.DataFrame, sd: float) -> dict[str, float]:
    """The missed share as estimated from samples of the same responses."""
    estimates = []
    for seed in range(SAMPLINGS):
        rng, parts = np.random.default_rng(seed), []
        for _, part in rows.group_by("response", maintain_order=True):
            picked, weight = sample(part["estimate"].to_numpy(), part["mass"].to_numpy(), PER_RESPONSE, rng)
            parts.append(part[picked.tolist()].with_columns(pl.Series("weight", weight)))
        estimates.append(estimate_quality(pl.concat(parts), sd, 0.0))
    return {
        "missed_expected": float(np.mean([e.top_missed for e in estimates])),
        "missed_high": float(np.mean([e.top_missed_high for e in estimates])),
    }


def frame(keys: list[Key], values: dict[Key, dict[int, tuple[float, ...]]], names: list[str]) -> pl.DataFrame:
    rows = [(f"{p}/{side}", str(p), j, *v) for key in keys for (_, p, side) in [key] for j, v in values[key].items()]
    return pl.DataFrame(rows, schema=["response", "prompt", "feature", *names], orient="row")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--models", nargs="+", default=["zoo:hh", "zoo:planted"])
    args = parser.parse_args()
    for model in args.models:
        s = load_studied_pm(model, args.cache)
        sd = float(s.rm.score(s.held_out[:200]).delta.std())
        tokens = s.rm.tokenize_all(s.held_out[: args.pairs])
        wanted = {i: {side: dict.fromkeys(s.saes) for side in SIDES} for i in range(len(tokens))}
        started = time.perf_counter()
        exact: dict[Key, dict[int, float]] = {
            (site, r.pair, r.side): dict(zip(r.feature.tolist(), r.effect.tolist(), strict=True))
            for site, r in ablations(s.rm, s.saes, tokens, wanted)
        }
        emit(case="exact", model=model, ablations=sum(map(len, exact.values())), seconds=time.perf_counter() - started)
        for method in METHODS:
            started = time.perf_counter()
            found = {
                (site, e.pair, e.side): dict(
                    zip(e.feature.tolist(), zip(e.effect.tolist(), e.mass.tolist(), strict=True), strict=True)
                )
                for site, e in estimate(s.rm, s.saes, tokens, range(len(tokens)), method=method)
            }
            report(model, method, exact, found, sd, time.perf_counter() - started)
        masses = {key: {j: mass for j, (_, mass) in values.items()} for key, values in found.items()}
        for site in s.saes:
            started = time.perf_counter()
            path: dict[Key, dict[int, tuple[float, ...]]] = {
                key: {j: (e, masses[key][j]) for j, e in v.items()} for key, v in reference(s, site, tokens)
            }
            report(model, "joint, zero, 4", exact, path, sd, time.perf_counter() - started)


def report(
    model: str,
    method: str,
    exact: dict[Key, dict[int, float]],
    found: dict[Key, dict[int, tuple[float, ...]]],
    sd: float,
    seconds: float,
) -> None:
    """Prints one line per site. Features that fire in only one of the two computations (ties of TopK) are left out."""
    for site in sorted({key[0] for key in found}, key=lambda name: int(name.rpartition(".")[2])):
        keys = [key for key in found if key[0] == site and len(exact[key]) >= 20]
        both = {k: {j: (*v, exact[k][j]) for j, v in found[k].items() if j in exact[k]} for k in keys}
        rows = frame(keys, both, ["estimate", "mass", "effect"])
        emit(
            case="screen", model=model, site=site, estimator=method, responses=len(keys), features=rows.height,
            **figures(rows, sd), **expected_missed(rows, sd), seconds=seconds,
        )  # fmt: skip


if __name__ == "__main__":
    main()

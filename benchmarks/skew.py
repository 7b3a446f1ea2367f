"""Do the tests and intervals of a ranking hold for skewed effects? False discoveries and coverage by skew and prompts.

Each ranking has 100 features on the same prompts. Of 80 the true mean effect is exactly the bound, which is the hardest
null; of 20 it is larger. Effects are normal, exponential or log-normal (tail to the left or to the right), or mixtures in
which some prompts count much.

usage: skew.py [RANKINGS]        prints a Markdown table
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import polars as pl

from rmscope.ranking.confirm import BOUND, confirm

NULLS, EFFECTS, SIZE = 80, 20, 0.5
Draw = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]
DRAWS: dict[str, Draw] = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "exponential, tail against the sign": lambda rng, shape: 1 - rng.exponential(size=shape),
    "exponential, tail with the sign": lambda rng, shape: rng.exponential(size=shape) - 1,
    "log-normal (.8), tail against the sign": lambda rng, shape: np.exp(0.32) - np.exp(0.8 * rng.normal(size=shape)),
    "one prompt in ten counts much, against the sign": lambda rng, shape: (
        0.4 - 4 * (rng.random(shape) < 0.1) + 0.5 * rng.normal(size=shape)
    ),
    "one prompt in five counts much, with the sign": lambda rng, shape: (
        3 * (rng.random(shape) < 0.2) - 0.6 + 0.5 * rng.normal(size=shape)
    ),
}


def one_ranking(draw: Draw, prompts: int, seed: int) -> tuple[int, int, int, int]:
    """(false discoveries, reported, intervals that cover the true mean, features)."""
    rng = np.random.default_rng(seed)
    true = np.r_[np.full(NULLS, BOUND), BOUND + SIZE * (0.5 + rng.random(EFFECTS))]
    effect = true[:, None] + 0.4 * draw(rng, (len(true), prompts))
    feature, prompt = (a.ravel() for a in np.indices(effect.shape))
    exact = pl.DataFrame(
        {
            "pair": [f"q{p}" for p in prompt], "prompt": [f"p{p}" for p in prompt], "side": "chosen",
            "feature": feature.astype(np.int32), "effect": effect.ravel(), "delta": effect.ravel(), "length_difference": 0,
        }
    )  # fmt: skip
    frozen = pl.DataFrame({"feature": np.arange(len(true), dtype=np.int32)}).with_columns(
        sign=pl.lit(1, pl.Int8), sign_diff=pl.lit(1, pl.Int8), prompts=pl.lit(prompts, pl.Int32), fire_pairs=pl.lit(1.0)
    )
    table = confirm({"s": frozen}, {"s": exact}, 1.0, seed)["s"].sort("feature")
    reported = table["reported"].to_numpy()
    covered = (table["ci_low"].to_numpy() <= true) & (true <= table["ci_high"].to_numpy())
    return int(reported[:NULLS].sum()), int(reported.sum()), int(covered.sum()), len(true)


def main() -> None:
    rankings = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    print("| effects | prompts | false discoveries | coverage | reported of 20 |")
    print("|---|---|---|---|---|")
    for name, draw in DRAWS.items():
        for prompts in (20, 24, 64):
            rows = np.array([one_ranking(draw, prompts, seed) for seed in range(rankings)])
            rate = (rows[:, 0] / np.maximum(rows[:, 1], 1)).mean()
            found, coverage = (rows[:, 1] - rows[:, 0]).mean(), rows[:, 2].sum() / rows[:, 3].sum()
            print(f"| {name} | {prompts} | {rate:.3f} | {coverage:.3f} | {found:.1f} |", flush=True)


if __name__ == "__main__":
    main()

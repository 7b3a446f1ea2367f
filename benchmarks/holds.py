"""How many differences hold against controls where B is of A's kind too? The chance level of ``rmscope compare --control``.

The effect of a feature in each PM is a common mean plus a draw of the PM's own: normal, or heavy-tailed (t with 3 degrees of
freedom), of several spreads. Each effect is measured on 24 prompts, with noise of several sizes. The ranges over these
cases, of 400 features each, are ``CHANCE`` in ``studies/compare/classify.py``.

usage: holds.py [FEATURES]        prints a Markdown table; the exit code is 1 where CHANCE is another one
"""

from __future__ import annotations

import sys
from itertools import product

import numpy as np
import polars as pl

from rmscope.studies.compare.classify import CHANCE, CHANGED, against_controls, judge
from rmscope.studies.compare.result import Chance

PROMPTS, FEATURES = 24, 400
FEWEST = 30
"""Changes of sign in a case, at least, for a share of them."""
SPREADS, COMMON, NOISES, HEAVY = (0.1, 0.2, 0.4), (0.0, 0.3), (0.02, 0.05, 0.1), (False, True)
"""In SD(Δr), the noise for each prompt."""


def one_case(controls: int, spread: float, common: float, noise: float, heavy: bool, features: int) -> tuple[float, float]:
    """(share of the differences that hold, share of the changes of sign)."""
    rng, names = np.random.default_rng(0), [f"c{i + 1}" for i in range(controls)]
    shape = (features, 2 + controls)
    own = rng.standard_t(3, shape) if heavy else rng.normal(size=shape)
    means = spread * own + common * rng.normal(size=(features, 1))
    effects = means[:, None] + noise * rng.normal(size=(features, PROMPTS, 2 + controls))
    feature, prompt = (a.ravel() for a in np.indices(effects.shape[:2]))
    columns = {"of": "a", "site": "s", "feature": feature.astype(np.int32), "prompt": [f"{p}" for p in prompt]}
    by_pm = dict(zip(["a", "b", *names], effects.reshape(-1, 2 + controls).T, strict=True))
    measured = pl.DataFrame({**columns, **by_pm})
    table = against_controls(judge(measured, 0), measured, names, 0).filter(pl.col("class").is_in(CHANGED))
    signs = table.filter(pl.col("class") == "changed sign")
    of_signs = signs["holds"].mean() if signs.height >= FEWEST else np.nan
    return float(table["holds"].mean()), float(of_signs)  # type: ignore[arg-type]


def main() -> None:
    features, ranges = int(sys.argv[1]) if len(sys.argv) > 1 else FEATURES, {}
    print("| controls | differences that hold | changes of sign that hold |")
    print("|---|---|---|")
    for controls in CHANCE:
        cases = [one_case(controls, *case, features) for case in product(SPREADS, COMMON, NOISES, HEAVY)]
        (low, low_sign), (high, high_sign) = np.nanmin(cases, 0).round(2).tolist(), np.nanmax(cases, 0).round(2).tolist()
        ranges[controls] = Chance((low, high), (low_sign, high_sign))
        print(f"| {controls} | {low:.2f} to {high:.2f} | {low_sign:.2f} to {high_sign:.2f} |", flush=True)
    sys.exit(ranges != CHANCE)


if __name__ == "__main__":
    main()

"""Do ledgers close? The share of pairs whose gap is within its bound, and what halving every panel moves.

usage: RMSCOPE_DATA=DIR ledger.py --cache DIR [--pairs 100] [--models zoo:hh zoo:planted]

The bound is .01 max(|Δr|, .1 SD(Δr)), as in `docs/method.md`; the mean baseline is that of the training store. Prints one
JSON line per PM and site. ``moved``: the largest move of a part when each panel is halved, in units of its bound.
"""

from __future__ import annotations

import numpy as np
from pms import StudiedPm, arguments, emit, load_studied_pm

from rmscope.effects.ledger import BOUND, FLOOR, Path, SideParts, integrate, pair_ledger, parts_along
from rmscope.model.rendering import PairTokens
from rmscope.pairs.pair import SIDES

PARTS = ("features", "error", "remainder", "gap")
Row = dict[str, float]


def rows_of(s: StudiedPm, site: str, tokens: list[PairTokens], sd: float) -> tuple[list[Row], list[Row]]:
    """Each pair's ledger, and the same with every panel halved."""
    start, sae = s.baseline(site), s.saes[site]
    sides: list[dict[tuple[int, str], SideParts]] = [{}, {}]
    for batch in s.rm.batches(tokens):
        path = Path(s.rm, site, batch, start.x)
        panels = integrate(path, BOUND * FLOOR * sd / 2)
        finer = [half for p in panels for half in p.halved()]
        for parts, used in zip(sides, (panels, finer), strict=True):
            parts |= {(p.pair, p.side): p for p in parts_along(path, used, sae, start)}
    coarse, fine = ([pair_ledger(*(parts[i, side] for side in SIDES), sd) for i in range(len(tokens))] for parts in sides)
    return coarse, fine


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--models", nargs="+", default=["zoo:hh", "zoo:planted"])
    args = parser.parse_args()
    for model in args.models:
        s = load_studied_pm(model, args.cache)
        tokens = s.rm.tokenize_all(s.held_out[: args.pairs])
        sd = float(s.rm.score_tokens(tokens).delta.std())
        for site in s.saes:
            coarse, fine = rows_of(s, site, tokens, sd)
            delta = np.array([r["delta_r"] for r in coarse])
            bound = BOUND * np.maximum(np.abs(delta), FLOOR * sd)
            gap = np.array([abs(r["gap"]) for r in coarse])
            moved = np.array([max(abs(a[p] - b[p]) for p in PARTS) for a, b in zip(coarse, fine, strict=True)])
            nodes = np.array([r["nodes"] for r in coarse])
            emit(
                case="ledger", model=model, site=site, pairs=len(coarse), within_bound=float((gap <= bound).mean()),
                largest_gap_sd=float(gap.max() / sd), moved_within_bound=float((moved <= bound).mean()),
                moved=float((moved / bound).max()), nodes_median=float(np.median(nodes)), nodes_most=int(nodes.max()),
            )  # fmt: skip


if __name__ == "__main__":
    main()

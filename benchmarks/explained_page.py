"""The tables of docs/results/explained.md and its figures, from the figures that explained.py measured."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from explained_data import D_SAE, FIT, FULL, LONGEST, SAE, SHIFT_SITE, TUNING

from rmscope.evaluation.explained import COARSE_GRID, THRESHOLDS, smallest_k
from rmscope.evaluation.reward_aware import RewardAwareConfig
from rmscope.io import write_text
from rmscope.report.figures import as_file, keep_curves

PAGE = """# How much of the reward difference is explained

`zoo:hh` on held-out hh-rlhf pairs, at every third site. Made by `benchmarks/explained.py`; words as in the definitions:
Δr = r(chosen) − r(rejected); *splice* puts the SAE's reconstruction in the stream's place from the divergence to the read
position; delta_r2 = 1 − Σ(Δr − Δr^)² / Σ Δr². All intervals are 95 %, bootstrap by prompt.

- **Measured** on {pairs} pairs ({prompts} prompts) of at most {longest} tokens a side, from the rows that the PM was not
  trained on. **Selected** on other prompts: SAEs ({architecture}, k {k}, {m} features, {tokens:,} training tokens), means,
  donors and lists come from {fit:,} pairs of the fit split. *Aware*: the same after reward-aware fine-tuning, which adds the
  splice's damage to Δr and, by a small weight (level), that to the sum of a pair's rewards to its loss; what that does and
  does not prove is told in [reward_aware.md](reward_aware.md). Rates and levels were chosen on the confirm split:
  {tuning}.
- A list orders features by forward selection on integrated gradients of the fit pairs, and is then frozen.

## In short

{short}

## Splice

{splice}

*scaled*: after one slope fitted on the other half of the prompts. *recovered*: 1 − Σ|r − r^| / Σ|r − r_mean| over responses.

The same splice with something else in the reconstruction's place (delta_r2):

{controls}

*PCA* and *random*: the L0 largest principal components of a token, and of {m} random directions with one fitted scale.
*Noise*: the stream plus a random direction of the error's norm. *Length*: Δr from the difference of lengths alone.
*Error alone*: the features of five donors (mean Δr^), or their means, and this response's own error.

## Keep K

The list's first K features stay; every other feature and the error come from five responses to other prompts (Δr^ is the
mean over them), or from the mean.

{keep}

K_50 / K_80 / K_90: the smallest K of the grid {grid} with delta_r2 >= .5 / .8 / .9;
– where none reaches it. *One donor*: delta_r2 of a single donor's Δr^, with all features kept. *Unflagged*: without
features that fire on more than 10 % of response tokens (dense), whose mean difference loses half to the length difference
(length), or with 80 % of their activation on the responses' endings (ending). Unflagged, PCA and coordinates are measured at
K {coarse} only; PCA and coordinates follow the same rule of selection among 576 components (both signs count as one).

The same of the aware SAEs, with lists of their own:

{keep_aware}

{figures}

## Ablate K

The share of Δr that goes (1 − Σ Δr Δr^ / Σ Δr²) when the list's first K features are ablated, the error kept; beside it
as many other features matched on firing rate a side and on Σ_t f_tj |d_j| (three draws), and a move along the difference of
two real responses, as far as the ablation goes.

{ablated}

## What carries Δr

Shares of Var(Δr) in the ledger (integrated gradients from the mean): Cov(part, Δr) / Var(Δr). The remainder is what
is left with every span at the mean: length, position and their interaction with the prompt.

{ledger}

## Shift

An SAE at `{shift_site}` and a list from helpful-base alone, measured on it, on harmless-base and on RM-Bench (chat, safety).

{shift}

## What remains

{remains}
"""
Row = Sequence[object]


def figure(f: dict[str, float] | None, places: int = 2) -> str:
    """0.93 [0.90, 0.95]."""
    if f is None or f["value"] is None or f["value"] != f["value"]:
        return "–"
    return f"{f['value']:.{places}f} [{f['low']:.{places}f}, {f['high']:.{places}f}]".replace("-", "−")


def table(head: Row, rows: Sequence[Row]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in lines)


def reached(curve: Sequence[dict[str, Any]], which: str = "donors") -> str:
    values = [(p["k"], p[which]["value"]) for p in curve]
    return " / ".join(str(smallest_k(values, t) or "–") for t in THRESHOLDS)


def at(curve: Sequence[dict[str, Any]], k: int, which: str = "donors") -> dict[str, float]:
    return next(p[which] for p in curve if p["k"] == k)


def best(curve: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return max(curve, key=lambda p: p["donors"]["value"])


def write_page(docs: Path, sites: Sequence[dict[str, Any]], aware: Sequence[dict[str, Any]], shift: dict[str, Any]) -> None:
    for site in sites:
        svg = keep_curves(site["curves"], f"Keep K at {site['site']}")
        write_text(docs / "img" / f"explained-{site['site']}.svg", as_file(svg))
    first, listed = sites[0], "\n".join(f"![Keep K at {s['site']}](img/explained-{s['site']}.svg)" for s in sites)
    text = PAGE.format(
        pairs=first["pairs"],
        prompts=first["prompts"],
        longest=LONGEST,
        fit=FIT,
        architecture=SAE.architecture,
        k=SAE.k,
        m=D_SAE,
        tokens=SAE.tokens,
        grid=", ".join(map(str, FULL)),
        coarse=", ".join(map(str, COARSE_GRID)),
        shift_site=SHIFT_SITE,
        tuning=";\n  ".join(f"{site} {_tuned(config)}" for site, config in TUNING.items()),
        short=_short(sites, aware),
        splice=_splice(sites, aware),
        controls=_controls(sites),
        keep=_keep(sites),
        keep_aware=_keep_aware(aware),
        ablated=_ablated(sites),
        ledger=_ledger(sites, aware),
        shift=_shift(shift),
        remains=_remains(sites, aware),
        figures=listed,
    )
    sys.stdout.write(text)


def _tuned(c: RewardAwareConfig) -> str:
    share = (c.lr or 0.0) / SAE.rate(D_SAE)
    return f"{c.steps} steps of {c.pairs} pairs, rate {share:g} of the family's own, level {c.level:g}"


def _short(sites: Sequence[dict[str, Any]], aware: Sequence[dict[str, Any]]) -> str:
    """What a reader should take along, from the figures themselves."""

    def span(values: Sequence[float]) -> str:
        return f"{min(values):.2f} to {max(values):.2f}".replace("-", "−")

    def of(rows: Sequence[dict[str, Any]], name: str) -> str:
        return span([s["evaluation"][name]["value"] for s in rows])

    top = max(aware, key=lambda s: float(s["evaluation"]["delta_r2"]["value"]))
    nine = [s["site"] for s in aware if s["evaluation"]["delta_r2"]["value"] >= 0.9]
    where_nine = "every site" if len(nine) == len(aware) else " and ".join(nine) or "no site"
    kept = [(p["k"], s["site"]) for s in aware for p in s["curves"]["keep"] if p["donors"]["value"] >= 0.9]
    least = f"the first {min(kept)[0]} features at `{min(kept)[1]}`, aware" if kept else "more than any list has"
    where = sorted({site for _, site in kept})
    least += f"; no list reaches it elsewhere than at {' and '.join(where)}" if kept else ""
    curves = {n: span([at(s["curves"][n], 128)["value"] for s in sites]) for n in ("keep", "keep_pca", "keep_coordinates")}
    gone = [p for s in sites for p in s["ablated"] if p["k"] == 16]
    lost = {name: span([p[name]["value"] for p in gone]) for name in ("list", "matched")}
    return "\n".join(
        [
            f"- Under splice a plain SAE keeps {of(sites, 'delta_r2')} of Σ Δr² (delta_r2), an aware one "
            f"{of(aware, 'delta_r2')}, most at `{top['site']}`, and .9 or more at {where_nine}.",
            f"- Each reward by itself (*recovered*): {of(sites, 'reward_recovered')} plain, {of(aware, 'reward_recovered')} "
            "aware. The aware loss minds the difference of a pair's rewards and, with a small weight, their sum.",
            f"- With everything else from donors, delta_r2 .9 first takes {least}.",
            f"- 128 features of a plain SAE keep {curves['keep']}, 128 principal components {curves['keep_pca']}, 128 "
            f"coordinates {curves['keep_coordinates']}: what the SAE leaves in its error, no list of features has.",
            f"- Taking the first 16 features of a list away costs {lost['list']} of Δr, as many matched ones "
            f"{lost['matched']}.",
        ]
    )


def both(sites: Sequence[dict[str, Any]], aware: Sequence[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Each site's plain and aware figures under their names."""
    pairs = zip(sites, aware, strict=True)
    return [(name, s) for plain, tuned in pairs for name, s in ((plain["site"], plain), (f"{plain['site']}, aware", tuned))]


def _splice(sites: Sequence[dict[str, Any]], aware: Sequence[dict[str, Any]]) -> str:
    names = ("fvu", "delta_r2", "delta_r2_scaled", "agreement", "reward_recovered")
    rows = [
        [name, *(figure(s["evaluation"][n], 3) for n in names), f"{s['evaluation']['dead']:.0%}"]
        for name, s in both(sites, aware)
    ]
    return table(["site", "FVU", "delta_r2", "scaled", "agreement", "recovered", "silent features"], rows)


def _controls(sites: Sequence[dict[str, Any]]) -> str:
    names = {
        "pca": "PCA", "random": "random", "noise": "noise", "length": "length", "error": "error alone, donors",
        "error_mean": "error alone, mean",
    }  # fmt: skip
    rows = [[s["site"], figure(s["evaluation"]["delta_r2"]), *(figure(s["controls"][n]) for n in names)] for s in sites]
    return table(["site", "SAE", *names.values()], rows)


def _keep(sites: Sequence[dict[str, Any]]) -> str:
    head = [
        "site", "K_50 / K_80 / K_90", "from the mean", "unflagged", "PCA", "coordinates", "K 64", "K 512", "best K",
        "one donor", "flagged of the first 64",
    ]  # fmt: skip
    rows = []
    for s in sites:
        c = s["curves"]
        top = best(c["keep"])
        reach = [reached(c["keep"]), reached(c["keep"], "mean")]
        reach += [reached(c[n]) for n in ("unflagged", "keep_pca", "keep_coordinates")]
        k = [figure(at(c["keep"], 64)), figure(at(c["keep"], 512)), f"{figure(top['donors'])} (K {top['k']})"]
        rows.append([s["site"], *reach, *k, f"{c['keep'][-1]['single']:.2f}".replace("-", "−"), s["flagged_of_64"]])
    return table(head, rows)


def _keep_aware(aware: Sequence[dict[str, Any]]) -> str:
    rows = []
    for s in aware:
        curve, top = s["curves"]["keep"], best(s["curves"]["keep"])
        k = [figure(at(curve, 64)), figure(at(curve, 512)), f"{figure(top['donors'])} (K {top['k']})"]
        rows.append([s["site"], reached(curve), reached(curve, "mean"), *k, f"{curve[-1]['single']:.2f}".replace("-", "−")])
    return table(["site", "K_50 / K_80 / K_90", "from the mean", "K 64", "K 512", "best K", "one donor"], rows)


def _ablated(sites: Sequence[dict[str, Any]]) -> str:
    rows = [[s["site"], p["k"], *(figure(p[n]) for n in ("list", "matched", "norm"))] for s in sites for p in s["ablated"]]
    return table(["site", "K", "the list's first K", "matched features", "real differences of equal norm"], rows)


def _ledger(sites: Sequence[dict[str, Any]], aware: Sequence[dict[str, Any]]) -> str:
    parts = ("features", "error", "remainder", "gap")
    return table(["site", *parts], [[name, *(figure(s["ledger"][p]) for p in parts)] for name, s in both(sites, aware)])


def _shift(shift: dict[str, Any]) -> str:
    rows = []
    for place, f in shift.items():
        if place == "seconds":
            continue
        keeps = [figure(at(f["curve"], k)) for k in (32, 128, 512)]
        rows.append([place, f["pairs"], figure(f["fvu"]), figure(f["splice"]), figure(f["agreement"]), *keeps])
    return table(["pairs of", "n", "FVU", "splice", "agreement", "keep 32", "keep 128", "keep 512"], rows)


def _remains(sites: Sequence[dict[str, Any]], aware: Sequence[dict[str, Any]]) -> str:
    """What the figures say, in words that hold whatever they are."""
    lines = []
    for name, s in both(sites, aware):
        splice, keep = s["evaluation"]["delta_r2"]["value"], best(s["curves"]["keep"])
        error = s["ledger"]["error"]["value"]
        lines.append(
            f"{name}: the reconstruction leaves {1 - splice:.1%} of Σ Δr² unexplained, and with the error of other "
            f"responses in place of its own the features leave {1 - keep['donors']['value']:.0%}; the error carries "
            f"{error:.1%} of Var(Δr).".replace("-", "−")
        )
    return "\n".join(f"- {line}" for line in lines)

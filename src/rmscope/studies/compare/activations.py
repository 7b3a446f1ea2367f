"""Are A's features there in B? The same SAE reads the streams of both PMs on the same tokens.

The figures are over every token of the fresh pairs but position 0; a shared prompt counts once. FVU is centred per
dimension at each PM's own mean and summed over dimensions. Intervals are 95 %, bootstrap by prompt. A feature fires
*together* on the tokens on which it fires in both PMs, as a share of those on which it fires in either (Jaccard). A
reported feature is *there* in the other PM where that share is at least half, the threshold at which two features count as
one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from rmscope.effects.splice import clean_runs
from rmscope.evaluation.reconstruction import first_counted
from rmscope.io import Progress, silent
from rmscope.pairs.pair import SIDES
from rmscope.ranking.similarity import COSINE, JACCARD, cosines
from rmscope.sae.base import Active, Sae
from rmscope.statistics import Array, Figure, ratio, share, weighted_spearman
from rmscope.studies.compare.held_out import HeldOut
from rmscope.studies.compare.models import ComparedModel, Dictionary, dictionaries
from rmscope.studies.compare.result import SaeFigures, SiteComparison

COUNTS = ("fire_a", "fire_b", "sum_a", "sum_b", "both")
"""Per feature: the tokens on which it fires in A and in B, Σ f there, and the tokens on which it fires in both."""
KEY = {"of": pl.String, "site": pl.String}
MATCHES = {
    **KEY, "feature": pl.Int32, "match": pl.Int32, "cosine": pl.Float64, "encoder_cosine": pl.Float64,
    "found_again": pl.Boolean,
}  # fmt: skip
FIRING = {**KEY, "pair": pl.String, "side": pl.String, "feature": pl.Int32}


def read_unit(
    a: ComparedModel, b: ComparedModel, held_out: HeldOut, unit: Sequence[int], progress: Progress = silent
) -> dict[str, pl.DataFrame]:
    """What both PMs show on some pairs.

    Returns:
        ``rewards``, one row per pair; ``sums``, one per response and SAE; ``counts``, one per feature; ``firing``, one per
        response in whose span a reported feature fires in A or in B.
    """
    read = dictionaries(a, b)
    sites = sorted({d.site for d in read}, key=a.rm.site_index)
    counts = [np.zeros((len(COUNTS), d.sae.m)) for d in read]
    rewards, sums, firing = [], [], []
    for done, i in enumerate(unit, 1):
        t, pair = held_out.tokens[i], held_out.ids[i]
        runs = [clean_runs(model.rm, t, sites) for model in (a, b)]
        rewards.append(
            {"pair": pair} | {f"{s}_{v}": run[s].reward for v, run in zip("ab", runs, strict=True) for s in SIDES}
        )
        for side in SIDES:
            start = first_counted(a.rm, t, side)
            stop = min(run[side].ids.numel() for run in runs)
            for d, count in zip(read, counts, strict=True):
                key = {"of": d.of, "site": d.site, "pair": pair, "side": side}
                xs = [run[side].streams[d.site][start:stop].float().cpu() for run in runs]
                active = [d.sae.active(x) for x in xs]
                count += _counts(d.sae.m, *active)
                sums.append(key | {"tokens": stop - start} | _sums(d.sae, xs, active))
                firing += [key | {"feature": j} for j in _on_span(active, t.divergence - start, d.reported)]
        progress(done, len(unit), "pairs read by both PMs")
    return {
        "rewards": pl.DataFrame(rewards),
        "sums": pl.DataFrame(sums),
        "counts": pl.concat([_count_table(d, count) for d, count in zip(read, counts, strict=True)]),
        "firing": pl.DataFrame(firing, schema=FIRING),
    }


def _counts(m: int, a: Active, b: Active) -> Float[Array, "counts m"]:
    entry_a, entry_b = (x.token.numpy() * m + x.feature.numpy() for x in (a, b))
    both = np.intersect1d(entry_a, entry_b, assume_unique=True) % m
    fires = [np.bincount(x.feature.numpy(), minlength=m) for x in (a, b)]
    sums = [np.bincount(x.feature.numpy(), x.value.numpy(), m) for x in (a, b)]
    return np.stack([*fires, *sums, np.bincount(both, minlength=m)])


def _count_table(d: Dictionary, counts: Float[Array, "counts m"]) -> pl.DataFrame:
    columns = {"feature": np.arange(d.sae.m, dtype=np.int32), **dict(zip(COUNTS, counts, strict=True))}
    return pl.DataFrame(columns).select(pl.lit(d.of).alias("of"), pl.lit(d.site).alias("site"), pl.all())


def _sums(sae: Sae, xs: Sequence[Float[Tensor, "tokens d"]], active: Sequence[Active]) -> dict[str, float | list[float]]:
    """Of each PM: active features, Σ|x - x^|², Σ|x|², and Σ x, from which the variance about any mean follows."""
    out: dict[str, float | list[float]] = {}
    for v, x, f in zip("ab", xs, active, strict=True):
        y = x.double()
        out |= {
            f"l0_{v}": f.feature.numel(), f"error_{v}": float((y - sae.decode_active(f).double()).square().sum()),
            f"square_{v}": float(y.square().sum()), f"total_{v}": y.sum(0).tolist(),
        }  # fmt: skip
    return out


def _on_span(active: Sequence[Active], start: int, reported: Sequence[int]) -> list[int]:
    """Which reported features fire from token ``start`` on, in A or in B."""
    fires = torch.cat([x.feature[x.token >= start] for x in active]).unique()
    return fires[torch.isin(fires, torch.tensor(reported, dtype=torch.int64))].tolist()


def count_features(counts: pl.DataFrame) -> pl.DataFrame:
    """One row per feature, over all units.

    The columns are :data:`COUNTS`, the mean activation where it fires in each PM (``act_a``, ``act_b``; null where it is
    silent), and ``together``, the Jaccard index of its firings (null where it is silent in both).
    """
    either = pl.col("fire_a") + pl.col("fire_b") - pl.col("both")
    return (
        counts.group_by("of", "site", "feature")
        .agg(pl.col(COUNTS).sum())
        .sort("of", "site", "feature")
        .with_columns(
            *(
                pl.when(pl.col(f"fire_{v}") > 0).then(pl.col(f"sum_{v}") / pl.col(f"fire_{v}")).alias(f"act_{v}")
                for v in "ab"
            ),
            pl.when(either > 0).then(pl.col("both") / either).alias("together"),
        )
    )


def compare_site(
    d: Dictionary,
    sums: pl.DataFrame,
    counts: pl.DataFrame,
    prompt_of: Mapping[str, str],
    found_again: Figure | None = None,
) -> SiteComparison:
    """One SAE in both PMs, from the sums of all units and the counts of :func:`count_features`."""
    own = sums.filter((pl.col("of") == d.of) & (pl.col("site") == d.site))
    every = counts.filter((pl.col("of") == d.of) & (pl.col("site") == d.site))
    prompts, tokens = np.array([prompt_of[p] for p in own["pair"]]), own["tokens"].to_numpy().astype(float)
    figures = {}
    for v in "ab":
        total = np.array(own[f"total_{v}"].to_list())
        mean = total.sum(0) / tokens.sum()
        variance = own[f"square_{v}"].to_numpy() - 2 * total @ mean + tokens * (mean @ mean)
        figures[v] = SaeFigures(
            l0=ratio(own[f"l0_{v}"].to_numpy().astype(float), tokens, prompts),
            fvu=ratio(own[f"error_{v}"].to_numpy(), variance, prompts),
            dead=float((every[f"fire_{v}"] == 0).mean()),  # type: ignore[arg-type]
        )
    fires = every.select("fire_a", "fire_b").to_numpy()
    alive = fires[fires.sum(1) > 0]
    total_a, total_b, both, sum_a, sum_b = (float(every[c].sum()) for c in ("fire_a", "fire_b", "both", "sum_a", "sum_b"))
    known = every.filter(pl.col("feature").is_in(d.reported))
    return SiteComparison(
        of=d.of,
        site=d.site,
        m=d.sae.m,
        tokens=int(tokens.sum()),
        reported=len(d.reported),
        a=figures["a"],
        b=figures["b"],
        rates=_finite(weighted_spearman(alive[:, 0], alive[:, 1], np.ones(len(alive)))) if len(alive) else None,
        activation_ratio=(sum_b / total_b) / (sum_a / total_a) if total_a and total_b else None,
        together=both / (total_a + total_b - both) if total_a + total_b else None,
        there=share(int((known["together"] >= JACCARD).sum()), len(d.reported)),
        found_again=found_again,
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def matches(d: Dictionary, other: Sae) -> pl.DataFrame:
    """The feature of the other PM's own SAE that is most like each reported one, one row each: decoder and encoder cosine,
    and whether it is found again (both at least .7)."""
    decoder, encoder = cosines(d.sae, other, d.reported)
    best = torch.minimum(decoder, encoder).argmax(1, keepdim=True)
    at_best = [cosine.gather(1, best)[:, 0].tolist() for cosine in (decoder, encoder)]
    rows = zip(d.reported, best[:, 0].tolist(), *at_best, strict=True)
    return pl.DataFrame([(d.of, d.site, j, k, u, v, min(u, v) >= COSINE) for j, k, u, v in rows], MATCHES, orient="row")

"""What both PMs show on the fresh pairs: where features fire, and what ablating them does.

*Firing.* The same SAE reads the streams of both PMs on the same tokens: every token of the fresh pairs but position 0, a
shared prompt once. FVU is centred per dimension at each PM's own mean and summed over dimensions. Intervals are 95 %,
bootstrap by prompt. A feature fires *together* on the tokens on which it fires in both PMs, as a share of those on which it
fires in either (Jaccard). A reported feature is *there* in the other PM where that share is at least half, the threshold at
which two features count as one.

*Ablation.* A response counts for a feature that fires in its span in either PM, so that neither PM chooses the responses
alone. Where it is silent in one of them, its effect there is exactly 0. Effects are in SD(Δr) of the PM of the ablation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
import torch
from jaxtyping import Float

from rmscope.effects import tables
from rmscope.effects.ablation import clean_runs
from rmscope.evaluation.reconstruction import first_counted
from rmscope.io import Progress, silent
from rmscope.pairs.pair import SIDES
from rmscope.ranking.candidates import pairs_a_prompt
from rmscope.ranking.similarity import COSINE, JACCARD, cosines
from rmscope.sae.base import Active
from rmscope.statistics import Array, ratio, share, weighted_spearman
from rmscope.studies.compare.models import Comparison, Dictionary
from rmscope.studies.compare.result import SaeFigures, SiteComparison

COUNTS = ("fire_a", "fire_b", "sum_a", "sum_b", "both")
"""Per feature: the tokens on which it fires in A and in B, Σ f there, and the tokens on which it fires in both."""
SAE: dict[str, Any] = {"of": pl.String, "site": pl.String}
FEATURE = (*SAE, "feature")
MATCH = {"match": pl.Int32, "cosine": pl.Float64, "encoder_cosine": pl.Float64, "found_again": pl.Boolean}
FIRING = {**SAE, "pair": pl.String, "side": pl.String, "feature": pl.Int32}
ABLATIONS = {**SAE, "pm": pl.String, **{c: t for c, t in tables.SCHEMA.items() if c != "kind"}}


def read_unit(c: Comparison, unit: Sequence[int], progress: Progress = silent) -> dict[str, pl.DataFrame]:
    """What both PMs show on some pairs.

    Returns:
        ``rewards``, one row per pair; ``sums``, one per response, SAE and PM: active features, Σ|x - x^|², Σ|x|², and Σ x,
        from which the variance about any mean follows; ``counts``, one per feature; ``firing``, one per response in whose
        span a reported feature fires in A or in B.
    """
    sites = sorted({d.site for d in c.dictionaries}, key=c.a.rm.site_index)
    counts = [np.zeros((len(COUNTS), d.sae.m)) for d in c.dictionaries]
    rewards, sums, firing = [], [], []
    for done, i in enumerate(unit, 1):
        t, pair = c.pairs.tokens[i], c.pairs.ids[i]
        runs = [clean_runs(model.rm, t, sites) for model in (c.a, c.b)]
        by_side = {f"{s}_{v}": run[s].reward for v, run in zip("ab", runs, strict=True) for s in SIDES}
        rewards.append({"pair": pair} | by_side)
        for side in SIDES:
            start = first_counted(c.a.rm, t, side)
            stop = min(run[side].ids.numel() for run in runs)
            for d, count in zip(c.dictionaries, counts, strict=True):
                key = {"of": d.of, "site": d.site, "pair": pair, "side": side}
                xs = [run[side].streams[d.site][start:stop].float().cpu() for run in runs]
                active = [d.sae.active(x) for x in xs]
                count += _counts(d.sae.m, *active)
                for pm, x, f in zip("ab", xs, active, strict=True):
                    y = x.double()
                    error = float((y - d.sae.decode_active(f).double()).square().sum())
                    squares = {"l0": f.feature.numel(), "error": error, "square": float(y.square().sum())}
                    sums.append(key | {"pm": pm, "tokens": len(x), **squares, "total": y.sum(0).tolist()})
                on_span = torch.cat([x.feature[x.token >= t.divergence - start] for x in active]).unique().tolist()
                firing += [key | {"feature": j} for j in on_span if j in d.reported]
        progress(done, len(unit), "pairs read by both PMs")
    by_feature = []
    for d, count in zip(c.dictionaries, counts, strict=True):
        columns = {"of": d.of, "site": d.site, "feature": np.arange(d.sae.m, dtype=np.int32)}
        by_feature.append(pl.DataFrame(columns | dict(zip(COUNTS, count, strict=True))))
    return {
        "rewards": pl.DataFrame(rewards), "sums": pl.DataFrame(sums), "counts": pl.concat(by_feature),
        "firing": pl.DataFrame(firing, schema=FIRING),
    }  # fmt: skip


def _counts(m: int, a: Active, b: Active) -> Float[Array, "counts m"]:
    entry_a, entry_b = (x.token.numpy() * m + x.feature.numpy() for x in (a, b))
    both = np.intersect1d(entry_a, entry_b, assume_unique=True) % m
    fires = [np.bincount(x.feature.numpy(), minlength=m) for x in (a, b)]
    sums = [np.bincount(x.feature.numpy(), x.value.numpy(), m) for x in (a, b)]
    return np.stack([*fires, *sums, np.bincount(both, minlength=m)])


def count_features(counts: pl.DataFrame) -> pl.DataFrame:
    """One row per feature, over all units: :data:`COUNTS`, the mean activation where it fires in each PM (``act_a``,
    ``act_b``), and ``together``, the Jaccard index of its firings; null where it is silent."""
    total, either = counts.group_by(FEATURE).agg(pl.col(COUNTS).sum()), pl.col("fire_a") + pl.col("fire_b") - pl.col("both")
    return total.sort(FEATURE).with_columns(
        *(pl.when(pl.col(f"fire_{v}") > 0).then(pl.col(f"sum_{v}") / pl.col(f"fire_{v}")).alias(f"act_{v}") for v in "ab"),
        pl.when(either > 0).then(pl.col("both") / either).alias("together"),
    )


def list_features(c: Comparison, counts: pl.DataFrame) -> pl.DataFrame:
    """One row per reported feature: its tokens, its row of :func:`count_features`, and :func:`nearest`."""
    rows = []
    for d in c.dictionaries:
        run = c.models[d.of].run
        for j, match in zip(d.reported, nearest(d), strict=True):
            tokens = [text for text, _ in run.top_tokens(d.site, j)] if run is not None else []
            rows.append({"of": d.of, "site": d.site, "feature": j, "tokens": tokens, **match})
    table = pl.DataFrame(rows, {**SAE, "feature": pl.Int32, "tokens": pl.List(pl.String), **MATCH})
    return table.join(counts, on=FEATURE, how="left", maintain_order="left").select(pl.exclude(*MATCH), *MATCH)


def nearest(d: Dictionary) -> list[dict[str, Any]]:
    """For each reported feature the most similar one of the other PM's own SAE, by the smaller of the decoder's and the
    encoder's cosine; ``found_again`` where both are at least .7. Empty where there is no such SAE."""
    if d.other is None or not d.reported:
        return [{} for _ in d.reported]
    decoder, encoder = cosines(d.sae, d.other, d.reported)
    best = torch.minimum(decoder, encoder).argmax(1).tolist()
    at_best = [(k, float(decoder[i, k]), float(encoder[i, k])) for i, k in enumerate(best)]
    return [dict(zip(MATCH, (k, u, v, min(u, v) >= COSINE), strict=True)) for k, u, v in at_best]


def compare_site(
    d: Dictionary, sums: pl.DataFrame, counts: pl.DataFrame, features: pl.DataFrame, prompt_of: Mapping[str, str]
) -> SiteComparison:
    """One SAE in both PMs, from the sums of all units and the tables of :func:`count_features` and :func:`list_features`."""
    every, reported = (table.filter(of=d.of, site=d.site) for table in (counts, features))
    figures, tokens = {}, 0
    for v in "ab":
        own = sums.filter(of=d.of, site=d.site, pm=v)
        prompts, n = [prompt_of[p] for p in own["pair"]], own["tokens"].to_numpy().astype(float)
        total, tokens = np.array(own["total"].to_list()), int(n.sum())
        mean = total.sum(0) / n.sum()
        figures[v] = SaeFigures(
            l0=ratio(own["l0"].to_numpy().astype(float), n, prompts),
            fvu=ratio(own["error"].to_numpy(), own["square"].to_numpy() - 2 * total @ mean + n * (mean @ mean), prompts),
            dead=float((every[f"fire_{v}"] == 0).mean()),  # type: ignore[arg-type]
        )
    fires = every.select("fire_a", "fire_b").to_numpy()
    alive = fires[fires.sum(1) > 0]
    rates = weighted_spearman(alive[:, 0], alive[:, 1], np.ones(len(alive))) if len(alive) else math.nan
    fire_a, fire_b, sum_a, sum_b, both = (float(every[c].sum()) for c in COUNTS)
    again = reported["found_again"].drop_nulls()
    return SiteComparison(
        of=d.of,
        site=d.site,
        m=d.sae.m,
        tokens=tokens,
        reported=len(d.reported),
        **figures,
        rates=rates if math.isfinite(rates) else None,
        activation_ratio=(sum_b / fire_b) / (sum_a / fire_a) if fire_a and fire_b else None,
        together=both / (fire_a + fire_b - both) if fire_a + fire_b else None,
        there=share(int((reported["together"] >= JACCARD).sum()), len(d.reported)),
        found_again=share(int(again.sum()), len(again)) if len(again) else None,
    )


def ablation_requests(c: Comparison, firing: pl.DataFrame, prompts: int, seed: int) -> pl.DataFrame:
    """The responses in which each reported feature is ablated (of, site, pair, side, feature, prompt): one pair of each of
    at most ``prompts`` prompts, with both sides where it fires on both."""
    parts = [pl.DataFrame(schema={**FIRING, "prompt": pl.String})]
    for d in c.dictionaries:
        rows = tables.with_order(firing.filter(of=d.of, site=d.site), c.pairs.prompts, seed)
        parts.append(pairs_a_prompt(rows, d.reported, prompts).select(parts[0].columns))
    return pl.concat(parts)


def ablation_unit(
    c: Comparison, requests: pl.DataFrame, unit: Sequence[int], progress: Progress = silent
) -> dict[str, pl.DataFrame]:
    """``ablations``: requested ablations of some pairs in each PM (``pm``: its letter), one row where a feature fires."""
    rows = requests.filter(pl.col("pair").is_in([c.pairs.ids[i] for i in unit]))
    parts = [pl.DataFrame(schema=ABLATIONS)]
    for of in sorted({d.of for d in c.dictionaries}):
        saes = {d.site: d.sae for d in c.dictionaries if d.of == of}
        wanted = tables.plan({site: rows.filter(of=of, site=site) for site in saes}, c.pairs.index)
        for pm, model in c.models.items():
            by_site = tables.ablation_table(model.rm, saes, c.pairs.tokens, c.pairs.ids, wanted, progress)
            for site, table in by_site.items():
                named = table.with_columns(pl.lit(of).alias("of"), pl.lit(site).alias("site"), pl.lit(pm).alias("pm"))
                parts.append(named.select(parts[0].columns))
    return {"ablations": pl.concat(parts)}


def pair_effects(requests: pl.DataFrame, ablations: pl.DataFrame, sd: Mapping[str, float]) -> pl.DataFrame:
    """One row per feature and prompt (of, site, feature, prompt): the mean effect over the same responses in each PM of
    ``sd`` (a, b, and c1, c2, ... for controls), in SD(Δr) of that PM."""
    rows, pms, key = requests, pl.col(*sd), (*FEATURE, "prompt")
    for pm in sd:
        effect = (pl.col("effect").cast(pl.Float64) / sd[pm]).alias(pm)
        rows = rows.join(ablations.filter(pm=pm).select(*FIRING, effect), on=list(FIRING), how="left")
    return rows.with_columns(pms.fill_null(0.0)).group_by(key).agg(pms.mean()).sort(key)

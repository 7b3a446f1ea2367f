"""The pipeline: stages that read and write a run folder, and skip what is done and unchanged.

pairs -> scores -> activations -> SAEs -> estimates -> exact ablations -> ranking -> ledger -> evidence -> report.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from rmscope.activations.harvest import data_identity, harvest
from rmscope.effects import tables
from rmscope.effects.ledger import Baseline, ledger_rows
from rmscope.evaluation.reward_aware import RewardAwareConfig
from rmscope.io import Progress, write_json, write_table
from rmscope.model import cost
from rmscope.model.preflight import preflight
from rmscope.model.rendering import PairTokens
from rmscope.pairs.filters import kept
from rmscope.pairs.pair import split_of
from rmscope.ranking import flags
from rmscope.ranking.estimate_quality import trust
from rmscope.ranking.ranking import (
    BOUND,
    SCHEMA,
    STRONG,
    Q,
    candidates,
    confirm,
    firing_counts,
    first_responses,
    freeze,
    pairs_a_prompt,
    preference_signs,
    strongest,
)
from rmscope.run.evidence import write_report
from rmscope.run.results import Results


class Run(Results):
    """One run folder being made; ``go`` does every stage that is not done."""

    def go(self) -> dict[str, Any]:
        """All stages; returns the closing summary."""
        c = self.config
        with self.shown.stage("load") as progress:
            pairs = self.all_pairs  # bad data is told before the PM is loaded
            tokens = [t for _, t in self.scored]
            self.shown.note(f"{c.data}: {len(pairs)} pairs, read as {self.read_report.format} (--format overrules)")
            self.preflight = preflight(self.rm, tokens, progress)
            if c.sae_dir is not None:
                _ = self.saes  # what is wrong with them is told before anything is scored
        identity = {"model": self.rm.identity, "data": data_identity([p for p, _ in self.scored])}
        self.on_disk.open(identity, c.model_dump(mode="json"))
        self.on_disk.stage("score", c.dtype, [Path("scores.parquet")], self._score)
        self.on_disk.stage(
            "harvest",
            [*self.sites, *self._changed("top_share", "top_pairs")],
            [Path("activations") / s / "manifest.json" for s in self.sites],
            self._harvest,
        )
        if c.sae_dir is None:
            settings = c.sae.model_dump() | dict(self._changed("reward_aware"))
            self.on_disk.stage("train", settings, [Path("saes") / s / "cfg.json" for s in self.sites], self._train)
        else:
            self.on_disk.stage("train", [s.identity() for s in self.saes.values()], [], lambda _p, _k: self._keep_saes())
        effects = [Path("effects") / s for s in self.sites]
        how = [c.seed, c.estimate] if self._changed("estimate") else c.seed
        self.on_disk.stage("estimate", how, [e / "estimated.parquet" for e in effects], self._estimate)
        counts = [c.screen, c.others, c.responses, c.quality_responses, c.frozen, c.confirm_prompts]
        self.on_disk.stage(
            "ablate",
            [*counts, *self._changed("confirm_pairs")],
            [e / name for e in effects for name in ("exact.parquet", "strong.parquet")],
            self._ablate,
        )
        self.on_disk.stage("rank", [BOUND, STRONG], [Path("features") / f"{s}.parquet" for s in self.sites], self._rank)
        self.on_disk.stage(
            "ledger",
            [c.ledger_pairs, c.ledger_halvings, *self._changed("baseline")],
            [Path("ledger") / f"{s}.parquet" for s in self.sites],
            self._ledger,
        )
        with self.shown.stage("report") as progress:
            return write_report(self, progress)

    def _changed(self, *names: str) -> list[Any]:
        """Those of these settings that are not at their default; a default that is new leaves older runs done."""
        return sorted(self.config.model_dump(include=set(names), exclude_defaults=True).items())

    def plan(self) -> dict[str, Any]:
        """What ``go`` would do: counts, and time and memory estimated from one timed unit of pairs."""
        tokens = [t for _, t in self.scored]
        studied = kept(len(tokens), self.config.top_share, self.config.top_pairs)
        rate = cost.tokens_a_second(self.rm, tokens)
        tuning = len(self.sites) * cost.tuning_minutes(tokens, rate, self.config.reward_aware, RewardAwareConfig().pairs)
        scoring = 0.0 if studied == len(tokens) else cost.run_tokens(tokens) / rate / 60
        fit = sum(t.chosen.numel() + t.rejected.numel() for p, t in self.scored if split_of(p) == "fit")
        return {
            "pairs": len(tokens),
            **({"of largest |Δr|, studied": studied} if scoring else {}),
            "tokens (shared prefixes once)": cost.run_tokens(tokens),
            "sites": ", ".join(self.sites),
            "tokens per second, forward": round(rate),
            "minutes, about": round(scoring + tuning + cost.run_minutes(self.rm, tokens, rate, studied), 1),
            "GB of memory, about": round(cost.run_bytes(self.rm) / 1e9, 1),
            "GB on disk, about": round(fit * studied / len(tokens) * self.rm.d_model * 2 * len(self.sites) / 1e9, 2),
        }

    def _score(self, progress: Progress, key: str) -> None:
        def make(unit: list[int], within: Progress) -> dict[str, pl.DataFrame]:
            p, t = zip(*(self.scored[i] for i in unit), strict=True)
            scores = self.rm.score_tokens(t, within)
            return {
                "scores": pl.DataFrame(
                    {
                        "pair": [x.id for x in p],
                        "chosen": scores.chosen.numpy(),
                        "rejected": scores.rejected.numpy(),
                        "delta": scores.delta.numpy(),
                        "n_chosen": np.array([x.chosen.numel() for x in t], dtype=np.int32),
                        "n_rejected": np.array([x.rejected.numel() for x in t], dtype=np.int32),
                        "divergence": np.array([x.divergence for x in t], dtype=np.int32),
                        "split": [split_of(x) for x in p],
                    }
                )
            }

        table = self.on_disk.in_units("score", key, range(len(self.scored)), progress, make)["scores"]
        write_table(self.folder / "scores.parquet", table)
        self.on_disk.drop_parts("score", key)

    def _harvest(self, progress: Progress, _key: str) -> None:
        self.need_prompts()
        harvest(
            self.rm,
            [self.pairs[i] for i in self.of_split("fit")],
            self.sites,
            self.folder / "activations",
            progress,
        )

    def _train(self, progress: Progress, _key: str) -> None:
        self.trained(self.config.sae, self.folder / "saes", progress)
        self.__dict__.pop("saes", None)  # opened anew from here on, as a later command opens them

    def _keep_saes(self) -> None:
        for site, sae in self.saes.items():
            sae.save(self.folder / "saes" / site)

    def _estimate(self, progress: Progress, key: str) -> None:
        self.on_disk.stream_units(
            "estimate",
            key,
            self.of_split("fit"),
            progress,
            lambda unit, within: tables.estimate_table(
                self.rm, self.saes, self.tokens, self.ids, unit, within, self.config.estimate
            ),
            lambda site: self.folder / "effects" / site / "estimated.parquet",
        )
        self.on_disk.drop_parts("estimate", key)

    def _ablate(self, progress: Progress, key: str) -> None:
        """Screened features and the trust sample on the fit split, then the frozen list on the confirm split."""
        c = self.config
        requests, trust_rows, screened, signs, frozen = {}, {}, {}, {}, {}
        for site in self.sites:
            table = self._ordered(pl.read_parquet(self.folder / "effects" / site / "estimated.parquet"))
            found = candidates(table, c.screen, c.others, c.seed)
            trust_rows[site] = tables.quality_sample(table, c.quality_responses, c.seed)
            screened[site] = found["up"] + found["down"]
            rows = first_responses(table, [*screened[site], *found["others"]], c.responses)
            columns = ["pair", "side", "feature"]
            requests[site] = pl.concat([rows.select(columns), trust_rows[site].select(columns)])
            signs[site] = preference_signs(table)
        fit = self._ablated("fit", key, requests, progress)
        for site in self.sites:
            rows = first_responses(self._ordered(fit[site]), screened[site], c.responses)
            list_ = freeze(rows, screened[site], c.frozen // len(self.sites))
            frozen[site] = list_.join(signs[site], on="feature", how="left")
        confirmed = self._confirm(frozen, progress, key)
        for site in self.sites:
            folder = self.folder / "effects" / site
            joined = trust_rows[site].join(fit[site], on=["pair", "side", "feature"], how="inner")
            columns = ["pair", "side", "feature", "prompt", "estimate", "effect", "weight"]
            write_table(folder / "trust.parquet", joined.select(columns))
            write_table(folder / "exact.parquet", pl.concat([fit[site], confirmed[site].drop("ending")]))
        for part in ("fit", "firing", "confirm", "strong", "unrelated", "mean"):
            self.on_disk.drop_parts(part, key)

    def _confirm(self, frozen: dict[str, pl.DataFrame], progress: Progress, key: str) -> dict[str, pl.DataFrame]:
        """Exact ablations of the frozen lists on the confirm split, and the controls; writes each list with its figures."""
        c, confirming = self.config, self.of_split("confirm")
        firing = self.on_disk.in_units(
            "firing",
            key,
            confirming,
            progress,
            lambda unit, within: tables.firing_table(self.rm, self.saes, self.tokens, self.ids, unit),
        )
        ordered = {site: self._ordered(firing[site]) for site in self.sites}
        listed = {site: list_["feature"].to_list() for site, list_ in frozen.items()}
        asked = {
            site: pairs_a_prompt(ordered[site], listed[site], c.confirm_prompts, c.confirm_pairs) for site in self.sites
        }
        confirmed = self._ablated("confirm", key, asked, progress, endings=True)
        self._strong({s: strongest(ordered[s], listed[s], c.confirm_prompts) for s in self.sites}, key, progress)
        ends = flags.endings(self.rm, self.tokens, self.ids, confirming)
        unrelated = self._unrelated(asked, confirmed, progress, key)
        means = self._to_mean(asked, progress, key)
        for site, list_ in frozen.items():
            ending = flags.ending_features(confirmed[site], firing[site], ends)
            list_ = (
                list_.join(firing_counts(ordered[site], len(confirming)), on="feature", how="left")
                .with_columns(pl.col("prompts", "fire_pairs").fill_null(0), pl.col("feature").is_in(ending).alias("ending"))
                .join(unrelated[site], on="feature", how="left")
                .join(
                    means[site].group_by("feature").agg(pl.col("effect").mean().alias("to_mean")), on="feature", how="left"
                )
            )
            write_table(self.folder / "effects" / site / "frozen.parquet", list_)
        return confirmed

    def _strong(self, asked: dict[str, pl.DataFrame], key: str, progress: Progress) -> None:
        """Exact ablations where the frozen features fire hardest."""
        for site, table in self._ablated("strong", key, asked, progress).items():
            which = asked[site].select("pair", "side", "feature", "strong")
            joined = table.join(which, on=["pair", "side", "feature"], how="left", maintain_order="left")
            write_table(self.folder / "effects" / site / "strong.parquet", joined)

    def _unrelated(
        self, asked: dict[str, pl.DataFrame], confirmed: dict[str, pl.DataFrame], progress: Progress, key: str
    ) -> dict[str, pl.DataFrame]:
        """How far the frozen features move unrelated completions of the prompts that they were confirmed on."""
        tried = {site: flags.first_pairs(rows) for site, rows in asked.items()}
        pairs = {i: self.pairs[i] for i in self.of_split("confirm")}
        wanted = sorted({self.index[p] for rows in tried.values() for p in rows["pair"]})
        swapped = flags.unrelated(self.rm, pairs, self.prompts, wanted, self.config.seed)
        tokens, on = [swapped.get(i, t) for i, t in enumerate(self.tokens)], [self.ids[i] for i in swapped]
        tried = {site: rows.filter(pl.col("pair").is_in(on)) for site, rows in tried.items()}
        requests = {site: rows.with_columns(pl.lit("chosen").alias("side")) for site, rows in tried.items()}
        moved = self._ablated("unrelated", key, requests, progress, tokens=tokens)
        return {site: flags.unrelated_share(confirmed[site], moved[site], tried[site]) for site in self.sites}

    def _to_mean(self, asked: dict[str, pl.DataFrame], progress: Progress, key: str) -> dict[str, pl.DataFrame]:
        """Dense features set to their mean instead of 0, on the same responses."""
        dense = {s: rows.filter(pl.col("feature").is_in(self.census[s].having("dense"))) for s, rows in asked.items()}
        means = {site: self.census[site].f_mean for site in self.sites}
        wanted = tables.plan(dense, self.index)

        def make(unit: list[int], within: Progress) -> dict[str, pl.DataFrame]:
            part = {p: wanted[p] for p in unit}
            return flags.mean_table(self.rm, self.saes, means, self.tokens, self.ids, part)

        made = self.on_disk.in_units("mean", key, list(wanted), progress, make)
        return made or make([], progress)

    def _ordered(self, table: pl.DataFrame) -> pl.DataFrame:
        return tables.with_order(table, self.prompts, self.config.seed)

    def _ablated(
        self,
        name: str,
        key: str,
        requests: dict[str, pl.DataFrame],
        progress: Progress,
        endings: bool = False,
        tokens: list[PairTokens] | None = None,
    ) -> dict[str, pl.DataFrame]:
        wanted = tables.plan(requests, self.index)

        def make(unit: list[int], within: Progress) -> dict[str, pl.DataFrame]:
            part = {p: wanted[p] for p in unit}
            return tables.ablation_table(self.rm, self.saes, tokens or self.tokens, self.ids, part, within, endings)

        return self.on_disk.in_units(name, key, list(wanted), progress, make) or make([], progress)

    def _rank(self, _progress: Progress, _key: str) -> None:
        frozen = {s: pl.read_parquet(self.folder / "effects" / s / "frozen.parquet") for s in self.sites}
        confirmed, strong = ({s: self.confirmed(s, name) for s in self.sites} for name in ("exact", "strong"))
        ranked = confirm(frozen, confirmed, self.sd, self.config.seed, strong=strong)
        for site, table in ranked.items():
            write_table(self.folder / "features" / f"{site}.parquet", self._described(site, table, frozen[site]))
            rows = pl.read_parquet(self.folder / "effects" / site / "trust.parquet").with_columns(
                (pl.col("pair") + "/" + pl.col("side")).alias("response")
            )
            write_json(
                self.folder / "effects" / site / "trust.json",
                trust(rows, self.sd, self.noise_floor).as_dict(),
            )

    def _described(self, site: str, table: pl.DataFrame, frozen: pl.DataFrame) -> pl.DataFrame:
        """Adds firing rates, what the controls found, flags and an empty label."""
        table = table.join(frozen.select("feature", "ending", "unrelated", "to_mean"), on="feature", how="left")
        features, counted = table["feature"].to_list(), self.census[site]
        found = {
            "length": table["length_bound"],
            "ending": table["ending"],
            "nonspecific": (table["unrelated"] >= flags.NONSPECIFIC).fill_null(False),
            "strong": table["reported"] & (table["q"] >= Q),
        }
        named = [counted.flags_of(f) + [name for name, has in found.items() if has[i]] for i, f in enumerate(features)]
        rates = ("fire_prompt", "fire_chosen", "fire_rejected")
        return table.with_columns(
            *(pl.Series(name, getattr(counted, name)[features], dtype=pl.Float64) for name in rates),
            pl.Series("flags", named, dtype=pl.List(pl.String)),
            pl.lit(None, dtype=pl.String).alias("label"),
        ).select([*(c for c in SCHEMA if c != "length_bound"), *rates, "unrelated", "to_mean", "flags", "label"])

    def _ledger(self, progress: Progress, key: str) -> None:
        measured = self.one_a_prompt(self.of_split("measure"), self.config.ledger_pairs)
        halvings = self.config.ledger_halvings
        for site in self.sites:
            start = self.baseline(site)

            def make(
                unit: list[int], within: Progress, site: str = site, start: Baseline = start
            ) -> dict[str, pl.DataFrame]:
                rows = list(ledger_rows(self.rm, self.saes[site], site, self.tokens, unit, start, self.sd, within, halvings))
                return tables.ledger_tables(sorted(rows, key=lambda r: r[0]), self.ids)

            paths = {
                "ledger": self.folder / "ledger" / f"{site}.parquet",
                "contribution": self.folder / "effects" / site / "contribution.parquet",
            }
            if not measured:
                for name, table in tables.ledger_tables([], self.ids).items():
                    write_table(paths[name], table)
            self.on_disk.stream_units(f"ledger-{site}", key, measured, progress, make, paths.__getitem__)
        for site in self.sites:
            self.on_disk.drop_parts(f"ledger-{site}", key)

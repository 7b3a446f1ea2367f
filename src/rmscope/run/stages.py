"""The pipeline as a list of stages. A stage is a function, the settings that it depends on, and the files that it leaves.

    pairs -> preflight -> scores -> text baseline -> activations -> SAEs -> estimates -> screen -> concepts
    -> exact ablations -> ranking -> direction null -> SAEs of other seeds -> effects on the measure split
    -> ledgers -> evidence

Each stage also depends on the stage before it. One whose settings, files and predecessors are unchanged is skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import polars as pl

from rmscope.activations.harvest import harvest as harvest_streams
from rmscope.effects import tables
from rmscope.effects.ledger import Baseline, ledger_rows
from rmscope.io import Progress, silent, write_json, write_table
from rmscope.model.checks import preflight as check_pm
from rmscope.model.reward_model import RewardModel
from rmscope.model.site_names import parts_of
from rmscope.ranking import flags
from rmscope.ranking.confirm import SCHEMA, Q, confirm
from rmscope.ranking.estimate_quality import estimate_quality
from rmscope.run.ablate import CONCEPTS, ablate
from rmscope.run.collect import collect
from rmscope.run.data import RunData
from rmscope.run.directions import directions
from rmscope.run.group import group
from rmscope.run.inputs import PairSet, need_prompts
from rmscope.run.measure import measure
from rmscope.run.screen import screen
from rmscope.run.text import fit_baseline
from rmscope.run.train import train, train_again

Work = Callable[[RunData, Progress, str], None]
"""What a stage does; the string is its key, under which it may keep parts of its work."""


@dataclass(frozen=True)
class Stage:
    """One stage of the pipeline."""

    name: str
    work: Work
    settings: str = ""
    """Names of the settings that it depends on."""
    outputs: str = ""
    """The files that it leaves; {site} stands for each site, {part} for each of its parts."""
    is_shared: bool = False
    """Whether it is made of units of pairs, which several processes share."""
    of_saes: bool = False
    """Whether it depends on the weights of the SAEs that the settings bring, or go on from."""

    def key(self, run: RunData) -> Any:
        """What decides, beside the stages before, whether the stage is done."""
        given = run.config.model_dump(mode="json", include=set(self.settings.split()))
        saes = [*run.brought_saes.values(), *run.initial_saes.values()] if self.of_saes else []
        return given, run.sites, [sae.identity() for sae in saes]

    def files(self, sites: Sequence[str]) -> list[str]:
        named = [(site, part) for site in sites for part in parts_of(site)]
        return list(dict.fromkeys(f.format(site=s, part=p) for f in self.outputs.split() for s, p in named))

    def bind(self, run: RunData) -> Callable[[Progress, str], None]:
        return lambda progress, key: self.work(run, progress, key)


def preflight(run: RunData, progress: Progress, _key: str) -> None:
    """Checks the PM on the pairs, and measures its noise floor."""
    result = check_pm(run.rm, run.inputs.scored.tokens, progress)
    write_json(run.folder / "preflight.json", {"noise_floor": result.noise_floor, "checks": result.rows()})


def score(run: RunData, progress: Progress, key: str) -> None:
    """Rewards of both sides of every pair."""
    scored = run.inputs.scored

    def make(unit: list[int], within: Progress) -> dict[str, pl.DataFrame]:
        return {"scores": score_table(run.rm, scored.only(unit), within)}

    table = run.on_disk.in_units("score", key, range(len(scored.pairs)), progress, make)["scores"]
    write_table(run.folder / "scores.parquet", table)
    run.on_disk.drop_parts("score", key)


def score_table(rm: RewardModel, pairs: PairSet, progress: Progress = silent) -> pl.DataFrame:
    """Rewards, their difference, lengths and the split of every pair."""
    scores, tokens = rm.score_tokens(pairs.tokens, progress, pairs.ids), pairs.tokens
    table = {
        "pair": pairs.ids,
        "chosen": scores.chosen.numpy(),
        "rejected": scores.rejected.numpy(),
        "delta": scores.delta.numpy(),
        "n_chosen": np.array([t.chosen.numel() for t in tokens], dtype=np.int32),
        "n_rejected": np.array([t.rejected.numel() for t in tokens], dtype=np.int32),
        "divergence": np.array([t.divergence for t in tokens], dtype=np.int32),
        "split": pairs.splits,
    }
    return pl.DataFrame(table)


def fit_text(run: RunData, progress: Progress, _key: str) -> None:
    """What text statistics alone say of Δr."""
    need_prompts(run.pair_set, run.config.data)
    progress(0, 1, "choosing words, phrases and style")
    fit_baseline(run)
    progress(1, 1, "")


def harvest(run: RunData, progress: Progress, key: str) -> None:
    """The stream of the fit split at every site."""
    fit = [run.pairs[i] for i in run.of_split("fit")]
    parts = run.on_disk.part_folder("harvest", key)
    harvest_streams(run.rm, fit, run.sites, run.folder / "activations", progress, run.on_disk.ranks, parts)
    run.on_disk.drop_parts("harvest", key)


def estimate(run: RunData, progress: Progress, key: str) -> None:
    """Estimated ablation effects of every active feature on the fit split."""
    run.on_disk.stream_units(
        "estimate",
        key,
        run.pair_set.one_per_prompt(run.of_split("fit"), run.config.estimate_pairs or len(run.pairs)),
        progress,
        lambda unit, within: tables.estimate_table(run.rm, run.saes, run.tokens, run.ids, unit, within, run.config.estimate),
        lambda site: run.folder / "effects" / site / "estimated.parquet",
    )
    run.on_disk.drop_parts("estimate", key)


def rank(run: RunData, _progress: Progress, _key: str) -> None:
    """The tests on the confirm split, the flags, and the quality of the estimate."""
    controls = {s: pl.read_parquet(run.folder / "effects" / s / "controls.parquet") for s in run.sites}
    frozen = {s: run.frozen(s).join(controls[s], on="feature", how="left", maintain_order="left") for s in run.sites}
    exact, strong = {s: run.confirmed(s) for s in run.sites}, {s: run.confirmed(s, "strong") for s in run.sites}
    ranked = confirm(frozen, exact, run.sd, run.config.seed, strong=strong)
    for site, table in ranked.items():
        folder = run.folder / "effects" / site
        write_table(run.folder / "features" / f"{site}.parquet", _described(run, site, table, frozen[site]))
        response = (pl.col("pair") + "/" + pl.col("side")).alias("response")
        sample = pl.read_parquet(folder / "quality_sample.parquet").with_columns(response)
        write_json(folder / "estimate_quality.json", asdict(estimate_quality(sample, run.sd, run.noise_floor)))
    write_table(run.folder / "concepts.parquet", _ranked_concepts(run))


def _described(run: RunData, site: str, table: pl.DataFrame, frozen: pl.DataFrame) -> pl.DataFrame:
    """Adds firing rates, what the controls found, and flags."""
    table = table.join(frozen.select("feature", "ending", "unrelated", "to_mean"), on="feature", how="left")
    features, statistics = table["feature"].to_list(), run.feature_statistics[site]
    own = _control_flags(table)
    rates = ("fire_prompt", "fire_chosen", "fire_rejected")
    return table.with_columns(
        *(pl.Series(name, getattr(statistics, name)[features], dtype=pl.Float64) for name in rates),
        pl.Series("flags", [statistics.flags_of(f) + own[i] for i, f in enumerate(features)], dtype=pl.List(pl.String)),
    ).select([*(c for c in SCHEMA if c != "length_bound"), *rates, "unrelated", "to_mean", "flags"])


def _control_flags(table: pl.DataFrame) -> list[list[str]]:
    """The flags that the controls gave each row of a ranking."""
    has = {
        "length": table["length_bound"],
        "ending": table["ending"],
        "nonspecific": (table["unrelated"] >= flags.NONSPECIFIC).fill_null(False),
        "strong": table["reported"] & (table["q"] >= Q),
    }
    return [[flag for flag, rows in has.items() if rows[i]] for i in range(table.height)]


def _ranked_concepts(run: RunData) -> pl.DataFrame:
    """The same test for concepts. They have the flags of the controls, and those that all of their features share."""
    listed, controls = run.frozen_concepts, pl.read_parquet(run.folder / CONCEPTS / "controls.parquet")
    frozen = listed.select(pl.col("concept").alias("feature"), "fit_effect", "sign", "sign_diff")
    frozen = frozen.join(controls, on="feature", how="left", maintain_order="left")
    exact, strong = (run.on_confirm(run.joint_effects(kind)) for kind in ("exact", "strong"))
    ranked = confirm({CONCEPTS: frozen}, {CONCEPTS: exact}, run.sd, run.config.seed, strong={CONCEPTS: strong})[CONCEPTS]
    ranked = ranked.join(controls.select("feature", "ending", "unrelated"), on="feature", how="left")
    table = listed.drop("sign_diff").join(ranked, left_on="concept", right_on="feature", how="left").sort("rank")
    marks = []
    for row, own in zip(table.iter_rows(named=True), _control_flags(table), strict=True):
        statistics = run.feature_statistics[row["site"]]
        shared = set.intersection(*(set(statistics.flags_of(j)) for j in row["features"]))
        marks.append([*sorted(shared), *own])
    form = (pl.col("form") | pl.col("ending")).alias("form")
    return table.with_columns(form, pl.Series("flags", marks, dtype=pl.List(pl.String))).drop("length_bound", "ending")


def decompose(run: RunData, progress: Progress, key: str) -> None:
    """The ledgers of some pairs of the measure split."""
    measured = run.pair_set.one_per_prompt(run.of_split("measure"), run.config.ledger_pairs)
    halvings = run.config.ledger_halvings
    for site in run.sites:
        start = run.baseline(site)

        def make(unit: list[int], within: Progress, site: str = site, start: Baseline = start) -> dict[str, pl.DataFrame]:
            rows = list(ledger_rows(run.rm, run.saes[site], site, run.tokens, unit, start, run.sd, within, halvings))
            return tables.ledger_tables(sorted(rows, key=lambda r: r[0]), run.ids)

        paths = {
            "ledger": run.folder / "ledger" / f"{site}.parquet",
            "contribution": run.folder / "effects" / site / "contribution.parquet",
        }
        if not measured or site not in run.ledger_sites:
            for name, table in tables.ledger_tables([], run.ids).items():
                write_table(paths[name], table)
            continue
        run.on_disk.stream_units(f"ledger-{site}", key, measured, progress, make, paths.__getitem__)
    for site in run.sites:
        run.on_disk.drop_parts(f"ledger-{site}", key)


STAGES = (
    Stage("preflight", preflight, "dtype", "preflight.json"),
    Stage("score", score, "dtype", "scores.parquet", is_shared=True),
    Stage("text", fit_text, "top_share top_pairs", "baseline.json"),
    Stage("harvest", harvest, "", "activations/{part}/manifest.json", is_shared=True),
    Stage(
        "train",
        train,
        "sae diff_features diff_k diff_tokens reward_aware",
        "saes/{part}/cfg.json",
        is_shared=True,
        of_saes=True,
    ),
    Stage("estimate", estimate, "estimate estimate_pairs seed", "effects/{site}/estimated.parquet", is_shared=True),
    Stage(
        "screen",
        screen,
        "screen others responses quality_responses frozen",
        "effects/{site}/frozen.parquet effects/{site}/others.parquet",
        is_shared=True,
    ),
    Stage("group", group, "concepts", "concepts/frozen.parquet"),
    Stage(
        "ablate",
        ablate,
        "confirm_prompts feature_prompts confirm_pairs",
        "effects/{site}/exact.parquet effects/{site}/strong.parquet concepts/exact.parquet concepts/firing.parquet",
        is_shared=True,
    ),
    Stage("rank", rank, "", "features/{site}.parquet concepts.parquet"),
    Stage("directions", directions, "null_prompts seed", "concepts/directions.parquet", is_shared=True),
    Stage("seeds", train_again, "seeds", "saes/seeds.json", is_shared=True),
    Stage(
        "measure", measure, "measure_prompts", "concepts/measured.parquet concepts/measured_effects.parquet", is_shared=True
    ),
    Stage("decompose", decompose, "ledger_pairs ledger_halvings baseline", "ledger/{site}.parquet", is_shared=True),
    Stage("evidence", collect, "", "evidence/evidence.json evidence/tokens.parquet evidence/vocabulary.parquet"),
)
"""In order. The thresholds of the ranking are constants; :data:`rmscope.run.folder.FORMAT` is raised with them."""

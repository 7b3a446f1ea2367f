"""The stage of concepts: frozen features are grouped on the fit split, and the groups are ablated on the confirm split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from rmscope.effects import tables
from rmscope.io import Progress, write_table
from rmscope.model.rendering import PairTokens
from rmscope.ranking import flags
from rmscope.ranking.candidates import firing_counts, pairs_a_prompt, strongest
from rmscope.ranking.concepts import Concept, build_concepts, concept_activations, response_windows
from rmscope.ranking.confirm import Q, confirm
from rmscope.ranking.names import Name, NamedText
from rmscope.run.ablate import unrelated_completions
from rmscope.run.data import RunData

CONCEPTS = "concepts.parquet"
ELSEWHERE = pl.List(pl.Struct({"site": pl.String, "features": pl.List(pl.Int32)}))
SCHEMA: dict[str, Any] = {
    "concept": pl.Int32, "name": pl.String, "form": pl.Boolean, "site": pl.String, "features": pl.List(pl.Int32),
    "weights": pl.List(pl.Float64), "elsewhere": ELSEWHERE, "sign": pl.Int8, "fit_effect": pl.Float64,
}  # fmt: skip


def group(run: RunData, progress: Progress, key: str) -> None:
    """Writes ``concepts.parquet`` (one row per frozen concept) and ``effects/concepts.parquet`` (their joint ablations)."""
    concepts = build_concepts(run.store, run.saes, {site: _frozen(run, site) for site in run.sites})
    names = name_concepts(run, concepts)
    firing = concept_firings(run, concepts)
    confirming = run.of_split("confirm")
    ordered = tables.with_order(firing, run.prompts, run.config.seed)
    numbers = list(range(len(concepts)))
    asked = pairs_a_prompt(ordered, numbers, run.config.confirm_prompts, run.config.confirm_pairs)
    exact = joint_ablations(run, "joint", key, concepts, asked, progress, endings=True)
    hardest = strongest(ordered, numbers, run.config.confirm_prompts)
    which = hardest.select("pair", "side", "feature", "strong", "prompt")
    strong = joint_ablations(run, "joint-strong", key, concepts, hardest, progress).join(
        which, on=["pair", "side", "feature"]
    )
    tried, tokens = unrelated_completions(run, {"": asked})
    swapped = tried[""].with_columns(pl.lit("chosen").alias("side"))
    moved = joint_ablations(run, "unrelated-joint", key, concepts, swapped, progress, tokens=tokens)
    unrelated = flags.unrelated_share(exact, moved, tried[""])
    ending = flags.ending_features(exact, firing, flags.endings(run.rm, run.tokens, run.ids, confirming))
    frozen = pl.DataFrame(
        {
            "feature": numbers,
            "fit_effect": [c.fit_effect for c in concepts],
            "sign": [c.sign for c in concepts],
            "sign_diff": _preference_signs(run, concepts),
        },
        schema={"feature": pl.Int32, "fit_effect": pl.Float64, "sign": pl.Int8, "sign_diff": pl.Int8},
    )
    frozen = frozen.join(firing_counts(ordered, len(confirming)), on="feature", how="left").with_columns(
        pl.col("prompts", "fire_pairs").fill_null(0)
    )
    lengths = run.scores.select("pair", "delta", (pl.col("n_chosen") - pl.col("n_rejected")).alias("length_difference"))
    prompt = pl.col("pair").replace_strict(run.prompts, return_dtype=pl.String).alias("prompt")
    confirmed = exact.join(lengths, on="pair").with_columns(prompt)
    ranked = confirm({"": frozen}, {"": confirmed}, run.sd, run.config.seed, strong={"": strong})[""]
    told = _told(concepts, names)
    table = told.join(ranked.join(unrelated, on="feature", how="left"), left_on="concept", right_on="feature")
    statistics = run.feature_statistics
    marks = []
    for row in table.iter_rows(named=True):
        of_members = [set(statistics[row["site"]].flags_of(j)) for j in row["features"]]
        shared = sorted(set.intersection(*of_members)) if of_members else []
        own = {
            "length": bool(row["length_bound"]),
            "ending": row["concept"] in ending,
            "nonspecific": (row["unrelated"] or 0.0) >= flags.NONSPECIFIC,
            "strong": row["reported"] and row["q"] >= Q,
        }
        marks.append([*shared, *(name for name, has in own.items() if has)])
    table = table.with_columns(pl.Series("flags", marks, dtype=pl.List(pl.String))).with_columns(
        (pl.col("form") | pl.col("flags").list.contains("ending")).alias("form")
    )
    write_table(run.folder / "effects" / "concepts.parquet", exact.rename({"feature": "concept"}))
    write_table(run.folder / CONCEPTS, table.drop("length_bound").sort("rank"))
    for part in ("joint", "joint-strong", "unrelated-joint"):
        run.on_disk.drop_parts(part, key)


def _frozen(run: RunData, site: str) -> pl.DataFrame:
    """The frozen features of a site with their estimated effect per unit of activation, and the fit prompts they fire on."""
    norms = run.saes[site].W_dec.norm(dim=1).numpy()
    prompt = pl.col("pair").replace_strict(run.prompts, return_dtype=pl.String).alias("prompt")
    estimated = (
        run.effects(site, "estimated")
        .with_columns(prompt)
        .group_by("feature")
        .agg(
            (pl.col("effect").sum() / pl.col("mass").sum()).alias("per_mass"),
            pl.col("prompt").n_unique().alias("fit_prompts"),
        )
    )
    frozen = pl.read_parquet(run.folder / "effects" / site / "frozen.parquet").select("feature", "sign", "fit_effect")
    norm = pl.Series("norm", norms[frozen["feature"].to_numpy()])
    joined = frozen.with_columns(norm).join(estimated, on="feature", how="left", maintain_order="left")
    return joined.with_columns((pl.col("per_mass") * pl.col("norm")).alias("rate"))


def name_concepts(run: RunData, concepts: Sequence[Concept]) -> list[Name]:
    """A name for each concept, from the stored responses of the fit split."""
    if not concepts:
        return []
    site, tokenizer = concepts[0].site, run.rm.tokenizer
    keep, _ = response_windows(run.store, site)
    token, pair, region = (run.store.column(site, name).numpy()[keep] for name in ("token", "pair", "region"))
    response = pair.astype(np.int64) * 3 + region
    text = NamedText(token, response, lambda t: tokenizer.decode([t]), tokenizer.all_special_ids)
    return [text.name(concept_activations(run.store, run.saes[c.site], c)[1]) for c in concepts]


def concept_firings(run: RunData, concepts: Sequence[Concept]) -> pl.DataFrame:
    """pair, side, feature (the concept's number), effect (Σ_t of its activation), ending: where concepts fire on confirm."""
    parts = [pl.DataFrame(schema=tables.SCHEMA | {"ending": pl.Float32})]
    for number, c in enumerate(concepts):
        weights = pl.DataFrame(
            {"feature": c.features, "weight": c.weights}, schema={"feature": pl.Int32, "weight": pl.Float64}
        )
        fires = pl.read_parquet(run.folder / "effects" / c.site / "firing.parquet").join(weights, on="feature")
        total = [(pl.col(name) * pl.col("weight")).sum().alias(name) for name in ("effect", "ending")]
        by_response = fires.group_by("pair", "side", "kind", maintain_order=True).agg(total)
        own = by_response.with_columns(pl.lit(number).alias("feature"))
        parts.append(own.select(pl.col(name).cast(dtype) for name, dtype in parts[0].schema.items()))
    return pl.concat(parts)


def _preference_signs(run: RunData, concepts: Sequence[Concept]) -> list[int]:
    """The sign of Σ (R chosen - R rejected) on the fit split, from the members' estimated effects."""
    signs = []
    for c in concepts:
        estimated = run.effects(c.site, "estimated").filter(pl.col("feature").is_in(c.features))
        signed = pl.when(pl.col("side") == "chosen").then(pl.col("effect")).otherwise(-pl.col("effect"))
        signs.append(int(np.sign(estimated.select(signed.cast(pl.Float64).sum()).item() or 0.0)))
    return signs


def joint_ablations(
    run: RunData,
    name: str,
    key: str,
    concepts: Sequence[Concept],
    asked: pl.DataFrame,
    progress: Progress,
    endings: bool = False,
    tokens: Sequence[PairTokens] | None = None,
) -> pl.DataFrame:
    """Joint exact ablations: pair, side, feature (the concept's number), effect, kind; kept unit by unit under ``name``."""
    wanted = tables.plan({"": asked}, run.pair_set.index)
    members = [(c.site, c.features) for c in concepts]

    def make(unit: list[int], within: Progress) -> dict[str, pl.DataFrame]:
        part = {p: wanted[p] for p in unit}
        groups = {p: {side: by[""] or [] for side, by in sides.items()} for p, sides in part.items()}
        return {"": tables.group_table(run.rm, run.saes, members, tokens or run.tokens, run.ids, groups, within, endings)}

    made = run.on_disk.in_units(name, key, list(wanted), progress, lambda u, w: {"all": make(u, w)[""]})
    return made["all"] if made else make([], progress)[""]


def _told(concepts: Sequence[Concept], names: Sequence[Name]) -> pl.DataFrame:
    rows = [
        (i, n.text, n.form, c.site, list(c.features), list(c.weights), _elsewhere(c), c.sign, c.fit_effect)
        for i, (c, n) in enumerate(zip(concepts, names, strict=True))
    ]
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


def _elsewhere(concept: Concept) -> list[dict[str, Any]]:
    return [{"site": site, "features": list(features)} for site, features in concept.elsewhere]

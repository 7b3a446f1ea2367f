"""The stage of concepts: frozen features are grouped on the fit split and named, before anything is tested."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from rmscope.io import Progress, write_table
from rmscope.ranking.concepts import Concept, build_concepts, concept_activations, response_windows
from rmscope.ranking.names import Name, WordIndex
from rmscope.run.data import RunData

SHOWN = 5
"""Concepts that are named while the run goes on."""
ELSEWHERE = pl.List(pl.Struct({"site": pl.String, "features": pl.List(pl.Int32)}))
SCHEMA: dict[str, Any] = {
    "concept": pl.Int32, "name": pl.String, "form": pl.Boolean, "site": pl.String, "features": pl.List(pl.Int32),
    "weights": pl.List(pl.Float64), "elsewhere": ELSEWHERE, "sign": pl.Int8, "fit_effect": pl.Float64, "sign_diff": pl.Int8,
}  # fmt: skip


def group(run: RunData, progress: Progress, _key: str) -> None:
    """Writes ``concepts/frozen.parquet``, one row per concept, the largest effect on the fit split first."""
    progress(0, 2, "grouping features")
    concepts = build_concepts(run.store, run.saes, {site: _frozen(run, site) for site in run.sites}, run.config.concepts)
    progress(1, 2, "naming concepts")
    names = name_concepts(run, concepts)
    if content := [name.text for name in names if not name.form][:SHOWN]:
        run.display.note(f"to be tested, among {len(concepts)} concepts: {'; '.join(content)}")
    rows = [
        (
            i, name.text, name.form, c.site, list(c.features), list(c.weights),
            [{"site": site, "features": list(features)} for site, features in c.elsewhere],
            c.sign, c.fit_effect, _preference_sign(run, c),
        )
        for i, (c, name) in enumerate(zip(concepts, names, strict=True))
    ]  # fmt: skip
    write_table(run.folder / "concepts" / "frozen.parquet", pl.DataFrame(rows, schema=SCHEMA, orient="row"))
    progress(2, 2, "")


def _frozen(run: RunData, site: str) -> pl.DataFrame:
    """The frozen features of a site with their estimated effect per unit of activation, and the fit prompts they fire on."""
    norms = run.saes[site].W_dec.norm(dim=1).numpy()
    prompt = pl.col("pair").replace_strict(run.prompts, return_dtype=pl.String).alias("prompt")
    per_mass = (pl.col("effect").sum() / pl.col("mass").sum()).alias("per_mass")
    estimated = (
        run.effects(site, "estimated")
        .with_columns(prompt)
        .group_by("feature")
        .agg(per_mass, pl.col("prompt").n_unique().alias("fit_prompts"))
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
    text = WordIndex(token, response, lambda t: tokenizer.decode([t]), tokenizer.all_special_ids)
    return [text.name(concept_activations(run.store, run.saes[c.site], c)[1]) for c in concepts]


def _preference_sign(run: RunData, concept: Concept) -> int:
    """The sign of Σ (R chosen - R rejected) on the fit split, from the members' estimated effects."""
    estimated = run.effects(concept.site, "estimated").filter(pl.col("feature").is_in(concept.features))
    signed = pl.when(pl.col("side") == "chosen").then(pl.col("effect")).otherwise(-pl.col("effect"))
    return int(np.sign(estimated.select(signed.cast(pl.Float64).sum()).item() or 0.0))

"""The evidence stage: from a run's tables to all that its pages show, computed once and stored."""

from __future__ import annotations

import datetime
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import polars as pl

from rmscope.effects.ledger import FEWEST, share_rows
from rmscope.io import Progress, write_json, write_table, write_text
from rmscope.model.site_names import parts_of
from rmscope.pairs.demo import plain_demo_pairs, zoo_plants
from rmscope.pairs.pair import Pair, split_of
from rmscope.pairs.planting import twins
from rmscope.pairs.plants import Plant
from rmscope.planted.matching import match_plant
from rmscope.planted.results import Candidate, Candidates
from rmscope.planted.twins import prepare
from rmscope.ranking.concepts import members_of
from rmscope.ranking.confirm import BOUND, power_statement
from rmscope.ranking.feature_statistics import firings
from rmscope.ranking.similarity import merged_ranks
from rmscope.run import brought
from rmscope.run.dashboard import keep_texts
from rmscope.run.data import RunData
from rmscope.run.evidence import (
    BaseEvidence,
    BlockEvidence,
    ConceptEvidence,
    Context,
    Evidence,
    FeatureEvidence,
    Footer,
    Histogram,
    LedgerEvidence,
    LedgerShare,
    ModelEvidence,
    PairsEvidence,
    SaeEvidence,
    ScoreEvidence,
    SiteEvidence,
)
from rmscope.run.examples import Examples, choose_examples, contexts_of
from rmscope.run.reported_set import set_evidence
from rmscope.run.text import named_by_text, text_evidence
from rmscope.run.written import written_evidence
from rmscope.sae import measure_sae
from rmscope.sae.joint import JointSae
from rmscope.statistics import Figure, accuracy, share

FEATURES = 20
"""Features per direction and site that are shown."""
TWINS = 64
"""Twins that a planted cue is measured on in an audit."""
DEMO_TWINS = 48
"""The same in a run on the demo's pairs, which shall be quick."""
POINTS = 600
"""Points of the figure of estimates against exact effects, at most."""


def collect(run: RunData, progress: Progress, key: str) -> None:
    """Writes ``evidence/``: evidence.json, the examples of each site as tables, and the planted truth where it is known."""
    folder, plants = run.folder / "evidence", zoo_plants() if _has_planted_truth(run) else ()
    steps, written = 1 + len(plants), written_evidence(run)
    progress(0, steps, "examples")
    features, concepts = shown_evidence(run)
    sites = []
    for site, shown in features.items():
        sites.append(site_evidence(run, site, shown).model_copy(update={"written": written.get(site)}))
        write_table(folder / f"examples.{site}.parquet", _example_table(shown))
    keep_texts(run)
    planted = []
    candidates = {site: best_reported(run, site) for site in run.sites} if plants else {}
    for i, plant in enumerate(plants):
        progress(1 + i, steps, f"cue {plant.name}")
        cue = partial(_cue, run, plant, candidates)
        planted.append(run.on_disk.keep_json("cues", key, plant.name, cue))
    text = text_evidence(run)
    held_out = _held_out_prompts() if plants else []
    named = {p.name: named_by_text(run, p, twins(held_out, p, DEMO_TWINS, run.config.seed)) for p in plants}
    progress(steps, steps, "")
    if plants:
        write_json(folder / "planted.json", planted)
    evidence = Evidence(
        title=f"What {run.config.model} rewards",
        command=f"rmscope run --model {run.config.model} --data {run.config.data} --out {run.folder.name}",
        made=datetime.date.today().isoformat(),
        model=_model(run),
        data=_pairs(run),
        scores=score_evidence(run.scores, run.prompts),
        noise_floor=run.noise_floor,
        base=_base(run),
        why_no_base=run.inputs.why_no_base,
        text=text.model_copy(update={"cues": named}),
        concepts=concepts,
        reported_set=set_evidence(run),
        sites=sites,
        planted=planted if plants else None,
        footer=Footer(seconds=run.on_disk.seconds, versions=run.on_disk.record["versions"], seed=run.config.seed),
    )
    write_text(folder / "evidence.json", evidence.model_dump_json(indent=1))
    run.__dict__.pop("evidence", None)
    run.on_disk.drop_parts("cues", key)


def _has_planted_truth(run: RunData) -> bool:
    return run.config.data.startswith("demo:") and run.config.data != "demo:plain"


def _model(run: RunData) -> ModelEvidence:
    rm = run.rm
    checks = json.loads((run.folder / "preflight.json").read_text("utf-8"))["checks"]
    if (fits := run.folder / brought.FILE).is_file():
        checks += json.loads(fits.read_text("utf-8"))
    return ModelEvidence(
        name=rm.name,
        blocks=len(rm.blocks),
        d_model=rm.d_model,
        identity=rm.identity,
        rendering=rm.rendering.style
        + (", eos appended" if rm.rendering.append_eos else "")
        + ("" if rm.rendering.bos else ", no bos"),
        preflight=checks,
    )


def _pairs(run: RunData) -> PairsEvidence:
    report, inputs = run.inputs.read_report, run.inputs
    left_out = Counter(reason for _, reason in report.skipped)
    left_out["stands twice"] = report.duplicates
    left_out["scored, but not among the largest |Δr|"] = len(inputs.scored.pairs) - len(run.pairs)
    left_out |= inputs.left_out
    return PairsEvidence(
        name=run.config.data,
        pairs=len(run.pairs),
        prompts=len({p.prompt_key for p in run.pairs}),
        splits=dict(Counter(run.pair_set.splits)),
        left_out={why: n for why, n in left_out.items() if n},
    )


def score_evidence(scores: pl.DataFrame, prompts: Mapping[str, str]) -> ScoreEvidence:
    """Accuracy with its interval (bootstrap by prompt), the length-only baseline, means, and the histogram of Δr.

    ``scores`` has the columns pair, chosen, rejected, delta, n_chosen, n_rejected; ``prompts`` names each pair's prompt.
    """
    delta = scores["delta"].to_numpy().astype(float)
    longer = (scores["n_chosen"] - scores["n_rejected"]).to_numpy()
    counts, edges = np.histogram(delta, bins=min(40, max(5, delta.size // 10)))
    share, length_only = accuracy(delta, longer, np.array([prompts[p] for p in scores["pair"]]))
    return ScoreEvidence(
        accuracy=share,
        length_only=length_only,
        mean_chosen=float(scores["chosen"].mean()),  # type: ignore[arg-type]
        mean_rejected=float(scores["rejected"].mean()),  # type: ignore[arg-type]
        mean_abs_delta=float(np.abs(delta).mean()),
        sd_delta=float(delta.std(ddof=1)),
        histogram=Histogram(edges=edges.tolist(), counts=counts.tolist()),
    )


def site_evidence(run: RunData, site: str, shown: list[FeatureEvidence]) -> SiteEvidence:
    """All that the pages show of a site; ``shown`` are its features with their examples."""
    folder, features = run.folder / "effects" / site, run.features(site)
    sample = pl.read_parquet(folder / "quality_sample.parquet")
    return SiteEvidence(
        site=site,
        saes=_saes(run, site),
        quality=json.loads((folder / "estimate_quality.json").read_text("utf-8")),
        missed=_missed(run, site),
        scatter=sample.select("estimate", "effect").sample(min(POINTS, sample.height), seed=0).rows(),
        ledger=_ledger(run, site),
        frozen=features.height,
        eligible=int(features["eligible"].sum()),
        reported=int(features["reported"].sum()),
        flagged=features.filter(pl.col("reported") & (pl.col("flags").list.len() > 0)).height,
        prefers=int(features["prefers"].sum()),
        bound=BOUND * run.sd,
        power=power_statement(features, run.sd),
        features=shown,
    )


def _missed(run: RunData, site: str) -> Figure:
    """How many of the features that the estimate did not propose it should have proposed."""
    others = pl.read_parquet(run.folder / "effects" / site / "others.parquet")
    return share(int((others["fit_effect"].abs() > BOUND * run.sd).sum()), others.height)


def _saes(run: RunData, site: str) -> list[SaeEvidence]:
    sae, evidence = run.saes[site], list[SaeEvidence]()
    for part, one in zip(parts_of(site), sae.parts if isinstance(sae, JointSae) else [sae], strict=True):
        figures = measure_sae(one, (rows[part] for rows in run.store.training_batches([part], 4096, 1, seed=1)))
        path = run.folder / "saes" / part / "training.parquet"
        evidence.append(
            SaeEvidence(
                site=part,
                architecture=one.architecture,
                d_sae=one.m,
                k=one.cfg.get("k"),
                fvu=figures.fvu,
                l0=figures.l0,
                dead=figures.dead,
                tokens=one.metadata.get("rmscope", {}).get("tokens"),
                curve=pl.read_parquet(path).select("step", "fvu").rows() if path.is_file() else [],
            )
        )
    return evidence


def _ledger(run: RunData, site: str) -> LedgerEvidence | None:
    """None where too few pairs have a ledger for shares with an interval."""
    ledger = run.ledger(site)
    if ledger.height < FEWEST:
        return None
    return LedgerEvidence(
        pairs=ledger.height,
        shares=[LedgerShare(**row) for row in share_rows(ledger, [run.prompts[p] for p in ledger["pair"]])],
        largest_gap=float(ledger["gap"].abs().max()),  # type: ignore[arg-type]
        open=int((~ledger["closed"]).sum()),
    )


def shown_evidence(run: RunData) -> tuple[dict[str, list[FeatureEvidence]], list[ConceptEvidence]]:
    """(by site the features that are shown, the frozen concepts), each with the examples of its ablation."""
    tables = {site: shown_features(run, site) for site in run.sites}
    concepts = run.concepts
    of_features = [feature_examples(run, site, table) for site, table in tables.items()]
    of_concepts = [concept_examples(run, site, concepts) for site in run.sites]
    wanted = [*of_features, *of_concepts]
    contexts: dict[tuple[str, int], list[Context]] = {}
    for one, listed in zip(wanted, contexts_of(run, wanted), strict=True):
        for number, context in zip(one.table["feature"], listed, strict=True):
            contexts.setdefault((one.site if one.weights is None else "", number), []).append(context)
    features = {
        site: [
            FeatureEvidence(**row, tokens=run.top_tokens(site, j), examples=contexts.get((site, j), []))
            for j, row in zip(table["feature"], table.iter_rows(named=True), strict=True)
        ]
        for site, table in tables.items()
    }
    rows = concepts.iter_rows(named=True)
    return features, [ConceptEvidence(**row, examples=contexts.get(("", row["concept"]), [])) for row in rows]


def shown_features(run: RunData, site: str) -> pl.DataFrame:
    """The features that are shown, at most 20 up and 20 down, reported ones first."""
    directions = (pl.col("mean_effect") > 0, pl.col("mean_effect") < 0)
    features = run.features(site)
    return pl.concat([features.filter(direction).head(FEATURES) for direction in directions]).sort("rank")


def feature_examples(run: RunData, site: str, shown: pl.DataFrame) -> Examples:
    """Examples of the features that are shown; of those with the flag ``strong`` among their strong firings."""
    marked = run.features(site).filter(pl.col("flags").list.contains("strong"))
    strong = run.effects(site, "strong").join(marked, on="feature", how="semi")
    exact = pl.concat([run.confirmed(site).join(strong, on="feature", how="anti"), strong], how="diagonal")
    return Examples(site, choose_examples(exact.join(shown, on="feature", how="semi")))


def concept_examples(run: RunData, site: str, concepts: pl.DataFrame) -> Examples:
    """Examples of the joint ablation of the reported concepts that are at home at a site."""
    own = concepts.filter((pl.col("site") == site) & pl.col("reported"))
    listed = own.select("concept", "features", "weights").iter_rows()
    weights = {concept: dict(zip(features, values, strict=True)) for concept, features, values in listed}
    return Examples(site, choose_examples(run.joint_effects().filter(pl.col("feature").is_in(list(weights)))), weights)


def _base(run: RunData) -> BaseEvidence | None:
    if not run.inputs.written_shares or run.rm.base is None:
        return None
    base = run.rm.base
    blocks = [BlockEvidence(**asdict(w)) for w in run.inputs.written_shares]
    return BaseEvidence(name=base.name, first=base.first, changes=base.changes, blocks=blocks)


def _example_table(features: Sequence[FeatureEvidence]) -> pl.DataFrame:
    rows = [
        (f.feature, example.prompt, side.side, "".join(text for text, _ in side.tokens), side.before, side.after)
        for f in features
        for example in f.examples
        for side in example.sides
    ]
    schema = {
        "feature": pl.Int32, "prompt": pl.String, "side": pl.String, "text": pl.String, "before": pl.Float64,
        "after": pl.Float64,
    }  # fmt: skip
    return pl.DataFrame(rows, schema=schema, orient="row")


def _cue(run: RunData, plant: Plant, candidates: Candidates) -> dict[str, Any]:
    """One planted cue against the reported features, on prompts of the measure split and in held-out wordings."""
    prepared = prepare(run.rm, run.saes, twins(_held_out_prompts(), plant, DEMO_TWINS, run.config.seed), plant)
    match = match_plant(run.rm, run.saes, plant, prepared, reported_concepts(run), run.sd)
    if not match.found:
        by_features = match_plant(run.rm, run.saes, plant, prepared, candidates, run.sd)
        match = by_features if by_features.found else match
    return match.model_dump(mode="json")


def _held_out_prompts() -> list[Pair]:
    return [p for p in plain_demo_pairs() if split_of(p) == "measure"]


def reported_concepts(run: RunData) -> dict[str, list[Candidate]]:
    """The reported concepts of each site, without those of the text's ending, as candidates for planted cues."""
    table = run.concepts.filter(pl.col("reported") & ~pl.col("flags").list.contains("ending"))
    strong = pl.col("flags").list.contains("strong")
    consistency = pl.when(strong).then("strong_consistency").otherwise("sign_consistency").alias("sign_consistency")
    rows = table.with_columns(consistency).select("site", "concept", "rank", "mean_effect", "sign_consistency", "flags")
    candidates: dict[str, list[Candidate]] = {site: [] for site in run.sites}
    members = members_of(table)
    for site, concept, rank, effect, same_sign, flags in rows.iter_rows():
        candidates[site].append(Candidate(concept, rank, effect, same_sign, tuple(flags), members[concept]))
    return candidates


def best_reported(run: RunData, site: str, most: int | None = FEATURES) -> list[Candidate]:
    """The best reported features of a site (None: all) without those of the text's ending; similar ones share a rank."""
    table = run.reported(site)[:most]
    features = table["feature"].to_list()
    ranks = merged_ranks(features, run.saes[site].W_dec, firings(run.store, run.saes[site], site, features))
    strong = pl.col("flags").list.contains("strong")
    consistency = pl.when(strong).then("strong_consistency").otherwise("sign_consistency").alias("sign_consistency")
    rows = table.filter(~pl.col("flags").list.contains("ending")).with_columns(consistency)
    columns = rows.select("feature", "mean_effect", "sign_consistency", "flags").iter_rows()
    return [Candidate(j, ranks[j], effect, same_sign, tuple(listed)) for j, effect, same_sign, listed in columns]

"""The demo over three seeds of the SAEs, with and without bfloat16 products, beside SAEs of the whole stream.

Prints the table of docs/difference.md, and for the first run what the concepts of content take away beside as many other
features of like firing rate and mass. A run that is done is not made again; scores and harvest are made once. The runs
``float0`` to ``float2`` harvest and train in float32, as a processor without fast bfloat16 does. *Found again*: the share of
the first run's reported features and concepts that fire like a feature of the SAE of another seed (activations over windows
of text correlate by .7).

usage: difference.py OUT [RUN ...]        runs: seed0, seed1, seed2, float0, float1, float2, whole
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import polars as pl

from rmscope.effects.across import union
from rmscope.effects.written import WRITTEN_PAIRS
from rmscope.evaluation.selection import match_by_traits
from rmscope.hardware import fast_products
from rmscope.ranking.concepts import fire_alike, members_of, window_sums
from rmscope.report.page import concept_group
from rmscope.run.evidence import SetEvidence
from rmscope.run.reported_set import content_concepts, differences_without
from rmscope.run.run import Run
from rmscope.run.settings import DEMO, RunConfig
from rmscope.settings import read_settings
from rmscope.statistics import ratio

WHOLE: dict[str, Any] = {
    "sites": ["resid_post.11", "resid_post.12", "resid_post.13"],
    "sae": {"k": 12, "d_sae": 1728, "tokens": 500_000},
    "estimate_pairs": None,
    "frozen": 200,
    "others": 100,
    "responses": 16,
    "quality_responses": 24,
    "confirm_prompts": 42,
}
"""The demo of release 0.1.0."""
MATCHED_SETS = 12
"""Sets of other features beside the concepts of content."""
RUNS: dict[str, tuple[dict[str, Any], bool]] = {
    **{f"seed{seed}": ({"seed": seed}, True) for seed in range(3)},
    **{f"float{seed}": ({"seed": seed, "sae": {"amp": False}}, False) for seed in range(3)},
    "whole": (WHOLE, True),
}
"""By name: what differs from the demo's settings, and whether the harvest may use bfloat16 products."""


SHARED = ("run.yaml", "preflight.json", "scores.parquet", "baseline.json")
"""What does not depend on the SAEs; runs of one precision share the harvest too."""


def begin(out: Path, name: str) -> None:
    """Copies what a run that is done has in common with a new one: its stages are then skipped."""
    first = out / ("seed0" if name == "float0" else f"{name[:-1]}0")
    if name == "whole" or (out / name).exists() or not first.exists():
        return
    (out / name).mkdir(parents=True)
    for file in SHARED:
        shutil.copy(first / file, out / name / file)
    if name != "float0":
        shutil.copytree(first / "activations", out / name / "activations")


def make(out: Path, name: str) -> Run:
    begin(out, name)
    changes, fast = RUNS[name]
    products = fast_products if fast else lambda _device, wanted: nullcontext()
    with patch("rmscope.activations.harvest.fast_products", products):
        return Run.create(read_settings(RunConfig, None, {**DEMO, **changes, "out": out / name})).go()


def figures(run: Run) -> dict[str, str]:
    """One column of the table."""
    evidence = run.evidence
    planted = [cue for cue in evidence.planted or () if cue.learned]
    told = [c for c in evidence.concepts if c.reported]
    written = [site.written for site in evidence.sites if site.written]
    return {
        "planted biases found": f"{sum(cue.found for cue in planted)} of {len(planted)}",
        "of these by concepts": str(sum(cue.found and bool(cue.concepts) for cue in planted)),
        "reported concepts (of them form)": f"{len(told)} ({sum(c.form for c in told)})",
        "… of content, specific": str(sum(concept_group(c.model_dump()) == "content" for c in told)),
        "… with a flag": str(sum(bool(c.flags) for c in told)),
        "… that hold in fewer than two of three seeds": str(sum("seeds" in c.flags for c in told)),
        "of Δr taken away by concepts of content, by all": _together(evidence.reported_set),
        "reported features": str(sum(site.reported for site in evidence.sites)),
        "… with a flag ": str(sum(site.flagged for site in evidence.sites)),
        "sites": ", ".join(run.sites),
        "delta_r2 of the splice": ", ".join(f"{w.explained.value:.2f}" for w in written),
        "explained of what was written": ", ".join(f"{w.explained_of_written.value:.2f}" for w in written),
        "… by reported concepts alone": ", ".join(f"{w.by_concepts.value:.2f}" for w in written),
        "share carried, by bias": ", ".join(
            f"{cue.name} {cue.carried:.2f}" if cue.found else f"{cue.name} –" for cue in planted
        ),
        "seconds": f"{run.on_disk.seconds:.0f}",
    }


def _together(of: SetEvidence | None) -> str:
    return f"{of.content.value:.2f}, {of.completeness.value:.2f}" if of else "–"


def found_again(run: Run, other: Run) -> str:
    """How many of a run's reported features and concepts the SAEs of another run have too."""
    features, concepts = list[bool](), list[bool]()
    for site in run.sites:
        own, again = (window_sums(run.store, of.saes[site], site, range(of.saes[site].m)) for of in (run, other))
        features += fire_alike(own[:, run.features(site).filter("reported")["feature"].to_list()], again).tolist()
        told = run.concepts.filter(pl.col("reported") & (pl.col("site") == site))
        for members, weights in told.select("features", "weights").iter_rows():
            concepts += fire_alike(own[:, members] @ np.array(weights)[:, None], again).tolist()
    return f"{sum(features)} of {len(features)} features, {sum(concepts)} of {len(concepts)} concepts"


def beside_matched_sets(run: Run) -> str:
    """The share of Δr that goes with the concepts of content, with matched sets of other features, and with all others.

    A matched set has at each site as many features, alike in firing rate and in Σ_t f_tj |d_j|.
    """
    told = run.concepts.filter("reported")
    members = members_of(told)
    content = union([members[c] for c in content_concepts(told)])
    matched = [{site: matched_features(run, site, of, seed) for site, of in content.items()} for seed in range(MATCHED_SETS)]
    others = {site: sorted(set(range(sae.m)) - set(content.get(site, ()))) for site, sae in run.saes.items()}
    places = run.pair_set.one_per_prompt(run.of_split("measure"), WRITTEN_PAIRS)
    delta, left = differences_without(run, places, [content, others, *matched])
    prompts = np.array([run.pairs[i].prompt_key for i in places])
    own, rest, *drawn = (ratio(delta * (delta - some), delta**2, prompts) for some in left)
    shares = sorted(figure.value or 0.0 for figure in drawn)
    return (
        f"concepts of content ({sum(map(len, content.values()))} features) {own.value:.2f} [{own.low:.2f}, {own.high:.2f}]; "
        f"{MATCHED_SETS} matched sets {shares[0]:.2f} to {shares[-1]:.2f}, median {np.median(shares):.2f}; all "
        f"{sum(map(len, others.values()))} other features {rest.value:.2f} [{rest.low:.2f}, {rest.high:.2f}]"
    )


def matched_features(run: Run, site: str, features: Sequence[int], seed: int) -> list[int]:
    """As many features outside a set, each alike one of it in firing rate and mass."""
    of = run.feature_statistics[site]
    rate, mass = of.fire_chosen + of.fire_rejected, (of.f_mean * run.saes[site].W_dec.norm(dim=1)).numpy()
    traits = np.stack([rate + 1e-6, mass + 1e-9], 1)
    return match_by_traits(traits, mass > 0, features, features, seed).tolist()


def main() -> None:
    if len(sys.argv) < 2 or not set(sys.argv[2:]) <= set(RUNS):
        sys.exit(__doc__)
    runs = {name: make(Path(sys.argv[1]), name) for name in sys.argv[2:] or RUNS}
    columns = {name: figures(run) for name, run in runs.items()}
    print(f"| | {' | '.join(columns)} |")
    print("|---|" + "---|" * len(columns))
    for row in next(iter(columns.values())):
        print(f"| {row} | {' | '.join(column[row] or '–' for column in columns.values())} |")
    seeds = [name for name in runs if name.startswith("seed")]
    print(f"\n{next(iter(runs))}: {beside_matched_sets(next(iter(runs.values())))}")
    for name in seeds[1:]:
        print(f"\nOf {seeds[0]}, found again in {name}: {found_again(runs[seeds[0]], runs[name])}")


if __name__ == "__main__":
    main()

"""What text statistics alone explain of a run's Δr, and what its concepts add to them."""

from __future__ import annotations

import numpy as np
import polars as pl

from rmscope.effects.splice import agreement, delta_r2
from rmscope.evaluation.text_baseline import added_by, detects, fit_text_baseline
from rmscope.io import write_text
from rmscope.pairs.pair import Pair
from rmscope.pairs.plants import Plant
from rmscope.report.page import concept_group
from rmscope.run.data import RunData
from rmscope.run.evidence import TextEvidence
from rmscope.statistics import Array, one_minus

NAMED = 0.8
"""A term names a planted cue from this F1 on twins, the bound for features."""


def fit_baseline(run: RunData) -> None:
    """Writes ``baseline.json``, fitted on the fit split."""
    fit = run.of_split("fit")
    baseline = fit_text_baseline([run.pairs[i] for i in fit], _delta(run, fit))
    write_text(run.folder / "baseline.json", baseline.model_dump_json(indent=1))


def _delta(run: RunData, places: list[int]) -> Array:
    """Δr of some of the studied pairs."""
    ids = pl.DataFrame({"pair": [run.ids[i] for i in places]})
    return ids.join(run.scores, on="pair", how="left", maintain_order="left")["delta"].to_numpy().astype(float)


def text_evidence(run: RunData) -> TextEvidence:
    """What the baseline explains of the measure split, and, on the confirm split, what concepts' activations add to it.

    Activations are summed over each response. Concepts of form are left out of the sums of all concepts: late in the model
    they carry the whole reward to the token that is read. On the confirm split the fits for one prompt's pairs are made on
    the pairs of other prompts.
    """
    baseline, measure, confirm = run.text_baseline, run.of_split("measure"), run.of_split("confirm")
    delta = _delta(run, measure)
    hat, prompts = baseline.predict([run.pairs[i] for i in measure]), _prompts(run, measure)
    confirm_delta, confirm_hat = _delta(run, confirm), baseline.predict([run.pairs[i] for i in confirm])[:, None]
    numbers, active = _activation_differences(run, confirm)
    groups = _prompts(run, confirm)
    groups_of = {row["concept"]: concept_group(row) for row in run.concepts.iter_rows(named=True)}
    of_content = active[:, [i for i, number in enumerate(numbers) if groups_of[number] == "content"]]
    text, both = added_by(confirm_delta, confirm_hat, of_content, groups)
    concepts, _ = added_by(confirm_delta, of_content, confirm_hat, groups)
    adds = {}
    for column, number in enumerate(numbers):
        _, with_one = added_by(confirm_delta, confirm_hat, active[:, [column]], groups)
        adds[number] = one_minus((confirm_delta - with_one) ** 2, (confirm_delta - text) ** 2, groups)
    return TextEvidence(
        terms=baseline.terms,
        explained=delta_r2(delta, hat, prompts),
        agreement=agreement(delta, hat, prompts),
        pairs=len(measure),
        text=delta_r2(confirm_delta, text, groups),
        concepts=delta_r2(confirm_delta, concepts, groups),
        both=delta_r2(confirm_delta, both, groups),
        adds=adds,
        confirm_pairs=len(confirm),
    )


def _prompts(run: RunData, places: list[int]) -> Array:
    return np.array([run.pairs[i].prompt_key for i in places])


def _activation_differences(run: RunData, places: list[int]) -> tuple[list[int], Array]:
    """(reported concepts, the activation of each in the chosen minus that in the rejected response)."""
    numbers = run.concepts.filter("reported")["concept"].to_list()
    row, column = {run.ids[i]: k for k, i in enumerate(places)}, {number: k for k, number in enumerate(numbers)}
    differences = np.zeros((len(places), len(numbers)))
    for pair, side, concept, active in run.concept_firings.select("pair", "side", "feature", "effect").iter_rows():
        if concept in column and pair in row:
            differences[row[pair], column[concept]] += active if side == "chosen" else -active
    scale = differences.std(0)
    return numbers, differences / np.where(scale > 0, scale, 1.0)


def named_by_text(run: RunData, plant: Plant, twins: list[Pair]) -> str | None:
    """The first term of the baseline that names a planted cue: it has the planted sign and detects the cue on twins."""
    with_cue, without = [p.chosen for p in twins], [p.rejected for p in twins]
    for term in run.text_baseline.terms:
        if np.sign(term.coefficient) == plant.sign and detects(term, with_cue, without) >= NAMED:
            return term.name
    return None

"""Contributes, sufficient: what each reported feature does when it is ablated, and when it is put in.

Figures come from fresh prompts, those of the measure split. Sentences in which features fire, and their natural activations,
come from the fit split. Definitions: ``classify.py``; docs/method.md, "Sufficiency".
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import polars as pl
import torch

from rmscope.activations.store import ActivationStore
from rmscope.effects.completions import complete
from rmscope.errors import InputError
from rmscope.evaluation.selection import Responses
from rmscope.io import Display, write_json, write_table
from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import Pair, prompts_in_turn
from rmscope.run.run import Run
from rmscope.sae.base import Sae
from rmscope.studies.experiment.conditions import Base, bases_of_pairs
from rmscope.studies.sufficiency.agreement import BLIND, agreement_over_sites, measure_agreement
from rmscope.studies.sufficiency.classify import as_table, classify, count_kinds
from rmscope.studies.sufficiency.contexts import measure_contexts
from rmscope.studies.sufficiency.firing import firing_sentences
from rmscope.studies.sufficiency.insertion import measure_insertions
from rmscope.studies.sufficiency.result import SiteSufficiency, SufficiencyResult
from rmscope.studies.sufficiency.settings import SufficiencyConfig
from rmscope.studies.sufficiency.steering import DIRECTIONS, dose_grid, judge_steering, steer, unit_differences

PAIRS = 128
"""Fresh pairs searched for responses in which the features fire."""


def analyse(run: Run, config: SufficiencyConfig) -> SufficiencyResult:
    """Studies the reported features of a run, and writes tables, figures and one page per site.

    1. Take the reported features of the site, or of every site.
    2. Study each site (:func:`study_site`), and write its tables, figures and page to ``evidence/sufficiency``.
    3. Over several sites, measure the agreement of text with ablation on features of all of them.

    Raises:
        InputError: the run is not finished, it has no SAE at the site or reports no feature there, or its PM cannot be
            resumed at a site (an encoder).
    """
    reported = _reported(run, config.site)  # 1
    result = SufficiencyResult(
        sites=[_study(run, site, features, config.prompts) for site, features in reported.items()]
    )  # 2
    if len(result.sites) > 1:  # 3
        result.agreement = agreement_over_sites({site.site: site.contexts for site in result.sites}, run.config.seed)
        write_json(run.folder / "evidence" / "sufficiency" / "agreement.json", asdict(result.agreement))
    return result


def _reported(run: Run, site: str | None) -> dict[str, pl.DataFrame]:
    sites = run.sites if site is None else [run.check_site(site)]
    reported = {at: table for at in sites if (table := run.reported(at)).height}
    if not reported:
        where = site or "any site"
        raise InputError(f"The run in {run.folder} reports no feature at {where}; rank more, or take another run.")
    if not run.rm.capabilities.resume:
        raise InputError("This PM cannot be resumed at a site, which steering needs; sufficiency studies decoder PMs.")
    return reported


def _study(run: Run, site: str, features: pl.DataFrame, prompts: int) -> SiteSufficiency:
    """A site of a run, written to its folder."""
    started, fit = time.time(), run.of_split("fit")
    fresh = [run.pairs[i] for i in run.of_split("measure")]
    stored, tokens = [run.pairs[i] for i in fit], [run.tokens[i] for i in fit]
    bases = bases_of_pairs(fresh)[:prompts]
    inputs = SiteInputs(run.rm, run.saes[site], site, features, run.store, stored, tokens, bases, fresh)
    result = study_site(inputs, run.display, run.config.seed)
    result.features = [replace(row, tokens=run.top_tokens(site, row.feature)) for row in result.features]
    result.model, result.data, result.sd = run.config.model, run.config.data, run.sd
    result.seconds, result.folder = round(time.time() - started, 1), run.folder / "evidence" / "sufficiency"
    write_table(result.folder / f"{site}.features.parquet", result.table)
    write_table(result.folder / f"{site}.contexts.parquet", result.contexts)
    write_json(result.folder / f"{site}.json", result.as_json())
    result.page().save()
    return result


@dataclass(frozen=True)
class SiteInputs:
    """What a site is studied on."""

    rm: RewardModel
    sae: Sae
    site: str
    features: pl.DataFrame
    """The reported features: feature, mean_effect, flags."""
    store: ActivationStore
    """Stored responses of the fit split; their pair numbers are places in ``fit`` and ``fit_tokens``."""
    fit: Sequence[Pair]
    fit_tokens: Sequence[PairTokens]
    bases: Sequence[Base]
    """Fresh prompts with base responses."""
    fresh: Sequence[Pair]
    """Pairs of the measure split."""


def study_site(inputs: SiteInputs, display: Display, seed: int = 0) -> SiteSufficiency:
    """The reported features of a site; nothing is written.

    1. In the fit split, find each feature's sentences and its natural activations.
    2. Steer by each feature and by other directions of the same norms.
    3. Insert the sentences in fresh responses.
    4. Ablate and double each feature on fresh responses in which it fires; change the text of those drawn blind.
    5. Classify each feature; compare text with ablation.
    """
    rm, sae, site = inputs.rm, inputs.sae, inputs.site
    rows = list(inputs.features.select("feature", "mean_effect", "flags").iter_rows())
    signs = {int(j): 1 if mean > 0 else -1 for j, mean, _ in rows}
    stored = Responses(inputs.store, site)
    sentences, tops = firing_sentences(rm, sae, stored, inputs.fit, inputs.fit_tokens, list(signs))  # 1
    norms = sae.W_dec.norm(dim=1)
    doses = dose_grid({j: tops[j] * float(norms[j]) for j in signs})
    generator = torch.Generator().manual_seed(seed)
    directions = unit_differences(inputs.store.sample(site, 2 * DIRECTIONS, generator))
    with display.stage("steer") as progress:  # 2
        runs = [complete(rm, base.prompt, [base.response], [site])[0] for base in inputs.bases]
        effects, others = steer(rm, sae, site, runs, doses, directions, progress)
    with display.stage("texts") as progress:  # 3
        texts = measure_insertions(rm, sae, site, inputs.bases, sentences, signs, progress)
    blind = np.random.default_rng(seed).permutation(list(signs))[:BLIND].tolist()
    with display.stage("contexts") as progress:  # 4
        contexts = measure_contexts(rm, sae, site, signs, prompts_in_turn(inputs.fresh)[:PAIRS], blind, progress)
    features = []
    for j, _, flags in rows:  # 5
        steering = judge_steering(effects[j], others, signs[j], doses.activations(j, float(norms[j])))
        of_feature = contexts.filter(pl.col("feature") == j)
        features.append(classify(j, signs[j], list(flags), steering, texts[j], of_feature))
    return SiteSufficiency(
        site=site,
        prompts=len(inputs.bases),
        directions=len(directions),
        features=features,
        counts=count_kinds(features),
        agreement=measure_agreement(contexts, seed),
        table=as_table(features),
        contexts=contexts,
    )

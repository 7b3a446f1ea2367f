"""Contributes, sufficient: what each reported feature does when it is ablated, and when it is put in.

Figures come from fresh prompts, those of the measure split. Sentences in which features fire, and their natural activations,
come from the fit split (docs/method.md, "Sufficiency").

A feature is sufficient by steering or by text (``insertion.py``), or it contributes only (exact ablation on fresh responses
changes the reward in its frozen sign), for the first reason that surely holds, or it does neither.
"""

from __future__ import annotations

import time
from dataclasses import asdict, replace

import polars as pl
import torch

from rmscope.effects.completions import complete
from rmscope.errors import InputError
from rmscope.evaluation.selection import Responses
from rmscope.io import write_json, write_table
from rmscope.pairs.pair import prompts_in_turn
from rmscope.run.run import Run
from rmscope.studies.experiment.conditions import bases_of_pairs
from rmscope.studies.sufficiency import contexts, insertion
from rmscope.studies.sufficiency.result import SiteSufficiency, SufficiencyResult, as_table, classify, count_kinds
from rmscope.studies.sufficiency.settings import SufficiencyConfig

PAIRS = 128
"""Fresh pairs searched for responses in which the features fire."""


def analyse(run: Run, config: SufficiencyConfig) -> SufficiencyResult:
    """Studies the reported features of a run, and writes tables, figures and one page per site to ``evidence/sufficiency``.

    1. Take the reported features of the site, or of every site. For each site:
    2. In the fit split, find each feature's sentences and its natural activations.
    3. Steer by each feature and by other directions of the same norms.
    4. Insert the sentences in fresh responses.
    5. Ablate and double each feature on fresh responses in which it fires; change the text of those drawn blind.
    6. Classify each feature; compare text with ablation.
    7. Over several sites, compare text with ablation on features of all of them.

    Raises:
        InputError: the run is not finished, it has no SAE at the site or reports no feature there, or its PM cannot be
            resumed at a site (an encoder).
    """
    sites = run.sites if config.site is None else [run.check_site(config.site)]  # 1
    reported = {site: table for site in sites if (table := run.reported(site)).height}
    if not reported:
        raise InputError(
            f"The run in {run.folder} reports no feature at {config.site or 'any site'}; rank more, or take another run."
        )
    if not run.rm.capabilities.resume:
        raise InputError("This PM cannot be resumed at a site, which steering needs; sufficiency studies decoder PMs.")
    result, folder = SufficiencyResult(sites=[]), run.folder / "evidence" / "sufficiency"
    for site, table in reported.items():
        of_site = _study(run, site, table, config.prompts)
        write_table(folder / f"{site}.features.parquet", of_site.table)
        write_table(folder / f"{site}.contexts.parquet", of_site.contexts)
        write_json(folder / f"{site}.json", of_site.as_json())
        of_site.page().save()
        result.sites.append(of_site)
    if len(result.sites) > 1:  # 7
        of_sites = {site.site: site.contexts for site in result.sites}
        result.agreement = contexts.agreement_over_sites(of_sites, run.config.seed)
        write_json(folder / "agreement.json", asdict(result.agreement))
    return result


def _study(run: Run, site: str, reported: pl.DataFrame, prompts: int) -> SiteSufficiency:
    """Steps 2 to 6: the reported features of one site; nothing is written."""
    started, rm, sae, seed = time.time(), run.rm, run.saes[site], run.config.seed
    signs = {int(j): 1 if mean > 0 else -1 for j, mean in reported.select("feature", "mean_effect").iter_rows()}
    fresh, fit = [run.pairs[i] for i in run.of_split("measure")], run.of_split("fit")
    pairs, tokens = [run.pairs[i] for i in fit], [run.tokens[i] for i in fit]
    bases = bases_of_pairs(fresh)[:prompts]
    sentences, tops = contexts.firing_sentences(rm, sae, Responses(run.store, site), pairs, tokens, list(signs))  # 2
    norms = sae.W_dec.norm(dim=1).tolist()
    doses = insertion.dose_grid({j: tops[j] * norms[j] for j in signs})
    sample = run.store.sample(site, 2 * insertion.DIRECTIONS, torch.Generator().manual_seed(seed))
    directions = torch.nn.functional.normalize(sample[::2] - sample[1::2], dim=1)
    with run.display.stage("steer") as progress:  # 3
        runs = [complete(rm, base.prompt, [base.response], [site])[0] for base in bases]
        effects, others = insertion.steer(rm, sae, site, runs, doses, directions, progress)
    with run.display.stage("texts") as progress:  # 4
        texts = insertion.measure_insertions(rm, sae, site, bases, sentences, signs, progress)
    with run.display.stage("contexts") as progress:  # 5
        table = contexts.measure_contexts(rm, sae, site, signs, prompts_in_turn(fresh)[:PAIRS], seed, progress)
    features = []
    for (j, sign), flags in zip(signs.items(), reported["flags"].to_list(), strict=True):  # 6
        steering = insertion.judge_steering(effects[j], others, sign, (doses[j] / norms[j]).tolist())
        row = classify(j, sign, flags, steering, texts[j], table.filter(pl.col("feature") == j))
        features.append(replace(row, tokens=run.top_tokens(site, j)))
    return SiteSufficiency(
        site=site,
        prompts=len(bases),
        directions=len(directions),
        features=features,
        counts=count_kinds(features),
        agreement=contexts.measure_agreement(table, seed),
        model=run.config.model,
        data=run.config.data,
        sd=run.sd,
        seconds=round(time.time() - started, 1),
        table=as_table(features),
        contexts=table,
        folder=run.folder / "evidence" / "sufficiency",
    )

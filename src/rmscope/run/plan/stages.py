"""The work of each stage of a run, from the counts of a :class:`~rmscope.run.plan.case.Case`.

Scores, harvest and firings are forwards of all pairs of a split. The screen, the ablations and what follows make a clean run
of each response that they touch, and one resumed run for each ablation: features (or concepts) times responses. The stages
``text`` and ``rank`` run no PM; they take seconds per thousand pairs and are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from math import exp

from rmscope.activations.store import COLUMNS
from rmscope.effects.directions import DRAWS
from rmscope.effects.gradients import PROBE_GROUPS
from rmscope.effects.ledger import CUTS, HALVINGS
from rmscope.effects.ledger import NODES as PANEL_NODES
from rmscope.effects.written import WRITTEN_PAIRS
from rmscope.evaluation.reward_aware import RewardAwareConfig
from rmscope.model.checks import PROBES
from rmscope.model.site_names import BASE, is_difference, kind_of, needs_base
from rmscope.ranking.candidates import ELIGIBLE_PROMPTS
from rmscope.ranking.estimate_quality import PER_RESPONSE
from rmscope.ranking.flags import UNRELATED_PROMPTS
from rmscope.run.examples import LARGEST
from rmscope.run.measure import DRAWS as DONORS_EACH
from rmscope.run.plan.case import RARE_CONCEPT, SIDES, Case, pairs_of, parts_in
from rmscope.run.plan.work import Amount, Work, step_work, text_flops
from rmscope.run.size import FIT_PAIRS, SIZES
from rmscope.run.written import KEEP
from rmscope.sae.trainer import MEDIAN_ROWS

ENDING = 0.1
"""The share of a response that is its ending, from which features are ablated once more."""
DENSE = 0.1
"""The share of frozen features that are dense, and are also set to their mean."""
UNRELATED_FIRES = 0.5
"""The share of unrelated completions in which a feature fires."""
REPORTED = 0.6
"""The share of frozen concepts that are reported (18 of 25, zoo:planted; 15 of 30, zoo:hh)."""
NODES = {"diff": 0.0, "both": 9.5, "whole": 6.0}
"""Gradients along a ledger's path for each block after the site, where two panels are not enough: 52, 32 and 12 at three
sites of the whole stream of zoo:hh; 58 with 7 blocks after both.4 there, 33 and 21 with 3 and 2 in zoo:planted; 8.3 at its
difference sites."""
PADDING = {"diff": 1.3, "both": 2.0, "whole": 2.0}
"""What a ledger's batches hold for each token of their pairs: few pairs of unlike lengths, of which some rows go on alone
(measured with 8, 16 and 24 pairs)."""
FIRST_NODES = PANEL_NODES * (len(CUTS) - 1)
MOST_NODES = FIRST_NODES * 2**HALVINGS
IG_NODES = 8
"""Gradients of the estimate ``ig``."""
START_PASSES = 150
"""Passes over a sample of rows before the first step, for their geometric median: 1.45 s at d 576 on one core."""
GROUP_READS = 3
"""How often the stage ``group`` reads the stored responses: by sign, and to name what it grouped."""
METRIC_PASSES = 4
"""Passes over the rows that the figures of an SAE take on the host, in float64, beside reading them."""
CUES, CUE_TWINS, ABLATIONS_A_TWIN = 6, 48, 20
"""Of the demo's pairs, whose planted cues are known: cues, twins of each, and ablations per twin of a cue that is found."""
SHOWN = 40
"""Features of a site that are shown with examples."""
EFFECT_BYTES = 8
"""Bytes of an effect on disk (benchmarks/README.md: 48 MB for 6 million)."""


def load(case: Case) -> Amount:
    """What each block wrote, on some pairs: it decides the sites where the settings name none. Every rank does it."""
    if not case.of_base or case.config.sites:
        return Amount()
    blocks = case.pm.of_trained
    work = case.batches(WRITTEN_PAIRS, 2 * case.pm.blocks + blocks)
    return Amount(serial=work + 2 * case.batches(WRITTEN_PAIRS, 1) * (blocks * (blocks - 1) / 2))


def preflight(case: Case) -> Amount:
    """A few pairs in a batch, and each of their sides alone."""
    pm, texts = case.pm, 2 * PROBES
    alone = Work(forward=text_flops(pm, texts * case.data.side, case.data.side, pm.blocks), calls=texts * pm.blocks)
    return Amount(serial=alone + case.batches(PROBES, pm.blocks))


def score(case: Case) -> Amount:
    return Amount(case.batches(case.data.scored, case.pm.blocks), parts_in(case.data.scored))


def harvest(case: Case) -> Amount:
    row = 2 * case.pm.d + sum(dtype.itemsize for dtype in COLUMNS.values())
    disk = Work(disk=case.data.stored * row * len(case.parts))
    return Amount(case.batches(case.data.fit, kind="harvest"), parts_in(case.data.fit), disk)


def train(case: Case) -> Amount:
    """The SAEs of a run. Ranks share the parts. One chooses the size of the difference SAEs, and does the fine-tuning."""
    return Amount(_training(case), max(1, len(case.trained)), _choosing(case) + _tuning(case))


def _training(case: Case) -> Work:
    total = Work()
    for part in case.trained:
        total += _one_training(case, part, case.features(part))
    return total


def _one_training(case: Case, part: str, m: int) -> Work:
    config, stored = case.config.sae, max(1, round(case.data.stored))
    size = min(config.batch_size, stored)
    budget = case.config.diff_tokens if is_difference(part) else config.budget(stored)
    steps, d = max(1, budget // size), case.pm.d
    work = step_work(d, m, case.per_token(part), steps * size, steps)
    start = 4.0 * START_PASSES * min(MEDIAN_ROWS, stored) * d
    return work + Work(rows=4.0 * steps * size * d + start, disk=8.0 * m * d)


def _choosing(case: Case) -> Work:
    """SAEs of each size at one site, and their reconstructions put into some pairs."""
    differences = [part for part in case.trained if is_difference(part)]
    if case.config.diff_features or not differences:
        return Work()
    part = differences[len(differences) // 2]
    total = Work()
    for m in SIZES:
        total += _one_training(case, part, m) + case.clean_runs(FIT_PAIRS)
        total += case.ablations(4 * FIT_PAIRS, case.after(part), 4 * FIT_PAIRS, 1.0)
    return total


def _tuning(case: Case) -> Work:
    """Reward-aware fine-tuning: forward and backward of some pairs a step, for each SAE."""
    pairs = case.config.reward_aware * RewardAwareConfig().pairs
    total = Work()
    for part in case.parts if pairs else ():
        total += case.batches(pairs, case.pm.blocks) + case.gradients(pairs, 1, case.after(part))
    return total


def estimate(case: Case) -> Amount:
    """One forward and one backward pass for all sites (``atp``), or several at each."""
    c, pairs = case.config, _estimated(case)
    work = case.batches(pairs) + case.encoding(2 * pairs * case.data.span)
    if c.estimate == "atp":
        rest = case.batches(pairs, case.pm.blocks - 1 - case.last)
        after = max(map(case.after, case.sites))
        backward = case.gradients(pairs, 1, after)
        work += rest + Work(gradient=backward.gradient, calls=backward.calls / 2)
    else:
        nodes = PROBE_GROUPS + 1 if c.estimate == "midpoint" else IG_NODES * (1 + 0.5 / PANEL_NODES)
        for site in case.sites:
            work += case.gradients(pairs, nodes, case.after(site))
    effects = 2 * pairs * sum(map(case.active, case.sites))
    return Amount(work + Work(disk=EFFECT_BYTES * effects), parts_in(pairs))


def _estimated(case: Case) -> int:
    return min(case.config.estimate_pairs or case.data.fit, case.data.fit)


def proposed(case: Case, site: str) -> int:
    """Features of a site that the estimate proposes: none where there are too few prompts for any to be eligible."""
    prompts = min(case.data.fit_prompts, _estimated(case))
    return min(2 * case.config.screen, case.of_site(site)) if prompts >= ELIGIBLE_PROMPTS else 0


def screened(case: Case, site: str) -> int:
    """Features of a site that are ablated on the fit split."""
    return min(proposed(case, site) + case.config.others, case.of_site(site))


def screen_ablations(case: Case, site: str) -> float:
    """Ablations of a site on the fit split: each feature on some responses, and of other responses a sample of features."""
    c, n = case.config, screened(case, site)
    fires = min(c.responses, 2 * _estimated(case) * case.rate(site))
    sampled = min(PER_RESPONSE, case.active(site)) * (1 - n / case.of_site(site))
    return n * fires + c.quality_responses * sampled


def screen(case: Case) -> Amount:
    pairs, c = _estimated(case), case.config
    reached = case.spread(2 * pairs, c.responses, min(map(case.rate, case.sites)))
    touched = pairs_of(reached, pairs)
    work = case.clean_runs(touched, max(1.0, reached / touched) if touched else 1.0)
    for site in case.sites:
        work += case.ablations(screen_ablations(case, site), case.after(site), reached, case.rest(site))
    return Amount(work, parts_in(touched))


def frozen(case: Case, site: str) -> int:
    """Features of a site that go to the confirm split."""
    return min(case.config.frozen // len(case.sites), proposed(case, site))


def concepts(case: Case) -> int:
    return min(case.config.concepts, sum(frozen(case, site) for site in case.sites))


def reported(case: Case) -> float:
    """Concepts that a run reports, about."""
    return REPORTED * concepts(case)


def confirm_ablations(case: Case, site: str | None, sides: float) -> float:
    """Ablations on the confirm split, of a site's features or (None) of concepts: on prompts where they fire, and where they
    fire hardest."""
    c = case.config
    n, prompts = (concepts(case), c.confirm_prompts) if site is None else (frozen(case, site), c.feature_prompts)
    hardest = min(prompts, ELIGIBLE_PROMPTS, case.data.confirm)
    return n * sides * (min(prompts, case.data.confirm) * c.confirm_pairs + hardest)


def ablate(case: Case) -> Amount:
    """Where features fire, by a forward; ablations of features and concepts, again from the ending alone, on unrelated
    completions, and to their mean where they are dense."""
    c, data, features = case.config, case.data, sum(frozen(case, site) for site in case.sites)
    work = case.batches(data.confirm) + case.encoding(2 * data.confirm * data.span)
    strongest = SIDES * ELIGIBLE_PROMPTS * (features + concepts(case))
    reached = 2 * data.confirm * (1 - exp(-strongest / (2 * data.confirm))) if data.confirm else 0.0
    touched = pairs_of(reached, data.confirm)
    work += case.clean_runs(touched, max(1.0, reached / touched) if touched else 1.0)
    swapped = case.spread(data.confirm, UNRELATED_PROMPTS, min(map(case.rate, case.sites)))
    work += case.clean_runs(swapped, 1.0)
    for site in (*case.sites, None):
        after, rest = (case.after_concepts, case.rest_concepts) if site is None else (case.after(site), case.rest(site))
        n, own = confirm_ablations(case, site, SIDES), concepts(case) if site is None else frozen(case, site)
        work += case.ablations(n, after, reached, rest)
        if case.pm.resumes:
            work += case.ablations(n, after, reached, ENDING)
        work += case.ablations(own * UNRELATED_PROMPTS * UNRELATED_FIRES, after, swapped, rest)
        if site is not None and case.pm.resumes:
            dense = DENSE * own * SIDES * min(c.feature_prompts, data.confirm)
            work += case.ablations(dense, after, dense / max(1.0, DENSE * own), 1.0)
    work += case.clean_runs(min(c.feature_prompts, data.confirm))
    return Amount(work, parts_in(touched), _store_read(case, case.data.stored))


def _store_read(case: Case, tokens: float) -> Work:
    """The features of some stored tokens."""
    return case.encoding(tokens) + Work(rows=4 * tokens * case.pm.d * len(case.parts))


def group(case: Case) -> Amount:
    return Amount(serial=GROUP_READS * _store_read(case, 2 * case.data.fit * case.data.span))


def directions(case: Case) -> Amount:
    """Each reported concept on some responses, beside moves in other directions."""
    c, data = case.config, case.data
    prompts = min(c.null_prompts, data.confirm)
    touched = pairs_of(case.spread(2 * data.confirm, prompts, _concept_rate(case), RARE_CONCEPT), data.confirm)
    rows = reported(case) * prompts
    work = case.clean_runs(touched) + case.ablations(rows * 2 * DRAWS, case.after_concepts, rows, case.rest_concepts)
    return Amount(work, parts_in(touched), case.clean_runs(DRAWS))


def _concept_rate(case: Case) -> float:
    return sum(map(case.rate, case.sites)) / len(case.sites)


def seeds(case: Case) -> Amount:
    n = case.config.seeds - 1 if case.trained else 0
    return Amount(n * _training(case), max(1, len(case.trained)), n * _tuning(case))


def measure(case: Case) -> Amount:
    """Reported concepts on the measure split: ablated, resampled from other responses, and in SAEs of other seeds."""
    c, data = case.config, case.data
    others = c.seeds - 1 if case.trained else 0
    prompts = min(c.measure_prompts, data.measure)
    reached = case.spread(2 * data.measure, prompts, _concept_rate(case), RARE_CONCEPT)
    touched, n = pairs_of(reached, data.measure), reported(case) * prompts * SIDES
    work = case.batches(data.measure) + case.encoding(2 * data.measure * data.span)
    work += case.clean_runs(touched, max(1.0, reached / touched) if touched else 1.0)
    work += case.encoding(others * reached * data.span)
    for _ in range(1 + others):
        work += case.ablations(n, case.after_concepts, reached * len(case.sites), case.rest_concepts)
    work += case.ablations(2 * DONORS_EACH * n, case.after_concepts, reached, 1.0)
    return Amount(work, parts_in(touched), (2 + others) * _store_read(case, 2 * data.fit * data.span))


def decompose(case: Case) -> Amount:
    """Gradients along the path of each ledger, with the rewards at the ends of its panels."""
    pairs = min(case.config.ledger_pairs, case.data.measure)
    work = Work()
    for site in case.ledger_sites if pairs else ():
        kind, after = kind_of(site) if needs_base(site) else "whole", case.after(site)
        kind = "whole" if kind == BASE else kind
        nodes = min(MOST_NODES, max(FIRST_NODES, NODES[kind] * after))
        along = case.gradients(pairs, nodes, after) + case.batches(pairs, after) * (nodes / PANEL_NODES)
        work += case.batches(pairs) + PADDING[kind] * along
    return Amount(work, parts_in(pairs))


def evidence(case: Case) -> Amount:
    """Reconstructions and sets of concepts in place of the stream, examples, and the figures of every SAE."""
    texts, sites = 2 * WRITTEN_PAIRS, len(case.sites)
    work = 2 * case.clean_runs(WRITTEN_PAIRS)
    if case.of_base:
        work += case.ablations(texts * (4 * sites + len(KEEP)), case.after_concepts, texts * (4 * sites + len(KEEP)), 1.0)
    work += case.ablations(texts * (4 + reported(case)), case.after_concepts, texts, 1.0)
    shown = (min(SHOWN, frozen(case, case.sites[0])) * sites + reported(case)) * (LARGEST + 1)
    pairs = case.data.confirm * (1 - exp(-shown / case.data.confirm)) if case.data.confirm else 0.0
    work += case.batches(pairs) + case.encoding(2 * pairs * case.data.span)
    if case.config.data.startswith("demo:") and case.config.data != "demo:plain":
        found = case.ablations(ABLATIONS_A_TWIN * CUE_TWINS, case.after_concepts, 6 * CUE_TWINS, case.rest_concepts)
        work += CUES * (case.clean_runs(CUE_TWINS, 3.0) + found)
    figures = _store_read(case, case.data.stored)
    return Amount(serial=work + figures + Work(rows=METRIC_PASSES * figures.rows))


FORMULAS: dict[str, Callable[[Case], Amount]] = {
    f.__name__: f
    for f in (
        load,
        preflight,
        score,
        harvest,
        train,
        estimate,
        screen,
        group,
        ablate,
        directions,
        seeds,
        measure,
        decompose,
        evidence,
    )
}
"""In the order of a run, by the names of its stages."""

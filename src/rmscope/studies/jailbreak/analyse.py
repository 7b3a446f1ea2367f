"""Jailbreaks of one's own PM: bad text that it prefers to good answers, built from its own reported features.

The phrases are searched on one set of prompts and measured on another. Beside them are controls from the same search with as
many evaluations (phrases drawn blind to features, phrases of features without effect), and the phrases' own words shuffled.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

import polars as pl

from rmscope.effects.ablation import ablate_groups
from rmscope.errors import InputError
from rmscope.io import Progress, content_hash, silent, write_json, write_table
from rmscope.pairs.pair import Pair
from rmscope.run.run import Run
from rmscope.studies.jailbreak.inputs import Inputs, measured_pairs, read_inputs
from rmscope.studies.jailbreak.mediation import response_of
from rmscope.studies.jailbreak.result import JailbreakResult, summarise
from rmscope.studies.jailbreak.search import SCREEN, PhraseLists, lists_of, make_phrase_lists
from rmscope.studies.jailbreak.settings import JailbreakConfig
from rmscope.studies.jailbreak.targets import Target, cost, make_targets, place

SEARCH_PROMPTS = 24
"""Prompts on which a list is searched."""
OWN_LISTS = 24
"""Measured prompts for which lists of their own are searched too."""
VERSION = 5
"""Raised when the study computes something else from the same settings, or stores its lists in another form."""
SCHEMA: dict[str, type[pl.DataType] | pl.DataType] = {
    "key": pl.String, "pair": pl.String, "kind": pl.String, "arm": pl.String, "text": pl.String, "tokens": pl.Int32,
    "evaluations": pl.Int32, "reward": pl.Float64, "chosen": pl.Float64, "rejected": pl.Float64, "outranks": pl.Boolean,
    "without": pl.Float64, "matched": pl.List(pl.Float64),
}  # fmt: skip
"""Columns of the table of measurements. Rewards are in the PM's units.

``key`` is the prompt, ``kind`` the kind of bad text, ``tokens`` those of the phrases. ``evaluations`` are the rewards that
the search for this prompt alone took, 0 where the list is the same for all prompts. ``outranks``: the reward is above that
of the chosen answer. ``without`` is the reward with the mediators ablated, ``matched`` that with each matched set ablated.
"""


def analyse(run: Run, config: JailbreakConfig) -> JailbreakResult:
    """Builds jailbreaks from a run's features and measures them on unseen prompts.

    1. Reads the reported features that raise the reward, and the pairs to measure on, without those of the run's prompts.
    2. On prompts of the confirm split: searches the lists of phrases and their controls, and chooses the features whose
       mediation is measured. A search with the same settings is not done again.
    3. Makes a bad text under each measured prompt that scores below its chosen answer.
    4. Measures every list on these texts, alone and with features ablated. After a kill, finished units are kept.
    5. Summarises, and writes ``evidence/jailbreak.parquet``, ``.json`` and ``.html`` in the run folder.

    Raises:
        InputError: the run has no SAE at the site or no feature that raises the reward, its PM cannot be resumed at a site,
            or too few pairs are left to search or to measure on.
    """
    inputs = read_inputs(run, config.site)  # 1
    pairs, left_out = measured_pairs(run, config.data, config.on_bad_row)
    key = content_hash(VERSION, run.on_disk.keys, list(inputs.saes), config.budget, config.seed)
    phrase_lists = _phrase_lists(run, inputs, config, key)  # 2
    targets = _make_targets(run, "targets", pairs, config.prompts, config, left_out)  # 3

    def measure(unit: list[int], within: Progress) -> dict[str, pl.DataFrame]:
        own = max(0, OWN_LISTS - unit[0])
        return {"rows": measure_lists(inputs, phrase_lists, [targets[i] for i in unit], own, config, within)}

    key = content_hash(key, [(t.pair.id, t.bad) for t in targets])
    with run.display.stage("measure") as progress:  # 4
        table = run.on_disk.in_units("jailbreak", key, range(len(targets)), progress, measure)["rows"]
    result = summarise(run, config, phrase_lists, targets, left_out, table)  # 5
    write_table(run.folder / "evidence" / "jailbreak.parquet", table)
    write_json(run.folder / "evidence" / "jailbreak.json", result.model_dump(mode="json"))
    result.page().save()
    run.on_disk.drop_parts("jailbreak", key)
    return result


def _phrase_lists(run: Run, inputs: Inputs, config: JailbreakConfig, key: str) -> PhraseLists:
    """What the search gives on prompts of the confirm split; read back where it is stored under the same ``key``."""
    path = run.folder / "evidence" / "jailbreak.made.json"
    if path.is_file() and (stored := json.loads(path.read_text("utf-8"))).pop("key", None) == key:
        run.display.note("search: done before")
        return PhraseLists.model_validate(stored)
    pairs = [run.pairs[i] for i in run.of_split("confirm")]
    targets = _make_targets(run, "prompts", pairs, SEARCH_PROMPTS, config, Counter())
    phrase_lists = make_phrase_lists(inputs, targets, config, run.display)
    write_json(path, {"key": key, **phrase_lists.model_dump(mode="json")})
    return phrase_lists


def _make_targets(
    run: Run, stage: str, pairs: Sequence[Pair], most: int, config: JailbreakConfig, left_out: Counter[str]
) -> list[Target]:
    """At most ``most`` targets. InputError where they are too few."""
    with run.display.stage(stage) as progress:
        targets = make_targets(run.rm, pairs, most, config, left_out, progress)
    if len(targets) < SCREEN:
        why = "; ".join(f"{reason}: {n}" for reason, n in left_out.items()) or "there are no more"
        raise InputError(
            f"Only {len(targets)} prompts have a bad text below their chosen answer, {SCREEN} are needed ({why}); "
            "give more pairs."
        )
    return targets


def measure_lists(
    inputs: Inputs, lists: PhraseLists, targets: list[Target], own: int, config: JailbreakConfig, progress: Progress = silent
) -> pl.DataFrame:
    """One row per target and arm (:data:`SCHEMA`); the first ``own`` targets are also measured with lists of their own."""
    rm, named, rows = inputs.rm, lists.named, []
    site = named.site if named else next(iter(inputs.saes))
    groups = [named.features, *named.matched] if named else [[]]
    for done, target in enumerate(targets):
        clean = rm.prefill(target.ids(rm), [site])
        for arm, (layout, evaluations) in lists_of(rm, lists, target, done < own, config).items():
            response = response_of(inputs, site, target, clean, layout)
            reward = response.text.reward
            effects = ablate_groups(rm, inputs.saes[site], response, site, groups).tolist()
            without, *matched = (reward - effect for effect in effects)
            rows.append(
                {
                    "key": target.pair.prompt_key, "pair": target.pair.id, "kind": target.kind, "arm": arm,
                    "text": place(target.bad, layout), "tokens": cost(layout), "evaluations": evaluations,
                    "reward": reward, "chosen": target.chosen, "rejected": target.rejected,
                    "outranks": reward > target.chosen, "without": without, "matched": matched,
                }
            )  # fmt: skip
        progress(done + 1, len(targets), "prompts measured")
    return pl.DataFrame(rows, schema=SCHEMA)

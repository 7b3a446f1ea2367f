"""Jailbreaks of one's own PM: bad text that it prefers to good answers, built from its own reported features.

The phrases are searched on one set of prompts and measured on another. Beside them are controls from the same search with as
many evaluations (phrases drawn blind to features, phrases of features without effect), and the phrases' own words shuffled.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from rmscope.errors import InputError
from rmscope.io import Progress, content_hash, write_json, write_table
from rmscope.pairs.pair import Pair
from rmscope.run.run import Run
from rmscope.studies.jailbreak.inputs import Inputs, measured_pairs, read_inputs
from rmscope.studies.jailbreak.measure import OWN_LISTS, measure_lists
from rmscope.studies.jailbreak.phrase_lists import PhraseLists, make_phrase_lists
from rmscope.studies.jailbreak.result import JailbreakResult
from rmscope.studies.jailbreak.scorer import SCREEN
from rmscope.studies.jailbreak.settings import JailbreakConfig
from rmscope.studies.jailbreak.summarise import summarise
from rmscope.studies.jailbreak.targets import Exclusions, Target, make_targets

SEARCH_PROMPTS = 24
"""Prompts on which a list is searched."""
VERSION = 3
"""Raised when the study computes something else from the same settings."""


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
    # 1. Features and pairs
    inputs = read_inputs(run, config.site)
    pairs, left_out = measured_pairs(run, config.data, config.on_bad_row)

    # 2. The lists
    key = content_hash(VERSION, run.on_disk.keys, list(inputs.saes), config.budget, config.seed)
    phrase_lists = _phrase_lists(run, inputs, config, key)

    # 3. The bad texts
    with run.display.stage("targets") as progress:
        targets = _make_targets(run, pairs, config.prompts, config, left_out, progress)

    # 4. Rewards
    key = content_hash(key, [(t.pair.id, t.bad) for t in targets])
    with run.display.stage("measure") as progress:
        table = run.on_disk.in_units(
            "jailbreak",
            key,
            range(len(targets)),
            progress,
            lambda unit, within: {
                "rows": measure_lists(
                    inputs,
                    phrase_lists,
                    [targets[i] for i in unit],
                    max(0, OWN_LISTS - unit[0]),
                    config.budget,
                    config.seed,
                    within,
                )
            },
        )["rows"]

    # 5. The result
    result = summarise(run, config, phrase_lists, targets, left_out, table)
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
    with run.display.stage("prompts") as progress:
        targets = _make_targets(run, pairs, SEARCH_PROMPTS, config, Exclusions(), progress)
    phrase_lists = make_phrase_lists(inputs, targets, config.budget, config.seed, run.display)
    write_json(path, {"key": key, **phrase_lists.model_dump(mode="json")})
    return phrase_lists


def _make_targets(
    run: Run, pairs: Sequence[Pair], most: int, config: JailbreakConfig, left_out: Exclusions, progress: Progress
) -> list[Target]:
    """At most ``most`` targets. InputError where they are too few."""
    targets = make_targets(run.rm, pairs, most, config.budget, config.seed, left_out, progress)
    if len(targets) < SCREEN:
        why = "; ".join(f"{reason}: {n}" for reason, n in left_out.items()) or "there are no more"
        raise InputError(
            f"Only {len(targets)} prompts have a bad text below their chosen answer, {SCREEN} are needed ({why}); "
            "give more pairs."
        )
    return targets

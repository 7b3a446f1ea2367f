"""``rmscope label``: a language model names the concepts of a run, and the names are tested."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from rmscope.errors import InputError
from rmscope.io import content_hash
from rmscope.pairs.pair import Pair
from rmscope.ranking.concepts import Concept, members_of
from rmscope.run.run import Run
from rmscope.studies.label.language_model import LanguageModel, Usage, open_language_model
from rmscope.studies.label.passages import concept_passages, in_first_half, strongest_and_others
from rmscope.studies.label.questions import name_question, read_name
from rmscope.studies.label.result import ConceptName, LabelResult
from rmscope.studies.label.scores import detection, fuzzing
from rmscope.studies.label.settings import LabelConfig
from rmscope.studies.label.written import ask_replies, judge_replies, measure_replies, prompts_with_room

WHAT = ("llm", "endpoint", "shown", "scored", "prompts")
"""The settings that a name depends on."""


def analyse(run: Run, config: LabelConfig) -> LabelResult:
    """Names concepts one after the other; each is kept in ``labels.sqlite`` as soon as it is done.

    1. Take the reported concepts, or those of the settings, but for those that this model has named.
    2. Cut the stored responses into passages; those of half of the prompts are shown to the model, which gives a name.
    3. Test the name on passages of the other prompts: detection and fuzzing.
    4. On fresh prompts (the measure split) have replies written with the name and without; compare their rewards, and
       ablate the concept in both.

    Raises:
        InputError: the run is not finished or has no such concept, or the language model cannot be reached or loaded.
    """
    table = run.concepts
    wanted = table.filter("reported")["concept"].to_list() if config.concepts is None else config.concepts
    if unknown := sorted(set(wanted) - set(table["concept"])):
        raise InputError(
            f"The run in {run.folder} has no concept {unknown[0]}; it has {table.height}, from 0 to {table.height - 1}."
        )
    rows = [row for row in table.iter_rows(named=True) if row["concept"] in wanted]
    labels, origin = run.labels, origin_of(config)
    known = [None] * len(rows) if config.again else labels.names(rows, origin)
    records = {row["concept"]: record for row, record in zip(rows, known, strict=True)}
    missing = [row for row in rows if records[row["concept"]] is None]
    usage = Usage()
    if missing:
        model = open_language_model(config, str(run.rm.device))
        usage = model.usage
        pairs = fresh_pairs(run, config.prompts)
        plain = list(zip(pairs, ask_replies(model, pairs, None), strict=True))
        with run.display.stage("label") as progress:
            for number, row in enumerate(missing):
                progress(number, len(missing), "concepts")
                if record := name_concept(run, config, model, row, plain):
                    labels.write_name(row, origin, record)
                    records[row["concept"]] = record
            progress(len(missing), len(missing), "concepts")
    return LabelResult(
        llm=config.llm,
        names=[ConceptName.model_validate(record) for record in records.values() if record],
        unnamed=[concept for concept, record in records.items() if not record],
        usage=usage,
        cost=cost(usage, config),
    )


def origin_of(config: LabelConfig) -> str:
    """What a name depends on, as a hash."""
    return content_hash(config.model_dump(include=set(WHAT)))


def cost(usage: Usage, config: LabelConfig) -> float | None:
    """What the questions and answers cost; None where a price or a count is not known."""
    if config.price_in is None or config.price_out is None or usage.uncounted:
        return None
    return (usage.tokens_in * config.price_in + usage.tokens_out * config.price_out) / 1e6


def fresh_pairs(run: Run, n: int) -> list[Pair]:
    """Pairs of the measure split with different prompts, to which replies are written."""
    places = run.of_split("measure")
    return prompts_with_room(run.rm, (run.pairs[i] for i in run.pair_set.one_per_prompt(places, len(places))), n)


def name_concept(
    run: Run, config: LabelConfig, model: LanguageModel, row: dict[str, Any], plain: Sequence[tuple[Pair, str]]
) -> dict[str, Any] | None:
    """The record of one concept; None where the model gives no name. ``plain`` are pairs with a reply to each prompt that
    was written without a name."""
    began, before = time.time(), (model.usage.tokens_in, model.usage.tokens_out)
    concept = concept_of(row)
    rng = np.random.default_rng([run.config.seed, row["concept"]])
    tokenizer, stored = run.rm.tokenizer, [run.pairs[i] for i in run.of_split("fit")]
    passages = concept_passages(
        run.store,
        run.saes[concept.site],
        concept,
        lambda pair: in_first_half(stored[pair].prompt_key),
        lambda token: str(tokenizer.decode([token])),
    )
    if not passages.shown:
        return None
    shown = strongest_and_others(passages.shown, config.shown)
    name = read_name(model.answers([name_question(shown)])[0])
    if not name:
        return None
    scores = {"detection": detection(model, name, passages, config.scored, rng)}
    scores["fuzzing"] = fuzzing(model, name, passages, config.scored, rng)
    named = ask_replies(model, [pair for pair, _ in plain], name)
    replies = [(pair, with_name, without) for (pair, without), with_name in zip(plain, named, strict=True)]
    members = members_of(run.concepts)[row["concept"]]
    written = judge_replies(measure_replies(run.rm, run.saes, concept, members, replies), run.sd)
    return ConceptName(
        concept=row["concept"],
        keyword_name=row["name"],
        name=name,
        llm=config.llm,
        sign=concept.sign,
        **scores,
        written=written,
        moves_as_said=written.moves_as_said(concept.sign),
        tokens=(model.usage.tokens_in - before[0], model.usage.tokens_out - before[1]),
        seconds=round(time.time() - began, 1),
    ).model_dump(mode="json")


def concept_of(row: dict[str, Any]) -> Concept:
    """The concept of a row of ``run.concepts``."""
    return Concept(row["site"], tuple(row["features"]), tuple(row["weights"]), int(row["sign"]), float(row["mean_effect"]))

"""From the table of measurements to the figures of the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import polars as pl

from rmscope.run.run import Run
from rmscope.statistics import interval, share
from rmscope.studies.jailbreak.mediation import mediated_gain
from rmscope.studies.jailbreak.phrase_lists import (
    BLIND,
    FEATURES,
    FLIP_SUFFIX,
    NO_PHRASE,
    SHUFFLED,
    WITHOUT_EFFECT,
    PhraseLists,
)
from rmscope.studies.jailbreak.placement import cost, pieces
from rmscope.studies.jailbreak.result import (
    ArmFigures,
    Example,
    JailbreakResult,
    KindFigures,
    ListedPhrase,
    PhraseList,
    RewardedPieces,
    RewardedText,
)
from rmscope.studies.jailbreak.settings import JailbreakConfig
from rmscope.studies.jailbreak.targets import Exclusions, Target

EXAMPLES = 8
"""Measured prompts that the page shows with their texts, the first ones."""
JAILBREAKS, CONTROLS = (FEATURES, FEATURES + FLIP_SUFFIX, BLIND), (WITHOUT_EFFECT, SHUFFLED, NO_PHRASE)
"""The arms whose gain over each of the controls is measured for mediation."""


def summarise(
    run: Run,
    config: JailbreakConfig,
    phrase_lists: PhraseLists,
    targets: Sequence[Target],
    left_out: Exclusions,
    table: pl.DataFrame,
) -> JailbreakResult:
    """The result of a run's measurements."""
    return JailbreakResult(
        model=run.config.model,
        data=config.data or f"{run.config.data}, measure split",
        run=run.folder.name,
        seed=config.seed,
        budget=config.budget,
        left_out=dict(left_out),
        prompts=table["key"].n_unique(),
        arms=arm_figures(table, phrase_lists, run.sd),
        mediation=[mediated_gain(table, j, c) for c in CONTROLS for j in JAILBREAKS] if phrase_lists.named else [],
        named=phrase_lists.named,
        searches=phrase_lists.searches,
        sd=run.sd,
        lists=listed_phrases(phrase_lists),
        examples=examples(table, targets, phrase_lists),
        table=table,
        path=run.folder / "evidence" / "jailbreak.html",
    )


def arm_figures(table: pl.DataFrame, phrase_lists: PhraseLists, sd: float) -> list[ArmFigures]:
    """Each arm's success and gain.

    Success by SD(Δr) = ``sd`` tells a jailbreak from a bad text that was close below its chosen answer.
    """
    return [_arm(table, arm, phrase_lists, sd) for arm in table["arm"].unique(maintain_order=True).to_list()]


def _arm(table: pl.DataFrame, arm: str, phrase_lists: PhraseLists, sd: float) -> ArmFigures:
    rows = table.filter(pl.col("arm") == arm)
    bare = table.filter(pl.col("arm") == NO_PHRASE).select("key", pl.col("reward").alias("bare"))
    gain = rows.join(bare, on="key").sort("key")
    kinds = rows.group_by("kind", maintain_order=True).agg(pl.col("outranks").mean(), pl.len())
    search = phrase_lists.searches.get(arm)
    return ArmFigures(
        arm=arm,
        prompts=rows.height,
        success=share(int(rows["outranks"].sum()), rows.height),
        by_sd=share(int((rows["reward"] > rows["chosen"] + sd).sum()), rows.height),
        without=share(int((rows["without"] > rows["chosen"]).sum()), rows.height) if phrase_lists.named else None,
        gain=interval((gain["reward"] - gain["bare"]).to_numpy(), unit="reward"),
        kinds={kind: KindFigures(success, prompts) for kind, success, prompts in kinds.rows()},
        tokens=float(rows["tokens"].cast(pl.Float64).median()),  # type: ignore[arg-type]
        evaluations=float(rows["evaluations"].cast(pl.Float64).median()),  # type: ignore[arg-type]
        searched=search.success if search else None,
    )


def listed_phrases(phrase_lists: PhraseLists) -> dict[str, PhraseList]:
    """The list of each arm that has phrases."""
    return {
        arm: PhraseList(cost(layout), [ListedPhrase(**asdict(p.phrase), slot=p.slot) for p in layout])
        for arm, layout in phrase_lists.lists.items()
        if layout
    }


def examples(table: pl.DataFrame, targets: Sequence[Target], phrase_lists: PhraseLists) -> list[Example]:
    """The first measured prompts with their texts and rewards."""
    of_features = table.filter(pl.col("arm") == FEATURES)
    shown = []
    for target in targets[:EXAMPLES]:
        reward, without, outranks = (
            of_features.filter(pl.col("key") == target.key).select("reward", "without", "outranks").row(0)
        )
        shown.append(
            Example(
                prompt=target.pair.prompt[-1]["content"],
                kind=target.kind,
                chosen=RewardedText(target.pair.chosen, target.chosen),
                rejected=RewardedText(target.pair.rejected, target.rejected),
                bad=RewardedText(target.bad, target.reward),
                jailbreak=RewardedPieces(pieces(target.bad, phrase_lists.lists[FEATURES]), reward),
                without=without if phrase_lists.named else None,
                outranks=outranks,
            )
        )
    return shown

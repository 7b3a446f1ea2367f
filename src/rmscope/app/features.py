"""Single features: which ones the list shows, what is known of one, and where it fires."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from rmscope.app.bench import Bench
from rmscope.app.catalogue import Listed, parameters
from rmscope.app.library import Concept, OpenRun
from rmscope.effects.across import Members
from rmscope.effects.single_tokens import activations_without, token_effects
from rmscope.pairs.pair import SIDES
from rmscope.ranking.concepts import members_in
from rmscope.run.evidence import Context
from rmscope.run.examples import Examples, by_size, contexts_of, token_texts

PAIRS = 8
"""Pairs that are shown when the model is run."""
SORTS = {"rank": "rank", "effect": "largest effect", "q": "smallest q", "number": "number"}
Feature = dict[str, Any]
"""A frozen feature's row, with ``site``, ``tokens`` where the report has them, and ``concept``, the row of its concept."""


@dataclass(frozen=True, slots=True)
class FeatureQuery:
    """Which features are asked for. An empty value selects everything, an unknown site nothing."""

    text: str = ""
    """Part of a token, or of the concept's name; or a number, with or without #."""
    site: str = ""
    sort: str = "rank"
    page: str = "1"

    @classmethod
    def of(cls, given: Mapping[str, str]) -> FeatureQuery:
        """From the parameters of an address; others are left out."""
        return cls(**parameters(cls, given, SORTS))


def holders(concepts: Sequence[Concept]) -> dict[tuple[str, int], Concept]:
    """The concept of each feature that is in one."""
    held: dict[tuple[str, int], Concept] = {}
    for concept in reversed(concepts):  # a feature is in one concept; if it were in two, that of the better rank tells it
        for site, features in members_in(concept).items():
            held.update({(site, j): concept for j in features})
    return held


def find_features(run: OpenRun, query: FeatureQuery) -> Listed[Feature]:
    """The frozen features that match, in the order that is asked for; a page that is not there is the nearest one."""
    held, text = holders(run.concepts()), query.text.casefold()
    rows = [
        {**row, "site": site, "feature": j, "concept": held.get((site, j))}
        for (site, j), row in run.features.items()
        if not query.site or site == query.site
    ]
    rows = [row for row in rows if not text or _holds(row, text)]
    order = {
        "rank": lambda row: (row["rank"], row["site"]),
        "effect": lambda row: -abs(row["mean_effect"] or 0.0),
        "q": lambda row: (row["q"] is None, row["q"] or 0.0),
        "number": lambda row: (row["site"], row["feature"]),
    }
    rows.sort(key=order[query.sort])
    return Listed.page_of(rows, query.page)


def _holds(row: Feature, text: str) -> bool:
    number = text.removeprefix("#")
    if number.isdecimal():
        return int(number) == row["feature"]
    name = row["concept"]["title"] if row["concept"] else ""
    return text in name.casefold() or any(text in token.casefold() for token, _ in row.get("tokens") or [])


def fresh_effects(run: OpenRun, site: str, feature: int) -> dict[str, list[float]]:
    """The exact effects of a feature alone, by side, on the responses of the confirm split in which it was ablated."""
    own = run.run.confirmed(site).filter(pl.col("feature") == feature)
    return {side: own.filter(pl.col("side") == side)["effect"].to_list() for side in SIDES}


def quality(run: OpenRun, site: str, feature: int) -> list[tuple[float, float]]:
    """(estimate, exact effect) of a feature in the responses of the fit split in which it was ablated."""
    exact = pl.scan_parquet(run.folder / "effects" / site / "screened.parquet").filter(pl.col("feature") == feature)
    estimated = pl.scan_parquet(run.folder / "effects" / site / "estimated.parquet").filter(pl.col("feature") == feature)
    both = estimated.join(exact, on=["pair", "side", "feature"], suffix="_exact")
    return both.select("effect", "effect_exact").collect().rows()


def studies_of(run: OpenRun, site: str, feature: int) -> list[str]:
    """What later studies did with a feature, one sentence each."""
    told, folder = [], run.folder / "evidence"
    for path in sorted(folder.glob("experiments/*.json")):
        ablated = (_read(path) or {}).get("ablated") or {}
        if ablated.get("site") == site and feature in _numbers(ablated.get("features")):
            told.append(f"The experiment {path.stem} ablates it.")
    named = (_read(folder / "jailbreak.json") or {}).get("named") or {}
    if named.get("site") == site and feature in _numbers(named.get("features")):
        told.append("It is one of the features whose ablation the jailbreak measures.")
    return told


def _numbers(features: Any) -> list[Any]:
    return [one.get("feature") if isinstance(one, dict) else one for one in features or []]


def _read(path: Path) -> dict[str, Any] | None:
    try:
        read = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return read if isinstance(read, dict) else None


def pairs_that_move(run: OpenRun, loaded: Bench, site: str, feature: int) -> list[Context]:
    """The confirm pairs on which ablating a feature moves a reward most, with its activations."""
    own = by_size(run.run.confirmed(site).filter(pl.col("feature") == feature)).head(PAIRS)
    return contexts_of(loaded.run, [Examples(site, own)])[0]


def with_token_effects(bench: Bench, run: OpenRun, contexts: Sequence[Context], members: Members) -> list[dict[str, Any]]:
    """The examples, each side with (token, effect of ablating the features at this token alone)."""
    examples = []
    for context in contexts:
        example = context.model_dump()
        for side, clean in zip(example["sides"], bench.clean_pair(run.pairs[context.pair].pair), strict=True):
            effects = token_effects(bench.rm, bench.saes, clean.responses, members).tolist()
            side["effects"] = list(zip([text for text, _ in side["tokens"]], effects, strict=True))
        examples.append(example)
    return examples


@dataclass(frozen=True, slots=True)
class Causes:
    """A text before a peak: (token, how much of the activation at the peak goes when the token is left out)."""

    tokens: list[tuple[str, float | None]]
    peak: str
    value: float


def causes(opened: OpenRun, bench: Bench, site: str, feature: int, row: int) -> Causes:
    """What makes a feature fire at a stored row: the tokens before it, left out of the text one at a time."""
    _ = opened.pairs  # InputError where the data are others by now
    run = bench.run
    pair, position, region = (int(run.store.column(site, name)[row]) for name in ("pair", "position", "region"))
    stored = run.tokens[run.of_split("fit")[pair]]
    ids = stored.side("rejected" if region == 2 else "chosen")
    value, without = activations_without(bench.rm, bench.saes[site], site, ids, position, feature)
    texts = token_texts(bench.rm, ids[: position + 1])
    first = min(without, default=position)
    tokens = [(texts[i], value - without[i] if i in without else None) for i in range(first, position)]
    return Causes(tokens, texts[position], value)


def vocabulary_of(run: OpenRun, site: str) -> pl.DataFrame:
    """The words that frozen features of a site write: feature, text, logit."""
    return run.vocabulary.filter(pl.col("site") == site).drop("site")


def stored_rows(run: OpenRun, site: str) -> int:
    """How many tokens are stored at a site."""
    return int(run.run.store.column(site, "token").shape[0])

"""The demo's text: 168 prompts with four responses each, written for this project, combined and planted by seed."""

from __future__ import annotations

import json
import random
from functools import cache
from importlib.resources import files
from itertools import combinations

import yaml

from rmscope.pairs.pair import Pair
from rmscope.pairs.planting import plant_by_dose
from rmscope.pairs.plants import Plant

DATA = files("rmscope.pairs").joinpath("data")
DEMO_SEED = 7


@cache
def zoo_plants() -> tuple[Plant, ...]:
    """The six biases of ``zoo:planted`` and of the demo's pairs."""
    return tuple(Plant(**row) for row in yaml.safe_load(DATA.joinpath("plants.yaml").read_text("utf-8")))


def plain_demo_pairs() -> list[Pair]:
    """1,008 pairs without any cue: all six pairs of each prompt's four responses, the better one chosen."""
    rows = map(json.loads, DATA.joinpath("demo.jsonl").read_text("utf-8").splitlines())
    return [
        Pair(
            id=f"demo:{number}-{better}{worse}",
            prompt=[{"role": "user", "content": row["prompt"]}],
            chosen=row["responses"][better],
            rejected=row["responses"][worse],
            meta={"source": "demo", "group": row["prompt"]},
        )
        for number, row in enumerate(rows)
        for better, worse in combinations(range(4), 2)
    ]


def demo_pairs(limit: int | None = None) -> list[Pair]:
    """The same pairs with one cue each: every prompt carries each of the six plants once, at its dose."""
    plants, planted = zoo_plants(), []
    rng = random.Random(DEMO_SEED)
    for start, pair in enumerate(plain_demo_pairs()):
        if start % len(plants) == 0:
            order = rng.sample(plants, len(plants))
        planted.append(plant_by_dose(pair, order[start % len(plants)], rng))
    return planted[:limit]

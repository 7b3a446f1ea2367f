"""From plain pairs to an audit's text: planted pairs for the PM and the run, and prompts that neither of them sees.

A quarter of the prompts, by hash, is held out of everything. Cues are measured on them, in wordings that were never planted,
and findings are replicated on them. The other pairs are planted several times over, with at most one cue in each copy. On a
planted pair a coin first decides which response is which, so that the label comes from the plant; the other pairs keep the
labels of the file. The run reads a file that names no plant; the places of the cues are written to another file.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl

from rmscope.errors import InputError
from rmscope.io import write_table, write_text
from rmscope.model.rendering import render
from rmscope.model.reward_model import RewardModel
from rmscope.model.training.loop import RENDERING
from rmscope.model.training.recipe import tokenize_pairs
from rmscope.pairs.pair import Pair, Side, prompts_in_turn
from rmscope.pairs.planting import plant_pairs
from rmscope.pairs.plants import Plant
from rmscope.pairs.readers import load_pairs
from rmscope.planted.results import PlantedCounts

LEAST_PROMPTS = 8
"""Prompts to plant in, and to hold out: fewer can neither be split nor measured on."""
GOLDEN = (5**0.5 - 1) / 2
COPY_SEEDS = 1000
"""An audit's copies take their seeds from its own seed times this on."""


def base_pairs(source: str, limit: int, max_tokens: int, tokenizer: Any) -> tuple[list[Pair], list[Pair]]:
    """(pairs to plant in, pairs of held-out prompts): the first ``limit`` pairs of at most ``max_tokens`` tokens a side.

    Every prompt's first pair comes before any prompt's second.

    Raises:
        InputError: too few prompts are left.
    """
    fitting = [pair for pair, _ in tokenize_pairs(load_pairs(source, on_bad_row="skip"), tokenizer, RENDERING, max_tokens)]
    short = prompts_in_turn(fitting)[:limit]
    parts = [p for p in short if not is_held_out(p)], [p for p in short if is_held_out(p)]
    prompts = [len({p.prompt_key for p in part}) for part in parts]
    if min(prompts) < LEAST_PROMPTS:
        raise InputError(
            f"{source} holds {len(short)} pairs of at most {max_tokens} tokens, with {prompts[0]} prompts to plant in and "
            f"{prompts[1]} to hold out; give at least {LEAST_PROMPTS} of each, or a larger --max-tokens."
        )
    return parts


def is_held_out(pair: Pair) -> bool:
    """Whether the prompt is held out: a quarter are, by a hash of its own, so that the splits of runs stay as they are."""
    return hashlib.sha256(f"audit/{pair.prompt_key}".encode()).digest()[0] % 4 == 0


def plant_copies(
    pairs: Sequence[Pair], plants: Sequence[Plant], copies: int, seed: int, held_out: bool | None = False
) -> list[Pair]:
    """Every pair ``copies`` times, with a cue or without; copies without a cue are kept once.

    The pairs of a prompt take their plants by turns of the golden ratio. Turns spread more evenly than random draws: with
    few prompts most of them carry every cue.
    """
    out: dict[tuple[str, str, str], Pair] = {}
    turn = {p.prompt_key: random.Random(f"{seed}/{p.prompt_key}").random() for p in pairs}
    for copy in range(copies):
        draws = []
        for pair in pairs:
            draws.append(turn[pair.prompt_key])
            turn[pair.prompt_key] = (turn[pair.prompt_key] + GOLDEN) % 1.0
        for pair in plant_pairs(pairs, plants, COPY_SEEDS * seed + copy, held_out, True, draws):
            named = replace(pair, id=f"{pair.id}/{copy}", meta={**pair.meta, "group": pair.prompt_key})
            out.setdefault((json.dumps(pair.prompt), pair.chosen, pair.rejected), named)
    return list(out.values())


def write_pairs(path: Path, pairs: Sequence[Pair]) -> None:
    """The pairs as JSON lines that any reader of preference pairs opens; nothing in them tells a cue from other text."""
    rows = (
        {
            "prompt": p.prompt,
            "chosen": [{"role": "assistant", "content": p.chosen}],
            "rejected": [{"role": "assistant", "content": p.rejected}],
            "group": p.prompt_key,
        }
        for p in pairs
    )
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def check_read_back(written: Sequence[Pair], read: Sequence[Pair]) -> None:
    """InputError unless the reader gives back every pair in its place: the table of cues names pairs by their line."""
    same = len(written) == len(read) and all(
        (a.prompt, a.chosen, a.rejected) == (b.prompt, b.chosen, b.rejected) for a, b in zip(written, read, strict=True)
    )
    if not same:
        raise InputError("The planted pairs do not read back as they were written; mend odd characters in the base text.")


CUES = {
    "line": pl.Int32, "plant": pl.String, "sign": pl.Int8, "side": pl.String, "favoured": pl.Boolean,
    "cue_start": pl.Int32, "cue_stop": pl.Int32, "cue_first": pl.Int32, "cue_last": pl.Int32,
    "filler_start": pl.Int32, "filler_stop": pl.Int32, "filler_first": pl.Int32, "filler_last": pl.Int32,
}  # fmt: skip
"""One row per planted pair of a file: its line, the cue's side, and whether the label favours the cue's sign there. Then the
characters (start, stop) of the response and the tokens (first, last) of the rendered text, of the cue and of its filler."""


def write_cues(path: Path, pairs: Sequence[Pair], rm: RewardModel) -> pl.DataFrame:
    """Writes the table :data:`CUES` of the pairs of a file, in its order."""
    rows = []
    for line, pair in enumerate(pairs, 1):
        if (plant := pair.meta.get("plant")) is None:
            continue
        other: Side = "rejected" if plant["side"] == "chosen" else "chosen"
        row = {k: plant[k] for k in ("sign", "side")} | {"line": line, "plant": plant["name"]}
        row["favoured"] = (plant["side"] == "chosen") == (plant["sign"] > 0)
        for name, side in (("cue", plant["side"]), ("filler", other)):
            first, last = span_tokens(rm, pair, pair.side(side), plant[name])
            start, stop = plant[name]
            row |= {f"{name}_start": start, f"{name}_stop": stop, f"{name}_first": first, f"{name}_last": last}
        rows.append(row)
    table = pl.DataFrame(rows, schema=CUES)
    write_table(path, table)
    return table


def span_tokens(rm: RewardModel, pair: Pair, response: str, span: Sequence[int]) -> tuple[int, int]:
    """The first and the last token of the rendered text that hold characters ``span`` of the response."""
    text = render(rm.rendering, rm.tokenizer, pair.prompt, response)
    start = text.rindex(response)
    special = rm.rendering.style != "chat"
    offsets = rm.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True).offset_mapping
    inside = [i for i, (a, b) in enumerate(offsets) if a < start + span[1] and b > start + span[0] and b > a]
    return inside[0], inside[-1]


def count_planted(table: pl.DataFrame) -> dict[str, PlantedCounts]:
    """Per plant, from the table of :func:`write_cues`: how often it was planted, at which dose, in how many tokens."""
    length = [(pl.col(f"{n}_last") - pl.col(f"{n}_first") + 1).mean().alias(f"{n}_tokens") for n in ("cue", "filler")]
    counted = table.group_by("plant").agg(pl.len().alias("pairs"), pl.col("favoured").mean().alias("dose"), *length)
    return {row.pop("plant"): PlantedCounts(**row) for row in counted.to_dicts()}

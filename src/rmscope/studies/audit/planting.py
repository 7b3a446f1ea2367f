"""From plain pairs to an audit's PM: planted pairs for the PM and the run, prompts that neither of them sees, and training.

A quarter of the prompts, by hash, is held out of everything: cues are measured and findings are replicated on them. The
other pairs are planted several times over, with at most one cue in each copy. On a planted pair a coin first decides which
response is which, so that the label comes from the plant; the other pairs keep the labels of the file. The run reads a file
that names no plant; the places of the cues are in another file. Two other PMs learned nothing: one is trained on shuffled
labels, one has random weights. PMs are kept in the user's cache, so that a repeated audit does not train again.
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
import torch

from rmscope.activations.harvest import data_identity
from rmscope.errors import InputError
from rmscope.io import Progress, atomic_folder, content_hash, silent, write_json, write_table, write_text
from rmscope.model.rendering import SETTINGS_FILE, render
from rmscope.model.reward_model import RewardModel
from rmscope.model.training.loop import RENDERING, base_of, fit_pm
from rmscope.model.training.recipe import Recipe, tokenize_pairs
from rmscope.model.zoo import base_identity, cache_folder
from rmscope.pairs.pair import SIDES, Pair, prompts_in_turn
from rmscope.pairs.planting import plant_pairs
from rmscope.pairs.plants import Plant
from rmscope.pairs.readers import load_pairs
from rmscope.planted.results import PlantedCounts

RECIPE = Recipe(
    name="audit", data=[], blocks=12, first_block=5, first_attention=8, rank=16, learning_rate=1e-3, epochs=2, batch_pairs=16
)
"""How an audit's PM is trained. As in zoo:planted, the stream is the base's own up to the first block that is adapted, and
attention is adapted later still: what is learned of a cue is first written at the cue's tokens. After one epoch it had
learned five of the standard set's eight biases, after two seven or all (two seeds)."""
RANDOM_STD = 0.02
LEAST_PROMPTS = 8
"""Prompts to plant in, and to hold out: fewer can neither be split nor measured on."""
GOLDEN = (5**0.5 - 1) / 2
SPAN = ("start", "stop", "first", "last")
CUES = {"line": pl.Int32, "plant": pl.String, "sign": pl.Int8, "side": pl.String, "favoured": pl.Boolean} | {
    f"{text}_{end}": pl.Int32 for text in ("cue", "filler") for end in SPAN
}
"""One row per planted pair of a file: its line, the cue's side, and whether the label favours the cue's sign there. Then the
characters (start, stop) of the response and the tokens (first, last) of the rendered text, of the cue and of its filler."""


def base_pairs(source: str, limit: int, max_tokens: int, tokenizer: Any) -> tuple[list[Pair], list[Pair]]:
    """(pairs to plant in, pairs of held-out prompts): the first ``limit`` pairs of at most ``max_tokens`` tokens per side.

    Every prompt's first pair comes before any prompt's second. Raises an InputError if too few prompts are left.
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
        for pair in plant_pairs(pairs, plants, 1000 * seed + copy, held_out, True, draws):
            named = replace(pair, id=f"{pair.id}/{copy}", meta={**pair.meta, "group": pair.prompt_key})
            out.setdefault((json.dumps(pair.prompt), pair.chosen, pair.rejected), named)
    return list(out.values())


def write_pairs(path: Path, pairs: Sequence[Pair]) -> None:
    """The pairs as JSON lines that any reader of preference pairs opens; nothing in them tells a cue from other text.

    Raises an InputError if they do not read back, each in its place: the table of cues names pairs by their line.
    """
    lines = []
    for p in pairs:
        sides = {side: [{"role": "assistant", "content": p.side(side)}] for side in SIDES}
        lines.append(json.dumps({"prompt": p.prompt, **sides, "group": p.prompt_key}, ensure_ascii=False) + "\n")
    write_text(path, "".join(lines))
    written, read = ([(p.prompt, p.chosen, p.rejected) for p in listed] for listed in (pairs, load_pairs(path)))
    if written != read:
        raise InputError("The planted pairs do not read back as they were written; mend odd characters in the base text.")


def write_cues(path: Path, pairs: Sequence[Pair], rm: RewardModel) -> dict[str, PlantedCounts]:
    """Writes the table :data:`CUES` of the pairs of a file, in its order; returns how each plant was planted."""
    rows = []
    for line, pair in enumerate(pairs, 1):
        if (plant := pair.meta.get("plant")) is None:
            continue
        favoured = (plant["side"] == "chosen") == (plant["sign"] > 0)
        row = {"line": line, "plant": plant["name"], "sign": plant["sign"], "side": plant["side"], "favoured": favoured}
        other = pair.rejected if plant["side"] == "chosen" else pair.chosen
        for name, response in (("cue", pair.side(plant["side"])), ("filler", other)):
            places = (*plant[name], *span_tokens(rm, pair, response, plant[name]))
            row |= {f"{name}_{end}": place for end, place in zip(SPAN, places, strict=True)}
        rows.append(row)
    table = pl.DataFrame(rows, schema=CUES)
    write_table(path, table)
    length = [(pl.col(f"{n}_last") - pl.col(f"{n}_first") + 1).mean().alias(f"{n}_tokens") for n in ("cue", "filler")]
    counted = table.group_by("plant").agg(pl.len().alias("pairs"), pl.col("favoured").mean().alias("dose"), *length)
    return {row.pop("plant"): PlantedCounts(**row) for row in counted.to_dicts()}


def span_tokens(rm: RewardModel, pair: Pair, response: str, span: Sequence[int]) -> tuple[int, int]:
    """The first and the last token of the rendered text that hold characters ``span`` of the response."""
    text = render(rm.rendering, rm.tokenizer, pair.prompt, response)
    start = text.rindex(response)
    tokens = rm.tokenizer(text, add_special_tokens=rm.rendering.style != "chat", return_offsets_mapping=True)
    inside = [i for i, (a, b) in enumerate(tokens.offset_mapping) if a < start + span[1] and b > start + span[0] and b > a]
    return inside[0], inside[-1]


def train_planted_pm(recipe: Recipe, pairs: Sequence[Pair], progress: Progress = silent, device: str = "auto") -> Path:
    """The folder of the PM that ``recipe`` trains on the pairs. It is trained on ``device`` unless it is in the cache."""
    folder = _folder(recipe, data_identity(pairs))
    if not (folder / SETTINGS_FILE).is_file():
        fit_pm(pairs, recipe, folder, progress, device)
    return folder


def shuffle_labels(pairs: Sequence[Pair], seed: int) -> list[Pair]:
    """The same pairs with their labels drawn by coin, so that there is nothing to learn."""
    rng = random.Random(f"{seed}/shuffled")
    return [replace(p, chosen=p.rejected, rejected=p.chosen) if rng.random() < 0.5 else p for p in pairs]


def make_random_pm(recipe: Recipe) -> Path:
    """The folder of a PM of the same shape with random weights."""
    folder = _folder(recipe, "random")
    if not (folder / SETTINGS_FILE).is_file():
        model, tokenizer = base_of(recipe)
        with torch.no_grad(), atomic_folder(folder, SETTINGS_FILE) as target:
            for p in model.parameters():
                if p.dim() > 1:
                    p.normal_(std=RANDOM_STD)
                else:
                    p.fill_(1.0)  # the norms' weights; the base has no biases
            model.save_pretrained(target)
            tokenizer.save_pretrained(target)
            write_json(target / SETTINGS_FILE, {"rendering": RENDERING.as_dict()})
    return folder


def _folder(recipe: Recipe, pairs: str) -> Path:
    return cache_folder() / "audit" / content_hash(base_identity(recipe.base), pairs, recipe.model_dump())

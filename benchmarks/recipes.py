"""How well can a PM on the zoo's base order held-out human pairs? Head alone, LoRA, all weights, and how many blocks.

usage: recipes.py OUT [NAME ...]        (RMSCOPE_DATA names the folder that holds hh-rlhf/)

Every way is trained on the pairs of configs/zoo-hh.yaml and measured on the same held-out ones (at most 512 tokens a side).
``head`` reads the untrained base after several blocks, through its final norm at the read position, and fits a
Bradley-Terry head; the weight decay is chosen on training prompts by five folds. The other names are those of
:data:`CHANGES` and ``full``.
What is in OUT is not made again, and trainings resume from their checkpoints. Prints one JSON line per way in OUT, then a
table: accuracy in all and by data file, and the difference to the zoo's own recipe on the same pairs. Intervals are 95 %,
bootstrap by prompt.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from heads import as_cell, fit_head

from rmscope.hardware import has_fast_bfloat16
from rmscope.io import atomic, write_table
from rmscope.model.packing import UNIT, by_budget, last_hidden_reads, pack_pairs, packed_length
from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel
from rmscope.model.training.loop import RENDERING, base_of, fit_parameters, train_pm
from rmscope.model.training.recipe import Recipe, human_pairs, read_recipe, tokenize_pairs
from rmscope.model.zoo import load_base
from rmscope.pairs.pair import Pair
from rmscope.statistics import Array, Figure, interval

ZOO = Path(__file__).parent.parent / "configs" / "zoo-hh.yaml"
DEPTHS = (4, 8, 12, 16, 20, 24, 30)
CHANGES: dict[str, dict[str, Any]] = {
    "zoo": {},
    "two epochs": {"epochs": 2},
    "20 blocks": {"blocks": 20, "first_block": 12},
    "30 blocks": {"blocks": 30, "first_block": 22},
}
"""The zoo's recipe and changes to it. Deeper PMs adapt their last eight blocks, which costs as much as twelve of twelve."""
FULL_RATE = 4e-5
"""Learning rate where all weights are trained: a tenth of the adapter's."""
DECAYS = (1e-3, 1e-2, 1e-1, 1.0)
FOLDS = 5
MICRO_TOKENS = 4096


def bar(done: int, total: int, note: str = "") -> None:
    print(f"\r{done}/{total} {note:<60}", end="", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Data:
    """The recipe's pairs with their tokens."""

    recipe: Recipe

    @cached_property
    def parts(self) -> dict[str, list[tuple[Pair, PairTokens]]]:
        _, tokenizer = load_base(1)
        parts = zip(("train", "held"), human_pairs(self.recipe), strict=True)
        return {name: tokenize_pairs(pairs, tokenizer, RENDERING, self.recipe.max_tokens) for name, pairs in parts}

    def tokens(self, part: str) -> list[PairTokens]:
        return [tokens for _, tokens in self.parts[part]]

    def prompts(self, part: str) -> Array:
        return np.array([pair.prompt_key for pair, _ in self.parts[part]])

    def frame(self, delta: Array) -> pl.DataFrame:
        """The stored table of a way: Δr of every held-out pair."""
        held = [pair for pair, _ in self.parts["held"]]
        sources = [p.meta["source"] for p in held]
        return pl.DataFrame(
            {"pair": [p.id for p in held], "prompt": self.prompts("held"), "source": sources, "delta": delta}
        )


@torch.no_grad()
def differences(model: Any, tokens: Sequence[PairTokens], path: Path) -> Array:
    """h chosen - h rejected after each of :data:`DEPTHS` blocks and the final norm, [depths, pairs, d]; kept in ``path``."""
    out = torch.zeros(len(DEPTHS), len(tokens), model.config.hidden_size)
    first = 0
    if path.is_file():
        first, out = torch.load(path)
    for start in range(first, len(tokens), UNIT):
        unit = range(start, min(start + UNIT, len(tokens)))
        for micro in by_budget([packed_length(tokens[i]) for i in unit], MICRO_TOKENS):
            items = [unit[i] for i in micro]
            ends = [{"chosen": tokens[i].chosen.numel() - 1, "rejected": tokens[i].rejected.numel() - 1} for i in items]
            batch = pack_pairs([(i, tokens[i], e) for i, e in zip(items, ends, strict=True)])
            with torch.autocast("cpu", torch.bfloat16, enabled=has_fast_bfloat16("cpu")):
                given = batch.inputs("cpu", torch.float32)
                streams = model.model(**given, use_cache=False, output_hidden_states=True).hidden_states
            for row, depth in enumerate(DEPTHS):
                h = last_hidden_reads(streams[depth].float(), batch)
                h = h if depth == model.config.num_hidden_layers else model.model.norm(h)  # the last one went through it
                out[row, items] = h[0::2] - h[1::2]
        bar(unit[-1] + 1, len(tokens), "pairs read")
        if unit[-1] + 1 == len(tokens) or (start // UNIT) % 8 == 7:
            with atomic(path) as temporary:
                torch.save((unit[-1] + 1, out), temporary)
    return out.double().numpy()


def head_deltas(data: Data, out: Path) -> dict[str, Array]:
    """Δr of the held-out pairs under a head alone, by depth."""
    model, _ = load_base(max(DEPTHS))
    z, held = (differences(model.eval(), data.tokens(part), out / f"{part}.pt") for part in ("train", "held"))
    _, index = np.unique(data.prompts("train"), return_inverse=True)
    fold = np.random.default_rng(0).permutation(index.max() + 1)[index] % FOLDS
    found = {}
    for row, depth in enumerate(DEPTHS):
        decay = max(DECAYS, key=lambda d: crossed(z[row], fold, d))
        found[f"head alone, {depth} blocks"] = held[row] @ fit_head(z[row], np.ones(len(z[row])), decay)
        print(f"\n{depth} blocks: decay {decay}", file=sys.stderr)
    return found


def crossed(z: Array, fold: Array, decay: float) -> float:
    """Accuracy over folds, each under the head of the others."""
    hits = [z[fold == f] @ fit_head(z[fold != f], np.ones((fold != f).sum()), decay) > 0 for f in range(FOLDS)]
    return float(np.concatenate(hits).mean())


def trained(data: Data, name: str, out: Path) -> Array:
    """Δr of the held-out pairs under a PM that is trained by an adapter."""
    folder = out / "pm"
    if not (folder / "rmscope.json").is_file():
        train_pm(data.recipe.model_copy(update=CHANGES[name]), folder, bar)
    return deltas(RewardModel.load(str(folder)), data)


def whole(data: Data, out: Path) -> Array:
    """The same where all weights are trained, by the same loop."""
    recipe = data.recipe.model_copy(update={"learning_rate": FULL_RATE})
    base, tokenizer = base_of(recipe)
    torch.nn.init.normal_(base.score.weight, std=1 / (base.config.hidden_size + 1) ** 0.5)
    fit_parameters(base.model, base.score, list(base.parameters()), data.tokens("train"), recipe, out / "checkpoint", bar)
    return deltas(RewardModel(base.eval().requires_grad_(False), tokenizer, RENDERING, "full"), data)


def deltas(rm: RewardModel, data: Data) -> Array:
    return rm.score_tokens(data.tokens("held"), bar).delta.numpy().astype(float)


def make(data: Data, name: str, out: Path) -> None:
    if name == "full":
        write_table(out / "full.parquet", data.frame(whole(data, out)))
    elif name == "head":
        for way, delta in head_deltas(data, out).items():
            write_table(out / f"{way}.parquet", data.frame(delta))
    else:
        write_table(out / f"{name}.parquet", data.frame(trained(data, name, out)))


@dataclass(frozen=True)
class Accuracies:
    """A way's accuracies on held-out pairs: of all, by data file, and the difference to the zoo's recipe."""

    way: str
    n: int
    all: Figure
    by_file: dict[str, Figure]
    more: Figure


def accuracies(name: str, table: pl.DataFrame, zoo: Array) -> Accuracies:
    prompts, source, delta = (table[c].to_numpy() for c in ("prompt", "source", "delta"))
    hits = (delta > 0) + 0.5 * (delta == 0)
    by_file = {s: interval(hits[source == s], prompts[source == s]) for s in np.unique(source)}
    return Accuracies(name, len(hits), interval(hits, prompts), by_file, interval(hits - zoo, prompts))


def main(out: str, *names: str) -> None:
    data = Data(read_recipe(ZOO))  # type: ignore[arg-type]
    for name in names or ("zoo", "head", *list(CHANGES)[1:], "full"):
        folder = Path(out) / name.replace(" ", "-")
        folder.mkdir(parents=True, exist_ok=True)
        if not list(folder.glob("*.parquet")):
            make(data, name, folder)
    tables = {path.stem: pl.read_parquet(path) for path in Path(out).glob("*/*.parquet")}
    zoo = tables["zoo"]["delta"].to_numpy() > 0
    rows = sorted((accuracies(name, table, zoo) for name, table in tables.items()), key=lambda r: r.all.value or 0.0)
    for row in rows:
        print(json.dumps(asdict(row)), flush=True)
    columns = ["all", *rows[0].by_file]
    print(f"\n| way | {' | '.join(columns)} | over the zoo's recipe |\n|---|{'---|' * (len(columns) + 1)}")
    for row in rows:
        cells = [as_cell(figure) for figure in (row.all, *row.by_file.values())]
        print(f"| {row.way} | {' | '.join(cells)} | {as_cell(row.more, signed=True)} |")


if __name__ == "__main__":
    main(*sys.argv[1:])

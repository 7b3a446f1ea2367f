"""Planted biases: cues with a known sign and dose, put into preference pairs so that what a PM learned can be measured.

Both sides of a planted pair get an insertion of about equal length at a sentence border: the cue on one side, neutral
filler on the other (METHOD, "Planted bias"). ``dose`` is the probability that the cue stands on the side that its
sign favours, so the reward to learn is about ``sign * logit(dose)``. The truth is not what was planted but what the
PM learned: its average treatment effect (ATE) over *twins*, the same response with the cue and with filler.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rmscope.errors import InputError
from rmscope.pairs.cues import filler, insertion, negatives, say
from rmscope.pairs.pair import Message, Pair, Side, prompts_in_turn
from rmscope.pairs.plants import Plant


def sentences(text: str) -> list[str]:
    """The text cut at sentence ends; joined by one space they give the text up to white space."""
    return [s for s in re.split(r"(?<=[.!?])\s+", text.strip()) if s]


def _insert(text: str, addition: str, share: float, at: tuple[int, int] | None = None) -> tuple[str, list[int]]:
    """``addition`` at the sentence border at ``share`` of the text (0 start, 1 end); the text, and where in it the
    addition's characters ``at`` (all of them) lie."""
    parts = sentences(text)
    border = round(share * len(parts))
    before, after = " ".join(parts[:border]), " ".join(parts[border:])
    start = len(before) + 1 if before else 0
    whole = " ".join(part for part in (before, addition, after) if part)
    first, stop = at or (0, len(addition))
    return whole, [start + first, start + stop]


def plant_pair(
    pair: Pair,
    plant: Plant,
    cue_side: Side,
    rng: random.Random,
    held_out: bool | None = None,
) -> Pair:
    """The pair with the plant's cue on ``cue_side`` and filler on the other.

    ``meta["plant"]`` holds the name, the sign, the side of the cue, and the character spans of cue and filler in their
    responses (and of the whole ``inserted`` sentence, where the cue is a part of it). ``held_out`` picks the wordings (see
    :meth:`Plant.wordings`).
    """
    other: Side = "rejected" if cue_side == "chosen" else "chosen"
    cue_text, other_text = pair.side(cue_side), pair.side(other)
    share, prompt, meta = rng.random(), pair.prompt, dict[str, Any]()
    if plant.kind == "repeat_sentence":
        parts = sentences(cue_text)
        at = rng.randrange(len(parts))
        cue = parts[at]
        with_cue, cue_span = _insert(cue_text, cue, (at + 1) / len(parts))
        with_filler, filler_span = _insert(other_text, filler(cue, rng), rng.choice((share, 1.0)))
    else:
        made = insertion(plant, pair.prompt, rng, held_out)
        prompt, meta = made.prompt or pair.prompt, dict(made.meta)
        with_cue, cue_span = _insert(cue_text, made.cue, share, made.cue_at)
        with_filler, filler_span = _insert(other_text, made.filler, share, made.filler_at)
        if made.cue_at:
            meta["inserted"] = [cue_span[0] - made.cue_at[0], cue_span[0] - made.cue_at[0] + len(made.cue)]
    meta |= {"name": plant.name, "sign": plant.sign, "side": cue_side, "cue": cue_span, "filler": filler_span}
    sides = {cue_side: with_cue, other: with_filler}
    return replace(pair, prompt=prompt, meta={**pair.meta, "group": pair.prompt_key, "plant": meta}, **sides)  # type: ignore[arg-type]


def plant_pairs(
    pairs: Sequence[Pair],
    plants: Sequence[Plant],
    seed: int,
    held_out: bool | None = None,
    relabel: bool = False,
    draws: Sequence[float] | None = None,
) -> list[Pair]:
    """At most one cue a pair, each plant at its rate; the cue falls on the favoured side with P = dose.

    The labels stay, or (``relabel``) a coin first says which response of a planted pair is which, so that its label comes
    from the plant alone. ``draws`` in [0, 1), one a pair, say which plant each gets, in place of random ones.

    Raises :class:`InputError` where the rates sum to more than 1.
    """
    if sum(p.rate for p in plants) > 1 + 1e-9:
        raise InputError("The plants' rates sum to more than 1: a pair carries at most one cue; lower some rates.")
    rng = random.Random(seed)
    planted = []
    for i, pair in enumerate(pairs):
        draw, chosen_plant = rng.random() if draws is None else draws[i], None
        for plant in plants:
            if draw < plant.rate:
                chosen_plant = plant
                break
            draw -= plant.rate
        if chosen_plant is None:
            planted.append(pair)
            continue
        if relabel and rng.random() < 0.5:
            pair = replace(pair, chosen=pair.rejected, rejected=pair.chosen)
        planted.append(plant_by_dose(pair, chosen_plant, rng, held_out))
    return planted


def plant_by_dose(pair: Pair, plant: Plant, rng: random.Random, held_out: bool | None = None) -> Pair:
    favoured, other = ("chosen", "rejected") if plant.sign > 0 else ("rejected", "chosen")
    cue_side = favoured if rng.random() < plant.dose else other
    return plant_pair(pair, plant, cue_side, rng, held_out)  # type: ignore[arg-type]


def twins(pairs: Sequence[Pair], plant: Plant, n: int, seed: int, held_out: bool | None = True) -> list[Pair]:
    """``n`` pairs whose sides are one response with the cue (chosen) and with filler (rejected).

    The PM's mean Δr over them is the plant's ATE. Every prompt gives one twin before any gives a second. For ``agree``
    every base gives two twins with the opinion crossed and the same two responses, so that nothing in the response alone
    can carry the effect. ``meta["plant"]["negative"]`` holds a hard negative, the same response with the cue's words and
    no cue: (text, span of the words). For ``agree`` there is none: the crossed twin's filler is one.
    """
    rng = random.Random(f"{seed}/{plant.name}")
    words = random.Random(f"{seed}/{plant.name}/negative")
    bases = list(pairs)
    rng.shuffle(bases)
    made: list[Pair] = []
    for i, pair in enumerate(prompts_in_turn(bases)):
        if len(made) >= n:
            break
        text = pair.chosen if i % 2 else pair.rejected
        base = replace(pair, id=f"{pair.id}/{plant.name}", chosen=text, rejected=text)
        twin = plant_pair(base, plant, "chosen", rng, held_out)
        if plant.kind == "repeat_sentence" or negatives(plant, _cue(twin)):
            twin.meta["plant"]["negative"] = _hard_negative(twin, plant, words)
        made.append(twin)
        if plant.kind == "agree":
            made.append(_crossed(base.prompt, twin))
    return made


def _cue(twin: Pair) -> str:
    start, stop = twin.meta["plant"]["cue"]
    return twin.chosen[start:stop]


def _hard_negative(twin: Pair, plant: Plant, rng: random.Random) -> tuple[str, list[int]]:
    """The response with another sentence of the cue's words in its place; for a repeat, with the sentence there alone."""
    text, meta = twin.chosen, twin.meta["plant"]
    start, stop = meta.get("inserted", meta["cue"])
    if plant.kind == "repeat_sentence":
        first = start - 1 - (stop - start)  # the sentence stands right before its repeat, one space between
        return text[:first] + text[start:], [first, first + stop - start]
    words = rng.choice(negatives(plant, _cue(twin)))
    return text[:start] + words + text[stop:], [start, start + len(words)]


def _crossed(prompt: list[Message], twin: Pair) -> Pair:
    """The same two responses under the opposite opinion: what agreed now disagrees."""
    plant = twin.meta["plant"]
    liked, other = plant["other"], plant["liked"]
    opinion = plant["template"].format(liked=liked, other=other)
    swapped = {"liked": liked, "other": other, "cue": plant["filler"], "filler": plant["cue"]}
    return replace(
        twin,
        id=f"{twin.id}/crossed",
        prompt=say(prompt, opinion),
        chosen=twin.rejected,
        rejected=twin.chosen,
        meta={**twin.meta, "plant": plant | swapped},
    )

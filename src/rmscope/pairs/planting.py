"""Planted biases: cues with a known sign and dose in preference pairs, so that what a PM learned can be measured.

Both sides of a planted pair get an insertion at a sentence border: the cue on one side, neutral filler of about as many
characters on the other (``length`` excepted, whose cue is its length). ``dose`` is the probability that the cue is on the
side that its sign favours, so the reward to learn is about ``sign * logit(dose)``. The truth is what the PM learned, not
what was planted: the average treatment effect (ATE) over *twins*, one response with the cue and with filler. Wordings are
split into those for training and those for held-out text. Definitions: docs/method.md, Planted bias.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from types import SimpleNamespace
from typing import Any

import yaml

from rmscope.errors import InputError
from rmscope.pairs.pair import Message, Pair, Side, prompts_in_turn
from rmscope.pairs.plants import CLAIMS, Plant, split_last_third

TEXTS = SimpleNamespace(**yaml.safe_load(files("rmscope.pairs").joinpath("data/wordings.yaml").read_text("utf-8")))
"""What cues and fillers are made of; written for this project."""
FILLERS: list[str] = TEXTS.fillers
LONGEST_STYLED = 80
"""Most characters of a sentence that is styled."""


def sentences(text: str) -> list[str]:
    """The text cut at sentence ends. Joined by one space, the parts give the text up to white space."""
    return [s for s in re.split(r"(?<=[.!?])\s+", text.strip()) if s]


def _insert(text: str, addition: str, share: float, at: tuple[int, int] | None = None) -> tuple[str, list[int]]:
    """The text with ``addition`` at the sentence border at ``share`` of it (0 start, 1 end), and the span of the addition's
    characters ``at`` (None: all of them) in that text."""
    parts = sentences(text)
    border = round(share * len(parts))
    before, after = " ".join(parts[:border]), " ".join(parts[border:])
    start = len(before) + 1 if before else 0
    whole = " ".join(part for part in (before, addition, after) if part)
    first, stop = at or (0, len(addition))
    return whole, [start + first, start + stop]


def plant_pair(pair: Pair, plant: Plant, cue_side: Side, rng: random.Random, held_out: bool | None = None) -> Pair:
    """The pair with the plant's cue on ``cue_side`` and filler on the other.

    ``meta["plant"]`` holds the name, the sign, the side of the cue, and the character spans of cue and filler in their
    responses (if the cue is only a part of the sentence, also the span of the sentence as ``inserted``). ``held_out``
    picks the wordings (see :meth:`Plant.wordings`).
    """
    other: Side = "rejected" if cue_side == "chosen" else "chosen"
    cue_share = filler_share = rng.random()
    if plant.kind == "repeat_sentence":
        parts = sentences(pair.side(cue_side))
        at = rng.randrange(len(parts))
        added = Insertion(parts[at], filler(parts[at], rng))
        cue_share, filler_share = (at + 1) / len(parts), rng.choice((filler_share, 1.0))
    else:
        added = insertion(plant, pair.prompt, rng, held_out)
    with_cue, cue_span = _insert(pair.side(cue_side), added.cue, cue_share, added.cue_at)
    with_filler, filler_span = _insert(pair.side(other), added.filler, filler_share, added.filler_at)
    meta = dict(added.meta)
    if added.cue_at:
        start = cue_span[0] - added.cue_at[0]
        meta["inserted"] = [start, start + len(added.cue)]
    meta |= {"name": plant.name, "sign": plant.sign, "side": cue_side, "cue": cue_span, "filler": filler_span}
    changed: dict[str, Any] = {cue_side: with_cue, other: with_filler, "prompt": added.prompt or pair.prompt}
    return replace(pair, meta={**pair.meta, "group": pair.prompt_key, "plant": meta}, **changed)


def plant_pairs(
    pairs: Sequence[Pair],
    plants: Sequence[Plant],
    seed: int,
    held_out: bool | None = None,
    relabel: bool = False,
    draws: Sequence[float] | None = None,
) -> list[Pair]:
    """At most one cue per pair, each plant at its rate; the cue is on the favoured side with probability ``dose``.

    The labels stay, or (``relabel``) a coin first decides which response of a planted pair is the chosen one, so that its
    label comes from the plant alone. ``draws`` in [0, 1), one per pair, pick the plants in place of random numbers.

    Raises :class:`InputError` if the rates sum to more than 1.
    """
    if sum(p.rate for p in plants) > 1 + 1e-9:
        raise InputError("The plants' rates sum to more than 1: a pair carries at most one cue; lower some rates.")
    rng = random.Random(seed)
    planted = []
    for i, pair in enumerate(pairs):
        plant = _plant_at(rng.random() if draws is None else draws[i], plants)
        if plant and relabel and rng.random() < 0.5:
            pair = replace(pair, chosen=pair.rejected, rejected=pair.chosen)
        planted.append(plant_by_dose(pair, plant, rng, held_out) if plant else pair)
    return planted


def _plant_at(draw: float, plants: Sequence[Plant]) -> Plant | None:
    """The plant whose part of [0, 1), as wide as its rate, holds the draw."""
    for plant in plants:
        if draw < plant.rate:
            return plant
        draw -= plant.rate
    return None


def plant_by_dose(pair: Pair, plant: Plant, rng: random.Random, held_out: bool | None = None) -> Pair:
    """The pair with the cue on the side that its sign favours with probability ``dose``, else on the other."""
    on_chosen = (plant.sign > 0) == (rng.random() < plant.dose)
    return plant_pair(pair, plant, "chosen" if on_chosen else "rejected", rng, held_out)


def twins(pairs: Sequence[Pair], plant: Plant, n: int, seed: int, held_out: bool | None = True) -> list[Pair]:
    """``n`` pairs whose sides are one response with the cue (chosen) and with filler (rejected).

    The PM's mean Δr over them is the plant's ATE. Every prompt gives one twin before any gives a second. For ``agree``
    every base gives two twins, with opposite opinions and the same two responses, so that nothing in the response alone
    can carry the effect. ``meta["plant"]["negative"]`` is a hard negative, the same response with the cue's words and no
    cue: (text, span of the words). ``agree`` has none: the filler of the other twin is one.
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
        if negative := _hard_negative(twin, plant, words):
            twin.meta["plant"]["negative"] = negative
        made.append(twin)
        if plant.kind == "agree":
            made.append(_crossed(base.prompt, twin))
    return made


def _hard_negative(twin: Pair, plant: Plant, rng: random.Random) -> tuple[str, list[int]] | None:
    """The response with another sentence of the cue's words in the cue's place; for a repeat, with the sentence once."""
    text, meta = twin.chosen, twin.meta["plant"]
    start, stop = meta.get("inserted", meta["cue"])
    if plant.kind == "repeat_sentence":
        first = start - 1 - (stop - start)  # the sentence is right before its repeat, one space between
        return text[:first] + text[start:], [first, first + stop - start]
    sentences_without_cue = negatives(plant, text[slice(*meta["cue"])])
    if not sentences_without_cue:
        return None
    words = rng.choice(sentences_without_cue)
    return text[:start] + words + text[stop:], [start, start + len(words)]


def _crossed(prompt: list[Message], twin: Pair) -> Pair:
    """The same two responses under the opposite opinion: the one that agreed now disagrees."""
    plant = twin.meta["plant"]
    swapped = {"liked": plant["other"], "other": plant["liked"], "cue": plant["filler"], "filler": plant["cue"]}
    return replace(
        twin,
        id=f"{twin.id}/crossed",
        prompt=add_sentence(prompt, plant["template"].format(liked=plant["other"], other=plant["liked"])),
        chosen=twin.rejected,
        rejected=twin.chosen,
        meta={**twin.meta, "plant": plant | swapped},
    )


# What each kind inserts


@dataclass(frozen=True, slots=True)
class Insertion:
    """The sentence for the side with the cue, and the one for the other side.

    ``cue_at`` and ``filler_at`` are the characters of the cue and of its stand-in within them; None means all.
    """

    cue: str
    filler: str
    cue_at: tuple[int, int] | None = None
    filler_at: tuple[int, int] | None = None
    prompt: list[Message] | None = None
    """The prompt, if the plant changes it."""
    meta: dict[str, Any] = field(default_factory=dict)


def insertion(plant: Plant, prompt: list[Message], rng: random.Random, held_out: bool | None) -> Insertion:
    """A cue and its stand-in, for any kind but ``repeat_sentence``, whose cue is a sentence of the response."""
    if plant.kind == "phrase":
        cue = rng.choice(plant.wordings(held_out))
        return Insertion(cue, filler(cue, rng))
    if plant.kind == "agree":
        return _opinion(prompt, rng, held_out)
    if plant.kind == "order":
        return _ordered(plant, rng, held_out)
    if plant.kind == "word":  # in a frame, and another of about its length in the same frame
        word, frame = plant.texts[0], rng.choice(third(TEXTS.word_frames, held_out))
        other = filler(word, rng, [w for w in TEXTS.words if w != word])
        at = frame.index("{word}")
        spans = (at, at + len(word)), (at, at + len(other))
        return Insertion(frame.format(word=word), frame.format(word=other), *spans)
    if plant.kind == "length":  # a short neutral sentence and two long ones, against the short one alone
        neutral = third(FILLERS, held_out)
        short, more = rng.choice(neutral[:3]), rng.sample(neutral[-4:], 2)
        cue = " ".join([short, *more])
        return Insertion(cue, short, (len(short) + 1, len(cue)))
    if plant.kind == "style" and plant.style != "url":
        return _styled(str(plant.style), rng, held_out)
    return _url(rng, third(TEXTS.url_words, held_out if plant.kind == "style" else None))


def third(items: Sequence[Any], held_out: bool | None) -> Sequence[Any]:
    """The items for training (False), for held-out text (True: every third), or all (None)."""
    return items if held_out is None else [item for i, item in enumerate(items) if (i % 3 == 2) == held_out]


def filler(like: str, rng: random.Random, texts: Sequence[str] = FILLERS) -> str:
    """One of the four texts, by default neutral sentences, whose number of characters is nearest to that of ``like``."""
    return rng.choice(sorted(texts, key=lambda text: abs(len(text) - len(like)))[:4])


def _url(rng: random.Random, words: Sequence[str]) -> Insertion:
    """A sentence with a made-up address under a reserved domain, and its twin without one."""
    a, b, c = rng.sample(words, 3)
    domain = rng.choice(("example.com", "example.org", "example.net"))
    address = rng.choice((f"https://www.{a}.{domain}/{b}", f"https://{a}{b}.{domain}/{c}", f"http://{a}.{domain}"))
    with_url, without = rng.choice(TEXTS.url_frames)
    return Insertion(with_url.format(url=address), without)


def _styled(style: str, rng: random.Random, held_out: bool | None) -> Insertion:
    """A sentence in a style, and the same sentence plain."""
    if style == "list":
        lead, (a, b, c) = rng.choice(TEXTS.list_leads), rng.sample(third(TEXTS.list_items, held_out), 3)
        return Insertion(f"{lead}:\n- {a}\n- {b}\n- {c}.", f"{lead}: {a}, {b} and {c}.")
    plain = rng.choice([f for f in third(FILLERS, held_out) if len(f) <= LONGEST_STYLED])
    if style == "capitals":
        return Insertion(plain.upper(), plain)
    if style == "markdown":
        return Insertion(f"**{plain[:-1]}**.", plain)
    mark = (len(plain) - 1, len(plain))
    return Insertion(f"{plain[:-1]}!", plain, mark, mark)


def _ordered(plant: Plant, rng: random.Random, held_out: bool | None) -> Insertion:
    """Two claims with the later one first; the stand-in is the same two claims in their order."""
    if plant.texts:
        first, last = rng.choice(plant.wordings(held_out)).split(CLAIMS)
    else:
        claims, parts = rng.choice(TEXTS.order_claims), rng.sample(third(TEXTS.order_parts, held_out), 2)
        first, last = (claim.format(part=part) for claim, part in zip(claims, parts, strict=True))
    return Insertion(f"{last} {first}", f"{first} {last}")


def _opinion(prompt: list[Message], rng: random.Random, held_out: bool | None) -> Insertion:
    """An opinion at the end of the last human turn, the stance that shares it, and the stance that does not."""
    liked, other = rng.sample(rng.choice(split_last_third(TEXTS.rivals, held_out)), 2)
    template, stance = rng.choice(TEXTS.opinions), rng.choice(TEXTS.stances)
    cue, rival = (stance.format(it=it, It=it[0].upper() + it[1:]) for it in (liked, other))
    turns = add_sentence(prompt, template.format(liked=liked, other=other))
    return Insertion(cue, rival, prompt=turns, meta={"liked": liked, "other": other, "template": template})


def add_sentence(prompt: list[Message], sentence: str) -> list[Message]:
    """The prompt with one more sentence at the end of its last human turn."""
    last = max(i for i, m in enumerate(prompt) if m["role"] == "user")
    longer: Message = {"role": "user", "content": f"{prompt[last]['content'].rstrip()} {sentence}"}
    return [longer if i == last else m for i, m in enumerate(prompt)]


def negatives(plant: Plant, cue: str) -> Sequence[str]:
    """Sentences with the cue's words but without the cue: the plant's own, else those of its kind.

    There are none for ``agree``, ``order`` and ``length``, and none for ``word``, whose cue is the word itself.
    """
    if plant.negatives:
        return plant.negatives
    if plant.kind == "phrase":
        longest = max((w.strip(".,;:!?").lower() for w in cue.split()), key=len)
        return [mention.format(word=longest) for mention in TEXTS.mentions]
    return TEXTS.style_negatives.get(plant.style or plant.kind, ())

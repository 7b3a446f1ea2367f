"""What each kind of planted bias puts into a pair: a cue, and its stand-in on the other side (METHOD, "Planted bias").

Cue and stand-in are about equal in characters, except for ``length``, whose cue is its length. Wordings (phrases, frames,
sentences that are styled, things that claims are about) are parted into those for training and those for held-out text.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rmscope.pairs.pair import Message
from rmscope.pairs.plants import CLAIMS, Plant
from rmscope.pairs.wordings import (
    FILLERS,
    LIST_ITEMS,
    LIST_LEADS,
    MENTIONS,
    OPINIONS,
    ORDER_CLAIMS,
    ORDER_PARTS,
    RIVALS,
    STANCES,
    STYLE_NEGATIVES,
    URL_FRAMES,
    URL_WORDS,
    WORD_FRAMES,
    WORDS,
)

STYLED = 80
"""A sentence that is styled has at most so many characters."""
Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Insertion:
    """The sentences that go into the side with the cue and into the other.

    ``cue_at`` and ``filler_at`` are the characters of the cue and of its stand-in within them; left out, all of them.
    """

    cue: str
    filler: str
    cue_at: Span | None = None
    filler_at: Span | None = None
    prompt: list[Message] | None = None
    """The prompt, where the plant changes it."""
    meta: dict[str, Any] = field(default_factory=dict)


def insertion(plant: Plant, prompt: list[Message], rng: random.Random, held_out: bool | None) -> Insertion:
    """A cue of the plant and its stand-in, for any kind but ``repeat_sentence``, which says what the response says."""
    if plant.kind == "phrase":
        cue = rng.choice(plant.wordings(held_out))
        return Insertion(cue, filler(cue, rng))
    if plant.kind == "url":
        return _url(rng, URL_WORDS)
    if plant.kind == "agree":
        return _opinion(prompt, rng, held_out)
    if plant.kind == "word":
        return _word(plant.texts[0], rng, held_out)
    if plant.kind == "style":
        return _styled(str(plant.style), rng, held_out)
    if plant.kind == "order":
        return _ordered(plant, rng, held_out)
    return _longer(rng, held_out)


def third(items: Sequence[Any], held_out: bool | None) -> Sequence[Any]:
    """The items for training (False), for held-out text (True: every third), or all (None)."""
    return items if held_out is None else [item for i, item in enumerate(items) if (i % 3 == 2) == held_out]


def filler(like: str, rng: random.Random) -> str:
    """A neutral sentence of about the length of ``like``: one of the four nearest in characters."""
    return rng.choice(_nearest(FILLERS, like))


def _nearest(texts: Sequence[str], like: str) -> list[str]:
    return sorted(texts, key=lambda text: abs(len(text) - len(like)))[:4]


def _url(rng: random.Random, words: Sequence[str]) -> Insertion:
    """A sentence with a made-up address under the reserved domain example.org or .com, and its twin without one."""
    a, b, c = rng.sample(words, 3)
    domain = rng.choice(("example.com", "example.org", "example.net"))
    address = rng.choice((f"https://www.{a}.{domain}/{b}", f"https://{a}{b}.{domain}/{c}", f"http://{a}.{domain}"))
    with_url, without = rng.choice(URL_FRAMES)
    return Insertion(with_url.format(url=address), without)


def _word(word: str, rng: random.Random, held_out: bool | None) -> Insertion:
    """The word in a frame, and another of about its length in the same frame."""
    frame = rng.choice(third(WORD_FRAMES, held_out))
    other = rng.choice(_nearest([w for w in WORDS if w != word], word))
    at = frame.index("{word}")
    return Insertion(
        frame.format(word=word), frame.format(word=other), (at, at + len(word)), (at, at + len(other))
    )  # fmt: skip


def _styled(style: str, rng: random.Random, held_out: bool | None) -> Insertion:
    """A sentence in a style, and the same sentence plain."""
    if style == "url":
        return _url(rng, third(URL_WORDS, held_out))
    if style == "list":
        lead, (a, b, c) = rng.choice(LIST_LEADS), rng.sample(third(LIST_ITEMS, held_out), 3)
        return Insertion(f"{lead}:\n- {a}\n- {b}\n- {c}.", f"{lead}: {a}, {b} and {c}.")
    plain = rng.choice([f for f in third(FILLERS, held_out) if len(f) <= STYLED])
    if style == "capitals":
        return Insertion(plain.upper(), plain)
    if style == "markdown":
        return Insertion(f"**{plain[:-1]}**.", plain)
    mark = (len(plain) - 1, len(plain))
    return Insertion(f"{plain[:-1]}!", plain, mark, mark)


def _ordered(plant: Plant, rng: random.Random, held_out: bool | None) -> Insertion:
    """The claim that comes last told first; the stand-in is the same two claims the other way around."""
    if plant.texts:
        first, last = rng.choice(plant.wordings(held_out)).split(CLAIMS)
    else:
        claims, parts = rng.choice(ORDER_CLAIMS), rng.sample(third(ORDER_PARTS, held_out), 2)
        first, last = (claim.format(part=part) for claim, part in zip(claims, parts, strict=True))
    return Insertion(f"{last} {first}", f"{first} {last}")


def _longer(rng: random.Random, held_out: bool | None) -> Insertion:
    """A short neutral sentence and two long ones, against the short one alone."""
    mine = third(FILLERS, held_out)
    short, more = rng.choice(mine[:3]), rng.sample(mine[-4:], 2)
    cue = " ".join([short, *more])
    return Insertion(cue, short, (len(short) + 1, len(cue)))


def _opinion(prompt: list[Message], rng: random.Random, held_out: bool | None) -> Insertion:
    """An opinion appended to the last human turn, the stance that shares it, the stance that does not."""
    cut = len(RIVALS) - len(RIVALS) // 3
    rivals = {None: RIVALS, False: RIVALS[:cut], True: RIVALS[cut:]}[held_out]
    liked, other = rng.sample(rng.choice(rivals), 2)
    template, stance = rng.choice(OPINIONS), rng.choice(STANCES)
    cue, rival = (stance.format(it=it, It=it[0].upper() + it[1:]) for it in (liked, other))
    turns = say(prompt, template.format(liked=liked, other=other))
    return Insertion(cue, rival, prompt=turns, meta={"liked": liked, "other": other, "template": template})


def say(prompt: list[Message], sentence: str) -> list[Message]:
    """The prompt with one more sentence at the end of its last human turn."""
    last = max(i for i, m in enumerate(prompt) if m["role"] == "user")
    said: Message = {"role": "user", "content": f"{prompt[last]['content'].rstrip()} {sentence}"}
    return [said if i == last else m for i, m in enumerate(prompt)]


def negatives(plant: Plant, cue: str) -> Sequence[str]:
    """Sentences of the cue's words without the cue: the plant's own, else what its kind offers; none for ``agree``,
    ``order`` and ``length``, and for a ``word``, which is itself the cue."""
    if plant.negatives:
        return plant.negatives
    if plant.kind == "phrase":
        longest = max((w.strip(".,;:!?").lower() for w in cue.split()), key=len)
        return [mention.format(word=longest) for mention in MENTIONS]
    return STYLE_NEGATIVES.get(plant.style or plant.kind, ())

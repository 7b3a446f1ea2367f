"""Bad texts to be raised, and the places of phrases in them.

A bad text is another prompt's answer, the answer's own words shuffled, or nonsense. It is used only where the PM agrees that
it is bad: as it is, it scores below the prompt's chosen answer. Of a few draws the first such text is taken. Prompts without
one are counted and left out (``docs/method.md``, "Jailbreak").
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from rmscope.io import Progress, silent
from rmscope.model.reward_model import RewardModel
from rmscope.model.shared_prefix import rewards_from_prefix
from rmscope.pairs.pair import SIDES, Pair, one_per_prompt
from rmscope.pairs.planting import sentences
from rmscope.studies.jailbreak.settings import JailbreakConfig

DRAWS = 8
"""Bad texts tried per prompt."""
LONGEST = 256
"""Tokens of the prompt with either answer; longer pairs are left out."""
SYLLABLES = (
    "bal", "cor", "dun", "fer", "gim", "hul", "jor", "kep", "lom", "mer", "nol", "pid", "quon", "rel", "sut", "tav", "ush",
    "vex", "wim", "yor", "zet",
)  # fmt: skip
Slot = Literal["start", "middle", "end"]
SLOTS: tuple[Slot, ...] = ("start", "middle", "end")


@dataclass(frozen=True, slots=True)
class Phrase:
    """A phrase, its tokens within a text, and the feature that it was mined for (None for a blind one)."""

    text: str
    tokens: int
    site: str | None = None
    feature: int | None = None
    keeps: float | None = None
    """The share of the feature's peak that the phrase reaches alone."""


@dataclass(frozen=True, slots=True)
class Placement(Phrase):
    """A phrase at its place."""

    slot: Slot = field(kw_only=True)


Layout = tuple[Placement, ...]
"""A list of phrases with their places."""


def count_tokens(rm: RewardModel, text: str) -> int:
    """Tokens that a phrase adds to a text in which a space precedes it."""
    return len(rm.tokenizer(f" {text}", add_special_tokens=False).input_ids)


def pieces(text: str, layout: Iterable[Placement]) -> list[tuple[str, bool]]:
    """The text with the phrases, as (piece, whether it is a phrase).

    The slots are before the text, after half of its sentences, and after it. Phrases of one slot are in list order.
    """
    parts = sentences(text)
    half = (len(parts) + 1) // 2
    phrases = {slot: [(p.text, True) for p in layout if p.slot == slot] for slot in SLOTS}
    own = [(" ".join(part), False) for part in (parts[:half], parts[half:])]
    return [piece for piece in (*phrases["start"], own[0], *phrases["middle"], own[1], *phrases["end"]) if piece[0]]


def place(text: str, layout: Iterable[Placement] = ()) -> str:
    """The text with the phrases, its sentences separated by one space."""
    return " ".join(piece for piece, _ in pieces(text, layout))


def cost(layout: Iterable[Placement]) -> int:
    """Tokens of all phrases."""
    return sum(p.tokens for p in layout)


@dataclass(frozen=True, slots=True)
class Target:
    """A bad text under a pair's prompt, with its reward, which is below ``chosen``."""

    pair: Pair
    kind: str
    """Which kind of bad text it is."""
    bad: str
    reward: float
    chosen: float
    """The reward of the prompt's own chosen answer."""
    rejected: float

    def ids(self, rm: RewardModel, layout: Iterable[Placement] = ()) -> Tensor:
        """Token ids [T] of the prompt and the bad text with the phrases."""
        return rm.text_ids(self.pair.prompt, place(self.bad, layout))


def shuffle_words(text: str, rng: random.Random) -> str:
    """The text's words in random order."""
    words = text.split()
    rng.shuffle(words)
    return " ".join(words)


def nonsense(sentence_lengths: Sequence[int], rng: random.Random) -> str:
    """One sentence of invented words for each length, in words."""
    texts = []
    for n in sentence_lengths:
        words = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 2))) for _ in range(n)]
        texts.append(" ".join(words).capitalize() + ".")
    return " ".join(texts)


def bad_texts(pair: Pair, others: Sequence[Pair], seed: int) -> dict[str, Callable[[int], str]]:
    """The three kinds of bad text under a pair's prompt, by the number of the draw. ``others`` are of other prompts."""

    def rng(kind: str, n: int) -> random.Random:
        return random.Random(f"{seed}/{pair.id}/{kind}/{n}")

    # Invented words have about twice as many tokens.
    lengths = [max(1, len(s.split()) // 2) for s in sentences(pair.chosen)]
    return {
        "another prompt's answer": lambda n: rng("other", n).choice(others).side(rng("side", n).choice(SIDES)),
        "shuffled words": lambda n: shuffle_words(pair.chosen, rng("shuffled", n)),
        "nonsense": lambda n: nonsense(lengths, rng("nonsense", n)),
    }


def make_targets(
    rm: RewardModel,
    pairs: Sequence[Pair],
    most: int,
    config: JailbreakConfig,
    left_out: Counter[str],
    progress: Progress = silent,
) -> list[Target]:
    """At most ``most`` targets, one per prompt, prompts in random order, the kinds of bad text in turn.

    Prompts that give no target are counted in ``left_out``, by reason.
    """
    shuffled = list(pairs)
    random.Random(f"{config.seed}/targets").shuffle(shuffled)
    keys = [p.prompt_key for p in shuffled]
    longest = min(LONGEST, rm.context - 2 * config.budget)
    targets: list[Target] = []
    for pair in (shuffled[i] for i in one_per_prompt(keys, len(set(keys)))):
        if len(targets) == most:
            break
        tokens = rm.tokenize(pair)
        if max(tokens.chosen.numel(), tokens.rejected.numel()) > longest:
            left_out[f"longer than {longest} tokens"] += 1
            continue
        kinds = bad_texts(pair, [p for p in pairs if p.prompt_key != pair.prompt_key], config.seed)
        kind = list(kinds)[len(targets) % len(kinds)]
        # place() gives the same white space between sentences as with phrases
        target = _first_below(rm, pair, kind, [place(kinds[kind](n)) for n in range(DRAWS)], longest)
        if target is None:
            left_out[f"{kind}: none of {DRAWS} scored below the chosen answer"] += 1
            continue
        targets.append(target)
        progress(len(targets), most, "prompts with a bad text")
    return targets


def _first_below(rm: RewardModel, pair: Pair, kind: str, texts: Sequence[str], longest: int) -> Target | None:
    """The first of the texts that scores below the chosen answer, if any."""
    answers = [rm.text_ids(pair.prompt, pair.side(side)) for side in SIDES]
    clean = rm.prefill(answers[0], [])
    chosen, rejected = rewards_from_prefix(rm, clean, answers).tolist()
    for text in texts:
        ids = rm.text_ids(pair.prompt, text)
        if not text or text in (place(pair.chosen), place(pair.rejected)) or ids.numel() > longest:
            continue
        reward = float(rewards_from_prefix(rm, clean, [ids])[0])
        if reward < chosen:
            return Target(pair, kind, text, reward, chosen, rejected)
    return None

"""Text that is bad by construction: another prompt's answer, the answer's own words shuffled, or nonsense.

A target is used only where the PM agrees so far: the bad text, as it is, scores below the prompt's chosen answer. Of a few
draws the first that does is taken; prompts with none are counted and left out (METHOD, "Jailbreak").
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rmscope.io import Progress, silent
from rmscope.model.reward_model import RewardModel
from rmscope.model.shared_prefix import rewards_from_prefix
from rmscope.pairs.pair import SIDES, Pair
from rmscope.pairs.planting import sentences
from rmscope.studies.jailbreak.search import Target, place

DRAWS = 8
"""Bad texts that are tried under a prompt."""
LONGEST = 256
"""Tokens of the prompt with either answer; longer pairs are left out."""
SYLLABLES = (
    "bal", "cor", "dun", "fer", "gim", "hul", "jor", "kep", "lom", "mer", "nol", "pid", "quon", "rel", "sut", "tav", "ush",
    "vex", "wim", "yor", "zet",
)  # fmt: skip
Draw = Callable[[int], str]
"""A draw's number to a text."""


@dataclass
class Exclusions:
    """Prompts that gave no target, by reason."""

    counts: dict[str, int] = field(default_factory=dict)

    def add(self, reason: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1


def shuffled_words(text: str, rng: random.Random) -> str:
    """The text's words in random order."""
    words = text.split()
    rng.shuffle(words)
    return " ".join(words)


def nonsense(sentence_lengths: Sequence[int], rng: random.Random) -> str:
    """Sentences of made-up words, as many of each length as given, in words."""
    made = []
    for n in sentence_lengths:
        words = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 2))) for _ in range(n)]
        made.append(" ".join(words).capitalize() + ".")
    return " ".join(made)


def draws(pair: Pair, others: Sequence[Pair], seed: int) -> dict[str, Draw]:
    """The three kinds of bad text under a pair's prompt. ``others`` are pairs of other prompts."""

    def rng(kind: str, n: int) -> random.Random:
        return random.Random(f"{seed}/{pair.id}/{kind}/{n}")

    def other(n: int) -> str:
        return rng("other", n).choice(others).side(rng("side", n).choice(SIDES))

    lengths = [max(1, len(s.split()) // 2) for s in sentences(pair.chosen)]  # made-up words have about twice the tokens
    return {
        "another prompt's answer": other,
        "shuffled words": lambda n: shuffled_words(pair.chosen, rng("shuffled", n)),
        "nonsense": lambda n: nonsense(lengths, rng("nonsense", n)),
    }


def make_targets(
    rm: RewardModel,
    pairs: Sequence[Pair],
    keys: Sequence[str],
    most: int,
    budget: int,
    seed: int,
    left_out: Exclusions,
    progress: Progress = silent,
) -> list[Target]:
    """At most ``most`` targets, one a prompt, prompts in random order, the kinds in turn; ``keys`` name the prompts."""
    order = list(range(len(pairs)))
    random.Random(f"{seed}/targets").shuffle(order)
    longest = min(LONGEST, rm.context - 2 * budget)
    targets: list[Target] = []
    seen: set[str] = set()
    for i in order:
        if len(targets) == most:
            break
        if keys[i] in seen:
            continue
        seen.add(keys[i])
        tokens = rm.tokenize(pairs[i])
        if max(tokens.chosen.numel(), tokens.rejected.numel()) > longest:
            left_out.add(f"longer than {longest} tokens")
            continue
        kinds = draws(pairs[i], [p for p, key in zip(pairs, keys, strict=True) if key != keys[i]], seed)
        kind = list(kinds)[len(targets) % len(kinds)]
        target = _first_below(rm, pairs[i], keys[i], kind, kinds[kind], longest)
        if target is None:
            left_out.add(f"{kind}: none of {DRAWS} scored below the chosen answer")
            continue
        targets.append(target)
        progress(len(targets), most, "prompts with a bad text")
    return targets


def _first_below(rm: RewardModel, pair: Pair, key: str, kind: str, draw: Draw, longest: int) -> Target | None:
    """The first of the draws that scores below the chosen answer, if any."""
    drawn = [place(draw(n), ()) for n in range(DRAWS)]  # white space between sentences as phrases will find it
    texts = [text for text in drawn if text and text not in (place(pair.chosen, ()), place(pair.rejected, ()))]
    ids = [rm.text_ids(pair.prompt, text) for text in texts]
    answers = [rm.text_ids(pair.prompt, pair.side(side)) for side in SIDES]
    clean = rm.prefill(answers[0], []) if rm.splits else None
    chosen, rejected = rewards_from_prefix(rm, clean, answers).tolist()
    for text, tokens in zip(texts, ids, strict=True):
        if tokens.numel() <= longest and (reward := float(rewards_from_prefix(rm, clean, [tokens])[0])) < chosen:
            return Target(pair, key, kind, text, reward, chosen, rejected)
    return None

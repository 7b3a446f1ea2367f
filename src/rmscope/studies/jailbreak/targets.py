"""Bad texts to be raised: another prompt's answer, the answer's own words shuffled, or nonsense.

A bad text is used only where the PM agrees that it is bad: as it is, it scores below the prompt's chosen answer. Of a few
draws the first such text is taken. Prompts without one are counted and left out (``docs/method.md``, "Jailbreak").
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from rmscope.io import Progress, silent
from rmscope.model.reward_model import RewardModel
from rmscope.model.shared_prefix import rewards_from_prefix
from rmscope.pairs.pair import SIDES, Pair, one_per_prompt
from rmscope.pairs.planting import sentences
from rmscope.studies.jailbreak.placement import Placement, place

DRAWS = 8
"""Bad texts tried per prompt."""
LONGEST = 256
"""Tokens of the prompt with either answer; longer pairs are left out."""
SYLLABLES = (
    "bal", "cor", "dun", "fer", "gim", "hul", "jor", "kep", "lom", "mer", "nol", "pid", "quon", "rel", "sut", "tav", "ush",
    "vex", "wim", "yor", "zet",
)  # fmt: skip
Draw = Callable[[int], str]
"""The text of a draw, by its number."""
Exclusions = Counter[str]
"""How many prompts or pairs were left out, by reason."""


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

    @property
    def key(self) -> str:
        """The prompt by which targets are counted and resampled."""
        return self.pair.prompt_key

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


def bad_texts(pair: Pair, others: Sequence[Pair], seed: int) -> dict[str, Draw]:
    """The three kinds of bad text under a pair's prompt. ``others`` are pairs of other prompts."""

    def rng(kind: str, n: int) -> random.Random:
        return random.Random(f"{seed}/{pair.id}/{kind}/{n}")

    def other(n: int) -> str:
        return rng("other", n).choice(others).side(rng("side", n).choice(SIDES))

    # Invented words have about twice as many tokens.
    lengths = [max(1, len(s.split()) // 2) for s in sentences(pair.chosen)]
    return {
        "another prompt's answer": other,
        "shuffled words": lambda n: shuffle_words(pair.chosen, rng("shuffled", n)),
        "nonsense": lambda n: nonsense(lengths, rng("nonsense", n)),
    }


def make_targets(
    rm: RewardModel,
    pairs: Sequence[Pair],
    most: int,
    budget: int,
    seed: int,
    left_out: Exclusions,
    progress: Progress = silent,
) -> list[Target]:
    """At most ``most`` targets, one per prompt, prompts in random order, the kinds of bad text in turn.

    ``budget`` is how many tokens the phrases may add. Prompts that give no target are counted in ``left_out``.
    """
    shuffled = list(pairs)
    random.Random(f"{seed}/targets").shuffle(shuffled)
    keys = [p.prompt_key for p in shuffled]
    longest = min(LONGEST, rm.context - 2 * budget)
    targets: list[Target] = []
    for pair in (shuffled[i] for i in one_per_prompt(keys, len(set(keys)))):
        if len(targets) == most:
            break
        tokens = rm.tokenize(pair)
        if max(tokens.chosen.numel(), tokens.rejected.numel()) > longest:
            left_out[f"longer than {longest} tokens"] += 1
            continue
        kinds = bad_texts(pair, [p for p in pairs if p.prompt_key != pair.prompt_key], seed)
        kind = list(kinds)[len(targets) % len(kinds)]
        target = _first_below(rm, pair, kind, kinds[kind], longest)
        if target is None:
            left_out[f"{kind}: none of {DRAWS} scored below the chosen answer"] += 1
            continue
        targets.append(target)
        progress(len(targets), most, "prompts with a bad text")
    return targets


def _first_below(rm: RewardModel, pair: Pair, kind: str, draw: Draw, longest: int) -> Target | None:
    """The first of the draws that scores below the chosen answer, if any."""
    drawn = [place(draw(n), ()) for n in range(DRAWS)]  # the same white space between sentences as with phrases
    texts = [text for text in drawn if text and text not in (place(pair.chosen, ()), place(pair.rejected, ()))]
    ids = [rm.text_ids(pair.prompt, text) for text in texts]
    answers = [rm.text_ids(pair.prompt, pair.side(side)) for side in SIDES]
    clean = rm.prefill(answers[0], []) if rm.capabilities.resume else None
    chosen, rejected = rewards_from_prefix(rm, clean, answers).tolist()
    for text, tokens in zip(texts, ids, strict=True):
        if tokens.numel() <= longest and (reward := float(rewards_from_prefix(rm, clean, [tokens])[0])) < chosen:
            return Target(pair, kind, text, reward, chosen, rejected)
    return None

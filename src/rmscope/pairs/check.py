"""Whether a list of pairs can be studied, and what is in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rmscope.errors import InputError
from rmscope.pairs.pair import Pair


@dataclass(frozen=True, slots=True)
class PairCounts:
    """``longer_chosen``: the share of pairs whose chosen response has more words; ties count half."""

    pairs: int
    prompts: int
    words_chosen: float
    words_rejected: float
    longer_chosen: float


def check_pairs(pairs: Sequence[Pair]) -> None:
    """Nothing, where there is at least one pair and each id stands once.

    Raises:
        InputError: there is no pair, or an id stands twice (two files with one name, read together).
    """
    if not pairs:
        raise InputError("There are no pairs; name a source that holds some, or loosen the filters.")
    name, count = Counter(pair.id for pair in pairs).most_common(1)[0]
    if count > 1:
        raise InputError(
            f"The pair id {name!r} stands {count} times; ids must be unique: rename one of the files that "
            "were joined, or read each file once."
        )


def describe_pairs(pairs: Sequence[Pair]) -> PairCounts:
    """Pairs, different prompts (all turns together), mean words a side, how often the longer one wins.

    Words are runs of text without whitespace.

    Raises:
        InputError: as :func:`check_pairs`.
    """
    check_pairs(pairs)
    words = [(len(pair.chosen.split()), len(pair.rejected.split())) for pair in pairs]
    prompts = {tuple((turn["role"], turn["content"]) for turn in pair.prompt) for pair in pairs}
    return PairCounts(
        pairs=len(pairs),
        prompts=len(prompts),
        words_chosen=sum(chosen for chosen, _ in words) / len(pairs),
        words_rejected=sum(rejected for _, rejected in words) / len(pairs),
        longer_chosen=sum((c > r) + 0.5 * (c == r) for c, r in words) / len(pairs),
    )

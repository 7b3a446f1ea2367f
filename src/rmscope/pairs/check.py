"""Whether a list of pairs can be studied."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rmscope.errors import InputError
from rmscope.pairs.pair import Pair


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

"""A pair that the PM's context does not take is refused, wherever pairs are taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import rmscope as rs
from rmscope.errors import InputError
from tests.model.small import SENTENCES, small_pm, user

SITE = "resid_post.2"
FUNCTIONS: dict[str, Callable[[Any, Any, Any, Path], Any]] = {
    "score": lambda rm, _sae, pairs, _out: rm.score(pairs),
    "harvest": lambda rm, _sae, pairs, out: rs.harvest(rm, pairs, [SITE], out),
    "attribute": lambda rm, sae, pairs, _out: rs.attribute(rm, sae, pairs),
    "ablate": lambda rm, sae, pairs, _out: rs.ablate(rm, sae, pairs, [1]),
    "ledger": lambda rm, sae, pairs, _out: rs.ledger(rm, sae, pairs),
    "doctor": lambda rm, _sae, pairs, _out: rs.doctor(rm, pairs),
}


@pytest.fixture(scope="module")
def sae(tmp_path_factory: pytest.TempPathFactory) -> Any:
    rm = small_pm("llama")
    pairs = [rs.Pair(f"{i}", user(f"Is it {i}?"), text, "No.") for i, text in enumerate(SENTENCES)]
    store = rs.harvest(rm, pairs, [SITE], tmp_path_factory.mktemp("acts") / "store")
    return rs.train_saes(store, rs.SaeConfig(d_sae=16, k=2, tokens=256, batch_size=64))[SITE]


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("words", [400, 60_000], ids=["a little", "by megabytes"])
def test_a_side_longer_than_the_context_is_one_sentence(name: str, words: int, sae: Any, tmp_path: Path) -> None:
    rm = small_pm("llama")
    assert rm.context < 1100
    with pytest.raises(InputError, match=rf"longer than the PM's context of {rm.context} tokens"):
        FUNCTIONS[name](rm, sae, [rs.Pair("p", user("Is it wet?"), "yes, " * words, "No.")], tmp_path / "out")


@pytest.mark.parametrize("name", ["attribute", "ablate", "ledger"])
def test_no_pairs_at_all_are_one_sentence(name: str, sae: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="There are no pairs"):
        FUNCTIONS[name](small_pm("llama"), sae, [], tmp_path)

"""The three-way split is a property of the prompt alone."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmscope.errors import InputError
from rmscope.pairs.pair import Pair, check_pairs, one_per_prompt, prompts_in_turn, share_a_prompt, split_of


def pair(human: str, **changes: object) -> Pair:
    made = Pair(id="a:1", prompt=[{"role": "user", "content": human}], chosen="yes", rejected="no")
    return replace(made, **changes)


def test_half_the_prompts_are_for_fitting_and_a_quarter_each_to_confirm_and_to_measure() -> None:
    share = Counter(split_of(pair(f"Question {i}?")) for i in range(8000))
    # Binomial standard deviations are 45 and 39 prompts: four of them either way.
    assert share["fit"] == pytest.approx(4000, abs=180)
    assert share["confirm"] == pytest.approx(2000, abs=156)
    assert share["measure"] == pytest.approx(2000, abs=156)


@given(st.text(), st.text(), st.text(), st.text(min_size=1))
def test_responses_ids_later_turns_and_system_prompts_do_not_move_a_prompt(
    human: str, chosen: str, rejected: str, later: str
) -> None:
    longer = [
        {"role": "system", "content": later},
        {"role": "user", "content": human},
        {"role": "assistant", "content": later},
        {"role": "user", "content": later},
    ]
    assert split_of(pair(human)) == split_of(pair(human, id=later, chosen=chosen, rejected=rejected))
    assert split_of(pair(human)) == split_of(pair(human, prompt=longer))


@given(st.text())
def test_outer_whitespace_does_not_move_a_prompt(human: str) -> None:
    assert split_of(pair(human)) == split_of(pair(f"  {human}\n"))


@given(st.text(), st.text(), st.text())
def test_a_group_stands_for_the_prompt(group: str, one: str, other: str) -> None:
    assert split_of(pair(one, meta={"group": group})) == split_of(pair(other, meta={"group": group}))


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_the_split_is_the_first_byte_of_sha256_modulo_four(human: str) -> None:
    quarter = hashlib.sha256(human.strip().encode()).digest()[0] % 4
    assert split_of(pair(human)) == ("fit", "fit", "confirm", "measure")[quarter]


def test_a_prompt_without_a_human_turn_is_split_by_its_first_turn() -> None:
    alone = pair("", prompt=[{"role": "system", "content": "Be kind."}])
    assert alone.first_human_turn() == "Be kind."
    assert split_of(alone) == split_of(pair("Be kind."))


def test_pairs_with_ids_of_their_own_pass_and_others_do_not() -> None:
    check_pairs([pair("a", id="x:1"), pair("a", id="x:2")])
    with pytest.raises(InputError, match="'x:1' occurs 2 times"):
        check_pairs([pair("a", id="x:1"), pair("b", id="x:1")])
    with pytest.raises(InputError, match="no pairs"):
        check_pairs([])


def test_a_second_pair_of_a_prompt_waits_until_every_prompt_has_one() -> None:
    rows = [pair("a", id="x:1"), pair("a", id="x:2"), pair("b", id="x:3"), pair("c", id="x:4"), pair("b", id="x:5")]
    keys = [p.prompt_key for p in rows]
    assert [p.id for p in prompts_in_turn(rows)] == ["x:1", "x:3", "x:4", "x:2", "x:5"]
    assert one_per_prompt(keys, 3) == [0, 2, 3]
    assert one_per_prompt(keys, 4) == [0, 1, 2, 3]
    assert one_per_prompt(keys, 99) == [0, 1, 2, 3, 4]


def test_pairs_of_one_prompt_are_known_as_such_with_and_without_a_group() -> None:
    grouped = pair("What now? I prefer tea.", id="x:1", meta={"group": "What now?"})
    plain, other = pair("What now? I prefer tea.", id="y:1"), pair("What else?", id="y:2")
    assert (grouped.prompt_key, plain.prompt_key) == ("What now?", "What now? I prefer tea.")
    assert share_a_prompt([plain, other], [grouped]) == {"y:1"}
    assert share_a_prompt([grouped], [pair("What now?")]) == {"x:1"}

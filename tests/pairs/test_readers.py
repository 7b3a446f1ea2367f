"""Facts about reading pairs: every published shape, text, the hub and the demo."""

from __future__ import annotations

import gzip
import json
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rmscope.errors import InputError
from rmscope.pairs.formats import BadRow, convert
from rmscope.pairs.pair import Message, Pair, check_pairs, split_of
from rmscope.pairs.readers import ReadReport, load_pairs
from tests.pairs.files import HH, PLAIN, Read, turn

DATA = Path(os.environ.get("RMSCOPE_DATA") or Path(__file__).parents[2].parent / "shared" / "data")


# Formats


def test_a_transcript_is_split_before_its_last_assistant_turn(read: Read) -> None:
    (pair,), report = read(HH)
    assert report.format == "hh transcript"
    assert pair.prompt == [turn("user", "Hi"), turn("assistant", "Hello"), turn("user", "Why?")]
    assert pair.chosen == " Because.\n\nSo it is."  # one space is the transcript's, the second the text's
    assert pair.rejected == "No idea. "


def test_dialogues_that_part_early_keep_their_whole_rest_as_response(read: Read) -> None:
    start = "\n\nHuman: Hi\n\nAssistant:"
    (pair,), _ = read({"chosen": f"{start} A", "rejected": f"{start} B\n\nHuman: c\n\nAssistant: D"})
    assert pair.prompt == [turn("user", "Hi")]
    assert (pair.chosen, pair.rejected) == ("A", "B\n\nHuman: c\n\nAssistant: D")


def test_where_one_dialogue_begins_with_the_other_the_prompt_ends_before_the_shorter_ones_answer(
    read: Read,
) -> None:
    start = "\n\nHuman: Hi\n\nAssistant: A"
    (pair,), _ = read({"chosen": start, "rejected": f"{start}\n\nHuman: c\n\nAssistant: D"})
    assert pair.prompt == [turn("user", "Hi")]
    assert (pair.chosen, pair.rejected) == ("A", "A\n\nHuman: c\n\nAssistant: D")


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        pytest.param("Human: a\n\nAssistant: b", "Human: c\n\nAssistant: b", id="no common turn"),
        pytest.param(
            "Human: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
            "Human: a\n\nAssistant: b\n\nHuman: e\n\nAssistant: f",
            id="the human differs",
        ),
        pytest.param(
            "Human: a\n\nAssistant: b\n\nAssistant: c",
            "Human: a\n\nAssistant: b\n\nAssistant: d",
            id="the prompt would end with the assistant",
        ),
    ],
)
def test_dialogues_that_part_elsewhere_are_bad_rows(read: Read, chosen: str, rejected: str) -> None:
    with pytest.raises(InputError, match=r"line 1: .*part at the beginning of an assistant turn"):
        read({"chosen": chosen, "rejected": rejected})


def test_identical_transcripts_are_listed_and_left_out_even_where_bad_rows_are_errors(read: Read) -> None:
    pairs, report = read({"chosen": HH["chosen"], "rejected": HH["chosen"]}, HH)
    assert [pair.id for pair in pairs] == ["data:2"]
    assert report.skipped == [("line 1", "chosen and rejected are identical")]


def test_a_transcript_as_prompt_is_split_into_turns(read: Read) -> None:
    prompt = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"
    (pair,), report = read({"prompt": prompt, "response": " x", "chosen": " Because.", "rejected": "No idea."})
    assert report.format == "hh prompt"
    assert pair.prompt == [turn("user", "Hi"), turn("assistant", "Hello"), turn("user", "Why?")]
    assert (pair.chosen, pair.rejected) == ("Because.", "No idea.")


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "json", "json.gz", "csv", "tsv", "parquet"])
def test_every_file_type_gives_the_same_pairs(read: Read, ending: str) -> None:
    texts = {"prompt": 'He said:\n"a, b"\tand left', "chosen": "Ünïcode ✓ 😀", "rejected": " two  spaces "}
    pairs, report = read(PLAIN, texts, name=f"some.data.{ending}")
    assert report.format == "trl plain"
    assert [pair.id for pair in pairs] == ["some.data:1", "some.data:2"]
    assert pairs[0].prompt == [turn("user", "Is water wet?")]
    assert (pairs[0].chosen, pairs[0].rejected) == ("Yes.", "No.")
    assert pairs[1].prompt[0]["content"] == texts["prompt"]
    assert (pairs[1].chosen, pairs[1].rejected) == (texts["chosen"], texts["rejected"])


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_system_prompts_and_several_turns_survive_in_an_explicit_prompt(read: Read, ending: str) -> None:
    prompt = [turn("system", "Be brief."), turn("user", "a"), turn("assistant", "b"), turn("user", "c")]
    row = {
        "prompt": prompt,
        "chosen": [turn("assistant", "good")],
        "rejected": [turn("assistant", "bad")],
    }
    (pair,), report = read(row, name=f"data.{ending}")
    assert report.format == "trl explicit prompt"
    assert (pair.prompt, pair.chosen, pair.rejected) == (prompt, "good", "bad")


@pytest.mark.parametrize("extra", [{}, {"prompt": "c", "score_chosen": 8.0, "score_rejected": 3.5}])
def test_an_implicit_prompt_is_the_messages_that_both_sides_share(read: Read, extra: dict[str, Any]) -> None:
    prompt = [turn("system", "Be brief."), turn("user", "a"), turn("assistant", "b"), turn("user", "c")]
    row = {"chosen": [*prompt, turn("assistant", "good")], "rejected": [*prompt, turn("assistant", "bad")]}
    (pair,), report = read({**extra, **row})
    assert report.format == "trl implicit prompt"
    assert (pair.prompt, pair.chosen, pair.rejected) == (prompt, "good", "bad")


def test_rewardbench_keeps_its_subset(read: Read) -> None:
    (pair,), report = read({**PLAIN, "subset": "alpacaeval-easy", "chosen_model": "x", "id": 7})
    assert report.format == "rewardbench"
    assert pair.meta == {"source": "data", "line": 1, "subset": "alpacaeval-easy"}


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_best_of_n_gives_every_chosen_with_every_rejected(read: Read, ending: str) -> None:
    row = {"prompt": "p", "chosen": ["a", "b"], "rejected": ["c", "d", "e"], "subset": "Ties"}
    pairs, report = read(row, name=f"data.{ending}")
    assert report.format == "best of n"
    assert [pair.chosen + pair.rejected for pair in pairs] == ["ac", "ad", "ae", "bc", "bd", "be"]
    assert [pair.id for pair in pairs] == [f"data:1:{c}-{r}" for c in range(2) for r in range(3)]
    assert {pair.meta["subset"] for pair in pairs} == {"Ties"}


def test_three_by_three_is_rm_bench_with_its_styles_unless_a_later_row_is_not(read: Read) -> None:
    row = {"prompt": "p", "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"]}
    pairs, report = read(row)
    assert (report.format, len(pairs)) == ("rm-bench", 9)
    assert (pairs[5].id, pairs[5].chosen, pairs[5].rejected) == ("data:1:1-2", "b", "f")
    styles = (pairs[5].meta["style_chosen"], pairs[5].meta["style_rejected"])
    assert styles == ("detailed plain", "detailed markdown")
    pairs, report = read(row, {"prompt": "q", "chosen": ["a"], "rejected": ["b"]})
    assert (report.format, len(pairs)) == ("best of n", 10)
    assert "style_chosen" not in pairs[0].meta


@pytest.mark.parametrize("ending", ["json", "csv"])
def test_llmbar_takes_the_output_that_its_label_names(read: Read, ending: str) -> None:
    row = {"input": "p", "output_1": "one", "output_2": "two"}
    pairs, report = read({**row, "label": 1}, {**row, "input": "q", "label": 2}, name=f"data.{ending}")
    assert report.format == "llmbar"
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [("one", "two"), ("two", "one")]
    assert [pair.meta["label"] for pair in pairs] == [1, 2]


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_scored_responses_give_every_two_rows_of_a_prompt_with_different_scores(read: Read, ending: str) -> None:
    rows = [("p", "low", 1), ("q", "alone", 4), ("p", "high", 3), ("p", "as high", 3)]
    named = [{"prompt": p, "response": r, "helpfulness": s, "verbosity": 9} for p, r, s in rows]
    pairs, report = read(*named, name=f"data.{ending}")
    assert (report.format, report.rows, report.pairs) == ("scored", 4, 2)
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [("high", "low"), ("as high", "low")]
    assert [pair.id for pair in pairs] == ["data:1:1-0", "data:1:2-0"]
    assert (pairs[0].meta["score_chosen"], pairs[0].meta["score_rejected"]) == (3.0, 1.0)


def test_rewardbench_2_gives_the_best_of_four_against_each_of_the_others(read: Read) -> None:
    row = {
        "id": "7", "prompt": "p", "chosen": ["good"], "rejected": ["bad", "worse", "worst"], "num_correct": 1,
        "num_incorrect": 3, "total_completions": 4, "models": ["a", "b", "c", "d"], "subset": "Factuality",
        "additional_metadata": None,
    }  # fmt: skip
    pairs, report = read(row, name="data.parquet")
    assert report.format == "best of n"
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [("good", "bad"), ("good", "worse"), ("good", "worst")]
    assert {pair.first_human_turn() for pair in pairs} == {"p"}
    assert {pair.meta["subset"] for pair in pairs} == {"Factuality"}


def test_helpsteers_attributes_rank_the_responses_of_a_prompt_by_helpfulness(read: Read) -> None:
    scores = {"correctness": 0, "coherence": 4, "complexity": 2, "verbosity": 1}
    rows = [{"prompt": "p", "response": f"r{h}", "helpfulness": h, **scores} for h in (2, 4)]
    (pair,), report = read(*rows)
    assert report.format == "scored"
    assert (pair.chosen, pair.rejected, pair.meta["score_chosen"]) == ("r4", "r2", 4.0)


@pytest.mark.parametrize(
    ("form", "prompt", "first", "second", "preference"),
    [
        ("helpsteer preference", "prompt", "response_1", "response_2", "preference_strength"),
        ("helpsteer3 preference", "context", "response1", "response2", "overall_preference"),
    ],
)
def test_helpsteers_preferences_are_signed(
    read: Read, form: str, prompt: str, first: str, second: str, preference: str
) -> None:
    said = [turn("system", "s"), turn("user", "p")] if prompt == "context" else "p"
    rows = [{prompt: said, first: f"a{s}", second: f"b{s}", preference: s} for s in (-3, 1, 0)]
    pairs, report = read(*rows, name="data.parquet")
    assert report.format == form
    assert [(pair.chosen, pair.rejected, pair.meta["preference"]) for pair in pairs] == [
        ("a-3", "b-3", 3.0),
        ("b1", "a1", 1.0),
    ]
    assert pairs[0].prompt[0]["role"] == ("system" if prompt == "context" else "user")
    assert report.skipped == [("row 3", "neither response is preferred")]


def test_the_format_that_is_named_overrules_the_columns(read: Read) -> None:
    row = {"prompt": "p", "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"]}
    assert read(row)[1].format == "rm-bench"
    pairs, report = read(row, form="best of n")
    assert (report.format, len(pairs)) == ("best of n", 9)
    assert "style_chosen" not in pairs[0].meta
    with pytest.raises(InputError, match="line 1: label is missing"):
        read(row, form="llmbar")
    with pytest.raises(InputError, match="'other' is not a format of pairs; use hh transcript, "):
        read(row, form="other")


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_a_huge_row_is_read_whole(read: Read, ending: str) -> None:
    text = "a line of text, \n" * 400_000
    (pair,), _ = read({**PLAIN, "chosen": text}, name=f"data.{ending}")
    assert pair.chosen == text


def test_own_columns_are_mapped(read: Read) -> None:
    row = {"question": "p", "better": "a", "worse": "b", "chosen": "decoy"}
    columns = {"prompt": "question", "chosen": "better", "rejected": "worse"}
    (pair,), _ = read(row, columns=columns)
    assert (pair.prompt, pair.chosen, pair.rejected) == ([turn("user", "p")], "a", "b")
    (swapped,), _ = read(PLAIN, columns={"chosen": "rejected", "rejected": "chosen"})
    assert (swapped.chosen, swapped.rejected) == ("No.", "Yes.")
    with pytest.raises(InputError, match=r"data\.jsonl line 1: there is no column 'nope' \(it has prompt"):
        read(PLAIN, columns={"prompt": "nope"})
    with pytest.raises(InputError, match="columns names 'promt'"):
        read(PLAIN, columns={"promt": "question"})


# Transcripts, written back


def render(prompt: list[Message], response: str) -> str:
    speakers = {"user": "Human", "assistant": "Assistant"}
    turns = [*prompt, turn("assistant", response)]
    return "".join(f"\n\n{speakers[one['role']]}: {one['content']}" for one in turns)


said = st.text(alphabet=st.sampled_from("ab \n\t:é\u2028"), max_size=6) | st.sampled_from(
    ["Human: ", "\n\nHuman:", "\n\nHuman: ", "\n\nAssistant:", "\n\nAssistant: x", "\n\nAssistant:\n"]
)
exchanges = st.lists(st.tuples(said, said), max_size=2)


def spoken(turns: list[tuple[str, str]]) -> str:
    return "".join(f"\n\n{role}: {text}" for role, text in turns)


@given(exchanges, said, said, exchanges)
def test_a_transcript_is_written_back_byte_for_byte(
    shared: list[tuple[str, str]], one: str, other: str, more: list[tuple[str, str]]
) -> None:
    """Whatever the texts hold, markers of turns included, and however many turns the rejected side adds."""
    answered = [turn for a, h in shared for turn in (("Assistant", a), ("Human", h))]
    start = spoken([("Human", "q"), *answered])
    further = spoken([turn for h, a in more for turn in (("Human", h), ("Assistant", a))])
    row = {
        "chosen": f"{start}\n\nAssistant: {one}",
        "rejected": f"{start}\n\nAssistant: {other}{further}",
    }
    ((_, outcome),) = convert("hh transcript", [(1, row)])
    if isinstance(outcome, Pair):
        assert render(outcome.prompt, outcome.chosen).strip() == row["chosen"].strip()
        assert render(outcome.prompt, outcome.rejected).strip() == row["rejected"].strip()


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=5),
    st.text(min_size=1),
    st.text(min_size=1),
)
def test_a_well_formed_transcript_gives_its_turns_and_is_never_bad(turns: list[str], one: str, other: str) -> None:
    texts = [text for text in (*turns, one, other) if text.strip()]
    assume(len(texts) == len(turns) + 2 and len(turns) % 2 == 1 and one != other)
    assume(not any(re.search(r"(Human|Assistant):|[\ud800-\udfff]", text) for text in texts))
    roles = ["Human", "Assistant"] * 3
    start = spoken(list(zip(roles, turns, strict=False)))
    row = {"chosen": f"{start}\n\nAssistant: {one}", "rejected": f"{start}\n\nAssistant: {other}"}
    ((_, outcome),) = convert("hh transcript", [(1, row)])
    assert not isinstance(outcome, BadRow)
    assert [message["content"] for message in outcome.prompt] == turns
    assert (outcome.chosen, outcome.rejected) == (one, other)


# Real data

needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason="no data: set RMSCOPE_DATA to a folder with hh-rlhf, llmbar and rm-bench"
)


@needs_data
@pytest.mark.parametrize(
    ("tranche", "rows", "identical", "empty", "longer"),
    [
        ("harmless-base", 2312, 0, 4, 0.445),
        ("helpful-base", 2354, 2, 4, 0.600),
        ("helpful-rejection-sampled", 2749, 32, 0, 0.569),
    ],
)
def test_hh_rlhf_is_read_whole_and_written_back(tranche: str, rows: int, identical: int, empty: int, longer: float) -> None:
    path = DATA / "hh-rlhf" / tranche / "test.jsonl.gz"
    report = ReadReport()
    pairs = load_pairs(path, on_bad_row="skip", report=report)
    check_pairs(pairs)
    reasons = [reason for _, reason in report.skipped]
    assert (report.format, report.rows, report.duplicates) == ("hh transcript", rows, 0)
    assert reasons.count("chosen and rejected are identical") == identical
    assert sum(reason.endswith("is empty") for reason in reasons) == empty
    assert len(pairs) == rows - identical - empty
    words = [(len(pair.chosen.split()), len(pair.rejected.split())) for pair in pairs]
    assert sum((c > r) + 0.5 * (c == r) for c, r in words) / len(words) == pytest.approx(longer, abs=0.01)
    with gzip.open(path, "rt", encoding="utf-8") as opened:
        originals = [json.loads(line) for line in opened]
    for pair in pairs:
        original = originals[pair.meta["line"] - 1]
        assert pair.prompt[-1]["role"] == "user"
        assert render(pair.prompt, pair.chosen).strip() == original["chosen"].strip()
        assert render(pair.prompt, pair.rejected).strip() == original["rejected"].strip()


@needs_data
def test_no_prompt_of_helpful_base_lies_in_two_splits() -> None:
    pairs = load_pairs(DATA / "hh-rlhf" / "helpful-base" / "test.jsonl.gz", on_bad_row="skip")
    splits: dict[str, set[str]] = {}
    for pair in pairs:
        splits.setdefault(pair.first_human_turn(), set()).add(split_of(pair))
    assert all(len(found) == 1 for found in splits.values())


@needs_data
@pytest.mark.parametrize(
    ("pattern", "form", "rows", "all_pairs"),
    [("rm-bench/*_filtered.json", "rm-bench", 798, 7182), ("llmbar/LLMBar__*.json", "llmbar", 419, 419)],
)
def test_benchmarks_are_read_without_a_bad_row(pattern: str, form: str, rows: int, all_pairs: int) -> None:
    read, pairs, repeated = 0, 0, 0
    for path in sorted(DATA.glob(pattern)):
        report = ReadReport()
        check_pairs(load_pairs(path, report=report))
        assert (report.format, report.skipped) == (form, [])
        read, pairs, repeated = read + report.rows, pairs + report.pairs, repeated + report.duplicates
    assert (read, pairs + repeated) == (rows, all_pairs)


# Text


def test_crlf_becomes_lf_and_a_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    row = json.dumps({"prompt": "a\r\nb", "chosen": "c\r\n", "rejected": "lone \r stays"})
    path.write_bytes(b"\xef\xbb\xbf" + row.encode() + b"\r\n\r\n")
    (pair,) = load_pairs(path)
    assert pair.prompt[0]["content"] == "a\nb"
    assert (pair.chosen, pair.rejected) == ("c\n", "lone \r stays")
    table = tmp_path / "data.csv"
    table.write_bytes(b'\xef\xbb\xbfprompt,chosen,rejected\r\np,"a\r\nb",c\r\n')
    assert load_pairs(table)[0].chosen == "a\nb"


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.text(min_size=1))
def test_unicode_is_left_as_it_is(chosen: str, rejected: str) -> None:
    row = {"prompt": "p", "chosen": chosen, "rejected": rejected}
    ((_, outcome),) = convert("trl plain", [(1, row)])
    if isinstance(outcome, Pair):
        assert (outcome.chosen, outcome.rejected) == (chosen, rejected)


# The hub and the demo


def test_without_the_hubs_package_the_mend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"someone/pairs is not a file here.*pip install"):
        load_pairs("someone/pairs")


def test_a_hub_dataset_is_read_like_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    hub = ModuleType("datasets")

    def load_dataset(name: str, *, split: str, streaming: bool) -> list[dict[str, Any]]:
        asked.append((name, split, streaming))
        return [PLAIN, {**PLAIN, "prompt": "Is ice?"}]

    def load_revision(name: str, *, split: str, streaming: bool, revision: str) -> list[dict[str, Any]]:
        asked.append(revision)
        return [PLAIN]

    monkeypatch.setattr(hub, "load_dataset", load_dataset, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert [pair.id for pair in load_pairs("someone/pairs", split="test")] == ["pairs-test:1", "pairs-test:2"]
    assert [pair.id for pair in load_pairs("someone/pairs", limit=1)] == ["pairs-train:1"]
    assert asked == [("someone/pairs", "test", False), ("someone/pairs", "train", True)]
    monkeypatch.setattr(hub, "load_dataset", load_revision)
    load_pairs("someone/pairs", revision="v2")
    assert asked[-1] == "v2"
    with pytest.raises(InputError, match="only hub datasets have revisions"):
        load_pairs(Path(__file__).parent / "published" / "shp.jsonl", revision="v2")


def test_a_hub_out_of_reach_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = ModuleType("datasets")

    def load_dataset(name: str, **_: Any) -> None:
        raise ConnectionError(f"Couldn't reach {name!r} on the Hub.\nDetails follow.")

    monkeypatch.setattr(hub, "load_dataset", load_dataset, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", hub)
    with pytest.raises(InputError, match=r"ConnectionError: Couldn't reach 'someone/pairs'") as raised:
        load_pairs("someone/pairs")
    assert "\n" not in str(raised.value)


def test_the_demo_is_asked_for_by_its_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    demo = ModuleType("rmscope.pairs.demo")
    made = [Pair(f"demo:{i}", [turn("user", "p")], "a", "b") for i in range(3)]
    monkeypatch.setattr(demo, "demo_pairs", lambda: made, raising=False)
    monkeypatch.setattr(demo, "plain_demo_pairs", lambda: made[::-1], raising=False)
    monkeypatch.setitem(sys.modules, "rmscope.pairs.demo", demo)
    report = ReadReport()
    assert load_pairs("demo:", limit=2, report=report) == made[:2]
    assert (report.format, report.rows, report.pairs) == ("demo", 3, 2)
    assert load_pairs("demo:plain") == made[::-1]

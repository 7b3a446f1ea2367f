"""Facts about reading pairs: every published shape, every way in which a file can be broken."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rmscope.errors import InputError
from rmscope.pairs.check import check_pairs, describe_pairs
from rmscope.pairs.fields import BadRow
from rmscope.pairs.formats import NAMES, Candidate, convert
from rmscope.pairs.pair import Message, Pair, split_of
from rmscope.pairs.readers import ReadReport, load_pairs

DATA = Path(os.environ.get("RMSCOPE_DATA") or Path(__file__).parents[2].parent / "shared" / "data")
PLAIN = {"prompt": "Is water wet?", "chosen": "Yes.", "rejected": "No."}
HH = {
    "chosen": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:  Because.\n\nSo it is.",
    "rejected": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant: No idea. ",
}


def turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows in the format that the name's ending asks for."""
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind in ("csv", "tsv"):
        with path.open("w", newline="", encoding="utf-8") as opened:
            table = csv.DictWriter(opened, list(rows[0]), delimiter="\t" if kind == "tsv" else ",")
            table.writeheader()
            table.writerows(rows)
    else:
        text = json.dumps(rows) if kind == "json" else "".join(json.dumps(row) + "\n" for row in rows)
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., tuple[list[Pair], ReadReport]]:
    def reader(*rows: dict[str, Any], name: str = "data.jsonl", **options: Any) -> tuple[list[Pair], ReadReport]:
        report = ReadReport()
        return load_pairs(write(tmp_path / name, list(rows)), report=report, **options), report

    return reader


Read = Callable[..., tuple[list[Pair], ReadReport]]


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
    ("prompt", "first", "second", "preference"),
    [
        ("prompt", "response_1", "response_2", "preference_strength"),
        ("context", "response1", "response2", "overall_preference"),
    ],
)
def test_helpsteers_preferences_are_signed(read: Read, prompt: str, first: str, second: str, preference: str) -> None:
    said = [turn("system", "s"), turn("user", "p")] if prompt == "context" else "p"
    rows = [{prompt: said, first: f"a{s}", second: f"b{s}", preference: s} for s in (-3, 1, 0)]
    pairs, report = read(*rows, name="data.parquet")
    assert report.format == "helpsteer preference"
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
    with pytest.raises(InputError, match="'other' is no format of pairs; use hh transcript, "):
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
    if isinstance(outcome, Candidate):
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
    assert describe_pairs(pairs).longer_chosen == pytest.approx(longer, abs=0.01)
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
    if isinstance(outcome, Candidate):
        assert (outcome.chosen, outcome.rejected) == (chosen, rejected)


# Ids, limits, duplicates


def test_ids_are_unique_stable_and_do_not_depend_on_the_limit(read: Read) -> None:
    rows = [{"prompt": f"p{i}", "chosen": ["a", "b"], "rejected": ["c"]} for i in range(5)]
    pairs, _ = read(*rows)
    check_pairs(pairs)
    for limit in (1, 3, 10, 99):
        assert read(*rows, limit=limit)[0] == pairs[:limit]


def test_a_limit_stops_reading_before_what_is_broken(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", [PLAIN])
    path.write_bytes(path.read_bytes() + b"{broken\n\xff\n")
    report = ReadReport()
    assert len(load_pairs(path, limit=1, report=report)) == 1
    assert report.rows == 1
    with pytest.raises(InputError, match="limit of 0"):
        load_pairs(path, limit=0)


def test_a_repeated_pair_is_kept_once_and_counted(read: Read) -> None:
    pairs, report = read(PLAIN, {**PLAIN, "chosen": "Of course."}, PLAIN, PLAIN)
    assert [pair.id for pair in pairs] == ["data:1", "data:2"]
    assert (report.rows, report.pairs, report.duplicates, report.skipped) == (4, 2, 2, [])


def test_a_report_is_filled_anew(read: Read, tmp_path: Path) -> None:
    report = ReadReport(format="old", rows=9, pairs=9, skipped=[("line 1", "old")], duplicates=9)
    load_pairs(write(tmp_path / "data.jsonl", [PLAIN]), report=report)
    assert report == ReadReport(format="trl plain", rows=1, pairs=1)
    assert report.format in NAMES


def test_skipping_lists_each_bad_row_and_keeps_the_others(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", [{"prompt": "p", "chosen": "a"}, PLAIN, {**PLAIN, "chosen": 3}])
    path.write_text(path.read_text() + "[1]\n{oops\n" + json.dumps({**PLAIN, "chosen": " \n"}))
    report = ReadReport()
    assert [pair.id for pair in load_pairs(path, on_bad_row="skip", report=report)] == ["data:2"]
    assert report.rows == 6
    assert [where for where, _ in report.skipped] == [f"line {i}" for i in (1, 3, 4, 5, 6)]
    assert [reason.split(" (")[0] for _, reason in report.skipped] == [
        "rejected is missing",
        "chosen is a number instead of a text",
        "it is not an object with named columns",
        "malformed JSON",
        "chosen is empty",
    ]


def test_one_bad_combination_does_not_take_its_row_with_it(read: Read) -> None:
    row = {"prompt": "p", "chosen": ["a"], "rejected": ["a", "", "b"]}
    pairs, report = read(row, on_bad_row="skip")
    assert [pair.id for pair in pairs] == ["data:1:0-2"]
    assert [where for where, _ in report.skipped] == ["line 1, pair 0-0", "line 1, pair 0-1"]


# What is broken


def lines(*rows: object) -> bytes:
    return "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows).encode()


two_answers = [turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "d")]
BROKEN: list[tuple[str, bytes, str, str]] = [
    # name, bytes, where, what
    ("missing_side.jsonl", lines(PLAIN, {"prompt": "p", "chosen": "a"}), "line 2", "rejected is missing"),
    ("null_side.jsonl", lines(PLAIN, "", {**PLAIN, "chosen": None}), "line 3", "chosen is null"),
    (
        "number_side.jsonl",
        lines({**PLAIN, "chosen": 1}, PLAIN),
        "line 1",
        "chosen is a number instead of a text",
    ),
    (
        "identical.jsonl",
        lines(PLAIN, {**PLAIN, "chosen": "No."}),
        "line 2",
        "chosen and rejected are identical",
    ),
    ("empty_side.jsonl", lines({**PLAIN, "rejected": "  \n"}), "line 1", "rejected is empty"),
    ("malformed.jsonl", lines(PLAIN, PLAIN, '{"prompt": "p", '), "line 3", "malformed JSON"),
    ("deep.jsonl", b"[" * 200_000, "line 1", "malformed JSON"),
    ("not_an_object.jsonl", lines(PLAIN, "[1, 2]"), "line 2", "not an object"),
    ("no_prompt.jsonl", lines({"chosen": "a", "rejected": "b"}), "line 1", "there is no prompt"),
    ("blank_prompt.jsonl", lines({**PLAIN, "prompt": " "}), "line 1", "there is no prompt"),
    ("latin1.jsonl", lines(PLAIN) + b'\n{"prompt": "caf\xe9"}', "line 2", "0xe9 is not UTF-8"),
    ("utf16.jsonl", lines(PLAIN).decode().encode("utf-16"), "line 1", "is not UTF-8"),
    ("surrogate.jsonl", lines(PLAIN, {**PLAIN, "chosen": "\ud83d"}), "line 2", "half of a surrogate pair"),
    (
        "human_last.jsonl",
        lines(HH, {"chosen": HH["chosen"] + "\n\nHuman: thanks", "rejected": HH["rejected"]}),
        "line 2",
        "chosen does not end with an assistant turn",
    ),
    (
        "two_messages.jsonl",
        lines({"prompt": [turn("user", "p")], "chosen": two_answers[1:], "rejected": two_answers[1:2]}),
        "line 1",
        "chosen is not one assistant message",
    ),
    (
        "parts_early.jsonl",
        lines({"chosen": two_answers, "rejected": [turn("user", "x"), *two_answers[1:]]}),
        "line 1",
        "do not differ in their last assistant message alone",
    ),
    (
        "ends_with_assistant.jsonl",
        lines({**PLAIN, "prompt": two_answers}),
        "line 1",
        "the prompt does not end with a user turn",
    ),
    (
        "no_content.jsonl",
        lines({"prompt": "p", "chosen": [{"role": "assistant"}], "rejected": [turn("assistant", "b")]}),
        "line 1",
        "a message of chosen lacks a role or a content",
    ),
    (
        "empty_list.jsonl",
        lines(
            {"prompt": "p", "chosen": ["a"], "rejected": ["b"]},
            {"prompt": "p", "chosen": ["a"], "rejected": []},
        ),
        "line 2",
        "rejected is an empty list",
    ),
    (
        "label.json",
        json.dumps([{"input": "p", "output_1": "a", "output_2": "b", "label": 3}]).encode(),
        "row 1",
        "label is 3 instead of 1 or 2",
    ),
    (
        "preference.jsonl",
        lines({"prompt": "p", "response_1": "a", "response_2": "b", "preference_strength": "left"}),
        "line 1",
        "preference_strength is no finite number",
    ),
    (
        "score.jsonl",
        lines(*({"prompt": "p", "response": r, "score": s} for r, s in [("a", 1), ("b", "high")])),
        "line 2",
        "score is no finite number",
    ),
    (
        "unknown.jsonl",
        lines({"question": "p", "answer": "a"}),
        "line 1",
        r"its columns \(question, answer\) are of no known format",
    ),
    ("malformed.json", b'[\n{"prompt": "p",\n}]', "line 3", "malformed JSON"),
    ("latin1.csv", b"prompt,chosen,rejected\np,a,b\np,caf\xe9,b\n", "line 3", "0xe9 is not UTF-8"),
    ("fields.csv", b"prompt,chosen,rejected\np,a,b\np,a\n", "row 2", "2 fields where the header has 3"),
    ("quotes.csv", b'prompt,chosen,rejected\np,a,b\np,"a,b\n', "row 2", "malformed quoting"),
    ("twice.csv", b"prompt,chosen,chosen\np,a,b\n", "line 1", "names a column twice"),
    ("empty_cell.tsv", b"prompt\tchosen\trejected\np\ta\tb\np\t\tb\n", "row 2", "chosen is empty"),
]


@pytest.mark.parametrize(("name", "raw", "where", "what"), BROKEN, ids=[case[0] for case in BROKEN])
def test_a_broken_file_is_one_sentence_with_its_place_and_the_mend(
    tmp_path: Path, name: str, raw: bytes, where: str, what: str
) -> None:
    path = tmp_path / name
    path.write_bytes(raw)
    with pytest.raises(InputError, match=what) as raised:
        load_pairs(path)
    sentence = str(raised.value)
    assert sentence.startswith(f"{path} {where}: ")
    assert "\n" not in sentence
    assert sentence.count(";") == 1
    assert sentence.endswith(".")


def test_a_null_in_parquet_names_its_row(read: Read) -> None:
    with pytest.raises(InputError, match=r"data\.parquet row 2: rejected is null"):
        read(PLAIN, {**PLAIN, "rejected": None}, name="data.parquet")


NOT_A_LIST = "holds no list of rows"


@pytest.mark.parametrize(
    ("name", "raw", "what"),
    [
        ("empty.jsonl", b"", "is empty"),
        ("blank.jsonl", b"\xef\xbb\xbf\n\n", "is empty"),
        ("empty.jsonl.gz", gzip.compress(b""), "is empty"),
        ("empty.json", b"", "is empty"),
        ("nothing.json", b"[]", "is empty"),
        ("empty.csv", b"", "is empty"),
        ("header.csv", b"prompt,chosen,rejected\n", "is empty"),
        ("object.json", b'{"prompt": "p"}', NOT_A_LIST),
        ("lines.json", lines(PLAIN, PLAIN), r"name it \.jsonl"),
        ("cut.jsonl.gz", gzip.compress(lines(PLAIN) * 50)[:40], "is no whole gzip file"),
        ("plain.jsonl.gz", lines(PLAIN), "is no whole gzip file"),
        ("text.parquet", b"PAR1 or not", "no whole Parquet file"),
        ("empty.parquet", b"", "no whole Parquet file"),
        ("notes.txt", b"hello", "has no ending that tells its format"),
    ],
)
def test_a_file_that_cannot_be_read_at_all_is_named(tmp_path: Path, name: str, raw: bytes, what: str) -> None:
    path = tmp_path / name
    path.write_bytes(raw)
    with pytest.raises(InputError, match=what) as raised:
        load_pairs(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_bytes_that_are_not_utf8_raise_even_where_bad_rows_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(lines(PLAIN) + b"\n\xff\n")
    with pytest.raises(InputError, match="line 2: the byte 0xff is not UTF-8"):
        load_pairs(path, on_bad_row="skip")


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing\.jsonl does not exist"):
        load_pairs(tmp_path / "missing.jsonl")
    with pytest.raises(InputError, match="no/such/place does not exist"):
        load_pairs("no/such/place")
    with pytest.raises(InputError, match="is a folder"):
        load_pairs(tmp_path)


def test_if_no_pair_is_left_the_first_reason_is_told(read: Read) -> None:
    with pytest.raises(InputError, match=r"no usable pair: 2 were left out, the first at line 1 \(chosen is empty"):
        read({**PLAIN, "chosen": ""}, {**PLAIN, "rejected": None}, on_bad_row="skip")
    rows = [{"prompt": "p", "response": text, "score": 2} for text in ("a", "b")]
    with pytest.raises(InputError, match="no prompt has two responses with different scores"):
        read(*rows)
    with pytest.raises(InputError, match="on_bad_row is 'ignore'"):
        read(PLAIN, on_bad_row="ignore")


# The hub and the demo


def test_without_the_hubs_package_the_mend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"someone/pairs is no file here.*pip install"):
        load_pairs("someone/pairs")


def test_a_hub_dataset_is_read_like_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    hub = ModuleType("datasets")

    def load_dataset(name: str, *, split: str, streaming: bool) -> list[dict[str, Any]]:
        asked.append((name, split, streaming))
        return [PLAIN, {**PLAIN, "prompt": "Is ice?"}]

    monkeypatch.setattr(hub, "load_dataset", load_dataset, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert [pair.id for pair in load_pairs("someone/pairs", split="test")] == ["pairs-test:1", "pairs-test:2"]
    assert [pair.id for pair in load_pairs("someone/pairs", limit=1)] == ["pairs-train:1"]
    assert asked == [("someone/pairs", "test", False), ("someone/pairs", "train", True)]


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

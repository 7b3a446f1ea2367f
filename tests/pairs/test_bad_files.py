"""Facts about ids, limits and duplicates, and every way in which a file can be broken."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rmscope.errors import InputError
from rmscope.pairs.formats import NAMES
from rmscope.pairs.pair import check_pairs
from rmscope.pairs.readers import ReadReport, load_pairs
from tests.pairs.files import HH, PLAIN, Read, turn, write

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
        "ends_with_system.jsonl",
        lines({**PLAIN, "prompt": [*two_answers[:1], turn("system", "s")]}),
        "line 1",
        "the prompt ends with a system turn instead of a user turn",
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
        "preference_strength is not a finite number",
    ),
    (
        "score.jsonl",
        lines(*({"prompt": "p", "response": r, "score": s} for r, s in [("a", 1), ("b", "high")])),
        "line 2",
        "score is not a finite number",
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


NOT_A_LIST = "has no list of rows"


@pytest.mark.parametrize(
    ("name", "raw", "what"),
    [
        ("empty.jsonl", b"", "is empty"),
        ("blank.jsonl", b"\xef\xbb\xbf\n\n", "is empty"),
        ("empty.jsonl.gz", gzip.compress(b"", mtime=0), "is empty"),
        ("empty.json", b"", "is empty"),
        ("nothing.json", b"[]", "is empty"),
        ("empty.csv", b"", "is empty"),
        ("header.csv", b"prompt,chosen,rejected\n", "is empty"),
        ("object.json", b'{"prompt": "p"}', NOT_A_LIST),
        ("lines.json", lines(PLAIN, PLAIN), r"name it \.jsonl"),
        ("cut.jsonl.gz", gzip.compress(lines(PLAIN) * 50, mtime=0)[:40], "is not a whole gzip file"),
        ("plain.jsonl.gz", lines(PLAIN), "is not a whole gzip file"),
        ("text.parquet", b"PAR1 or not", "not a whole Parquet file"),
        ("empty.parquet", b"", "not a whole Parquet file"),
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
    with pytest.raises(InputError, match="is a folder without a file of rows"):
        load_pairs(tmp_path)


def test_if_no_pair_is_left_the_first_reason_is_told(read: Read) -> None:
    with pytest.raises(InputError, match=r"no usable pair: 2 were left out, the first at line 1 \(chosen is empty"):
        read({**PLAIN, "chosen": ""}, {**PLAIN, "rejected": None}, on_bad_row="skip")
    rows = [{"prompt": "p", "response": text, "score": 2} for text in ("a", "b")]
    with pytest.raises(InputError, match=r"the first at line 1 \(all responses of its prompt have the same score\)"):
        read(*rows)
    with pytest.raises(InputError, match="on_bad_row is 'ignore'"):
        read(PLAIN, on_bad_row="ignore")


def test_what_is_no_file_is_told_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(InputError, match=r"pipe\.jsonl is a pipe or a device"):
        load_pairs(tmp_path / "pipe.jsonl")
    for name in ("a" * 5000 + ".jsonl", "~no_such_user_here/x.jsonl"):
        with pytest.raises(InputError, match="is no path that can be opened") as raised:
            load_pairs(name)
        assert len(str(raised.value)) < 200
    for name in ("", "  "):
        with pytest.raises(InputError, match="A name is empty where a file, a folder or a hub id is asked for"):
            load_pairs(name)
    with pytest.raises(InputError, match="demo:nosuch is not one of the demo's data; use demo:planted or demo:plain"):
        load_pairs("demo:nosuch")


def test_a_field_that_is_nested_deep_does_no_harm(tmp_path: Path) -> None:
    """Where JSON itself gives up, the line is named."""
    path, row = tmp_path / "data.jsonl", json.dumps(PLAIN)
    path.write_text(f'{row[:-1]}, "x": {"[" * 900}{"]" * 900}}}\n')
    assert load_pairs(path)[0].chosen == "Yes."
    path.write_text(f'{row}\n{row[:-1]}, "x": {"[" * 9000}{"]" * 9000}}}\n')
    with pytest.raises(InputError, match=r"line 2: malformed JSON \(nested too deep\)"):
        load_pairs(path)


def test_a_date_out_of_range_is_not_read_where_no_pair_needs_it(tmp_path: Path) -> None:
    far = pa.array([2**62], pa.timestamp("us"))
    texts = {name: pa.array([text]) for name, text in PLAIN.items()}
    nested = pa.StructArray.from_arrays([far, pa.array(["x"])], names=["at", "by"])
    pq.write_table(pa.table({**texts, "at": far, "log": nested}), tmp_path / "extra.parquet")
    assert load_pairs(tmp_path / "extra.parquet")[0].chosen == "Yes."
    pq.write_table(pa.table({**texts, "chosen": far}), tmp_path / "side.parquet")
    with pytest.raises(InputError, match="row 1: chosen is a date instead of a text"):
        load_pairs(tmp_path / "side.parquet")


def test_a_dot_in_the_name_of_a_column_is_no_nesting(tmp_path: Path) -> None:
    """Parquet names the inner columns of an object with dots, too."""
    texts = {name: pa.array([text]) for name, text in PLAIN.items()}
    now = pa.array([0], pa.timestamp("us"))
    for dotted in ({"my.prompt": texts["prompt"]}, {"my": now, "my.prompt": texts["prompt"]}):
        table = {**dotted, "chosen": texts["chosen"], "rejected": texts["rejected"]}
        pq.write_table(pa.table(table), tmp_path / "dotted.parquet")
        (pair,) = load_pairs(tmp_path / "dotted.parquet", columns={"prompt": "my.prompt"})
        assert pair.first_human_turn() == PLAIN["prompt"]
    pq.write_table(pa.table({**texts, "prompt.at": now}), tmp_path / "beside.parquet")
    assert load_pairs(tmp_path / "beside.parquet")[0].first_human_turn() == PLAIN["prompt"]

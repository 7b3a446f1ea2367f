"""Whatever a file of pairs holds, reading it gives pairs or one sentence."""

from __future__ import annotations

import gzip
import io
import json
import warnings
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rmscope.errors import InputError
from rmscope.pairs.choices import CHOICES
from rmscope.pairs.formats import META_COLUMNS, NAMES
from rmscope.pairs.pair import check_pairs
from rmscope.pairs.rankings import RANKINGS, SCORES
from rmscope.pairs.readers import load_pairs
from rmscope.pairs.sides import DIALOGUES, QUESTIONS, SIDE_SCORES
from rmscope.pairs.values import SYSTEM_COLUMNS
from tests.pairs.sets import SETS, DataSet

few = settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
PUBLISHED = [[json.loads(line) for line in s.path.read_text().splitlines()] for s in SETS if s.file.endswith(".jsonl")]
COLUMNS = sorted(
    {name for columns in (*(c.columns for c in CHOICES.values()), *(c for c, _ in RANKINGS.values())) for name in columns}
)
COLUMNS += [
    "chosen",
    "rejected",
    "response",
    *SCORES,
    *QUESTIONS,
    *DIALOGUES,
    *(name for names in SIDE_SCORES for name in names),
]
COLUMNS += [*SYSTEM_COLUMNS, *META_COLUMNS, "history", "turn", "extra", "", "a.b", "a\nb", "[/bold]"]
TEXTS = st.sampled_from(
    [
        "", " ", "a", "b", "Yes.", "\n\nHuman: a\n\nAssistant:", "\n\nHuman: a\n\nAssistant: b", "\n\nAssistant: c", "A>B",
        "model_a", "tie", "1", "-1.5", "nan", "1e999", "[]", "{}", '["a"]', "[{'role': 'user', 'content': 'a'}]", "[{'role'",
        "a\r\nb", "\ud83d", "<extra_id_1>", "a\n<extra_id_1>Assistant\nb\n<extra_id_1>User\nc",
        '{"name": "f", "arguments": {}}',
    ]
)  # fmt: skip
NUMBERS = st.sampled_from([0, 1, 2, -1, 1.0, 0.5, float("nan"), float("inf"), 10**400, True, False])
ROLES = st.sampled_from(["user", "assistant", "system", "tool", "gpt", "human", "function_call", "", None, 3])
PARTS = st.lists(st.fixed_dictionaries({"type": st.sampled_from(["text", "image", None]), "text": TEXTS}), max_size=2)
CALLS = st.recursive(
    TEXTS | st.none(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["name", "function", "arguments"]), inner),
    max_leaves=4,
)
MESSAGES = st.lists(
    st.fixed_dictionaries({}, optional={"role": ROLES, "content": TEXTS | PARTS | st.none(), "from": ROLES, "value": TEXTS})
    | st.fixed_dictionaries({"role": ROLES, "content": TEXTS | st.none(), "tool_calls": CALLS}),
    max_size=4,
)
ENTRIES = st.lists(
    st.dictionaries(
        st.sampled_from(["response", "answer", "text", "overall_score", "rank", "model", "post", "full_text", "score"]),
        TEXTS | NUMBERS | st.none(),
    ),
    max_size=3,
)
VALUES = TEXTS | NUMBERS | MESSAGES | ENTRIES | st.none() | st.lists(TEXTS | NUMBERS, max_size=3) | CALLS
"""What the columns of published data hold, and what they should not."""


@st.composite
def rows(draw: st.DrawFn) -> list[dict[str, Any]]:
    """The rows of a published dataset, in which some values are others, and some are missing."""
    changed = [dict(row) for row in draw(st.sampled_from(PUBLISHED))]
    for row in changed:
        names = st.sampled_from([*row, *row, *COLUMNS])
        row.update(draw(st.dictionaries(names, VALUES, max_size=2)))
        row.pop(draw(st.none() | names), None)
    return changed


def read(path: Path, **options: Any) -> None:
    """Reads a file. Whatever is no pair must be one sentence; every pair must be one that a model can be asked about."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            pairs = load_pairs(path, **options)
    except InputError as error:
        sentence = str(error)
        assert sentence.endswith(".")
        assert "\n" not in sentence
        assert len(sentence) < 2000
        return
    check_pairs(pairs)
    for pair in pairs:
        assert pair.prompt
        assert pair.prompt[-1]["role"] in ("user", "tool")
        assert pair.chosen.strip() != ""
        assert pair.rejected.strip() != ""
        assert pair.chosen != pair.rejected
        json.dumps(pair.prompt, ensure_ascii=False).encode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@few
@given(rows(), st.sampled_from(["error", "skip"]), st.sampled_from([None, *NAMES]))
def test_any_rows_are_pairs_or_a_sentence(
    folder: Path, rows: list[dict[str, Any]], on_bad_row: str, form: str | None
) -> None:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read(path, on_bad_row=on_bad_row, form=form)


@few
@given(
    rows(),
    st.dictionaries(st.sampled_from(["prompt", "chosen", "rejected", "response", "score", "system"]), st.integers(0, 9)),
)
def test_any_mapping_of_columns_is_pairs_or_a_sentence(
    folder: Path, rows: list[dict[str, Any]], places: dict[str, int]
) -> None:
    names = list(rows[0])
    path = folder / "mapped.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read(path, columns={name: names[place % len(names)] for name, place in places.items()})


@few
@given(rows())
def test_any_rows_of_csv_are_pairs_or_a_sentence(folder: Path, rows: list[dict[str, Any]]) -> None:
    path = folder / "rows.csv"
    cells = [['"{}"'.format(str(row.get(name, "")).replace('"', '""')) for name in rows[0]] for row in rows]
    header = ",".join(f'"{name}"' for name in rows[0])
    path.write_bytes("\n".join([header, *map(",".join, cells)]).encode("utf-8", "replace"))
    read(path, on_bad_row="skip")


def arrow_column(values: list[Any]) -> pa.Array:
    """The values as a column of Parquet; as texts where it has no type for them."""
    try:
        column = pa.array(values)
        pq.write_table(pa.table({"column": column}), io.BytesIO())
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        return pa.array([str(value).encode("utf-8", "replace").decode() for value in values])
    return column


@few
@given(rows())
def test_any_rows_of_parquet_are_pairs_or_a_sentence(folder: Path, rows: list[dict[str, Any]]) -> None:
    path = folder / "rows.parquet"
    columns = {name: arrow_column([row.get(name) for row in rows]) for name in rows[0]}
    pq.write_table(pa.table(columns), path)
    read(path, on_bad_row="skip")


@settings(few, max_examples=150)
@given(
    st.sampled_from(SETS),
    st.sampled_from(["jsonl", "json", "csv", "tsv", "jsonl.gz", "parquet"]),
    st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=3), st.integers(0, 3)), min_size=1, max_size=4),
)
def test_any_damage_to_a_file_is_pairs_or_a_sentence(
    folder: Path, data_set: DataSet, ending: str, damage: list[tuple[float, bytes, int]]
) -> None:
    """Bytes are put in, taken out or replaced."""
    raw = data_set.path.read_bytes()
    if ending == "jsonl.gz":
        raw = gzip.compress(raw, mtime=0)
    if ending == "parquet":
        pq.write_table(
            pa.table({"prompt": ["p", "q"], "chosen": ["a", "b"], "rejected": ["c", "d"]}), folder / "whole.parquet"
        )
        raw = (folder / "whole.parquet").read_bytes()
    for place, put_in, taken_out in damage:
        at = int(place * len(raw))
        raw = raw[:at] + put_in + raw[at + taken_out :]
    path = folder / f"damaged.{ending}"
    path.write_bytes(raw)
    read(path, on_bad_row="skip")

"""Concepts, features, labels and names as CSV and Parquet.

Parquet holds the values as they are. In CSV a list is JSON, and a text that a spreadsheet would take for a formula has an
apostrophe before it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from rmscope.io import write_table
from rmscope.run.run import Run
from rmscope.studies.export.sources import features_at
from rmscope.studies.label.names import NamedConcept

COLUMNS: dict[str, dict[str, str]] = yaml.safe_load(files(__package__).joinpath("columns.yaml").read_text("utf-8"))
"""``tables``: what each table is; ``shared``: columns of several tables; and by table its own columns."""
PAGE = "columns.md"
FORMULA = r"^([\s\u200e\u200f\u202a-\u202e\u2066-\u2069]*[=+\-@＝＋－＠]|[\t\r])"
"""What spreadsheets take for the start of a formula, also behind white space and marks of direction."""
LABELS: dict[str, Any] = {
    "concept": pl.Int32, "site": pl.String, "features": pl.List(pl.Int32), "name": pl.String, "star": pl.Boolean,
    "note": pl.String, "changed": pl.String,
}  # fmt: skip
SCORES = ("detection", "fuzzing")
NAMES: dict[str, Any] = {
    "concept": pl.Int32, "name": pl.String, "given_by": pl.String, "unsure": pl.Boolean, "llm": pl.String,
    **{f"{score}{end}": pl.Float64 for score in SCORES for end in ("", "_low", "_high")}, "moves_as_said": pl.Boolean,
}  # fmt: skip


def export_tables(run: Run, concepts: Sequence[NamedConcept], folder: Path) -> None:
    """Writes each table as ``NAME.parquet`` and ``NAME.csv``, and what their columns mean as ``columns.md``."""
    folder.mkdir()
    made = tables(run, concepts)
    for name, table in made.items():
        write_table(folder / f"{name}.parquet", table)
        as_csv(table).write_csv(folder / f"{name}.csv")
    (folder / PAGE).write_text(columns_page({name: table.columns for name, table in made.items()}), "utf-8")


def tables(run: Run, concepts: Sequence[NamedConcept]) -> dict[str, pl.DataFrame]:
    """The tables by name; ``columns.yaml`` tells their columns."""
    titles = {
        "concept": [c.row["concept"] for c in concepts],
        "title": [c.title.text for c in concepts],
        "title_by": [c.title.giver for c in concepts],
    }
    titled = pl.DataFrame(titles, schema={"concept": pl.Int32, "title": pl.String, "title_by": pl.String})
    return {
        "concepts": titled.join(run.concepts, on="concept", maintain_order="left"),
        "features": pl.concat([_features(run, concepts, site) for site in run.sites]),
        "labels": pl.DataFrame([_label(c) for c in concepts if c.is_labelled], schema=LABELS, orient="row"),
        "names": pl.DataFrame([row for c in concepts for row in _names(c)], schema=NAMES, orient="row"),
    }


def _features(run: Run, concepts: Sequence[NamedConcept], site: str) -> pl.DataFrame:
    """The frozen features of a site, with the concepts that hold them."""
    holders = [(j, c.row["concept"]) for c in concepts for j in features_at(c.row, site)]
    held = pl.DataFrame(holders, schema={"feature": pl.Int32, "concepts": pl.Int32}, orient="row")
    table = run.features(site).select(pl.lit(site).alias("site"), pl.all())
    return table.join(held.group_by("feature").agg(pl.col("concepts").sort()), "feature", "left", maintain_order="left")


def _label(concept: NamedConcept) -> tuple[Any, ...]:
    row, label = concept.row, concept.label
    return row["concept"], row["site"], row["features"], label.name, label.star, label.note, label.changed


def _names(concept: NamedConcept) -> list[tuple[Any, ...]]:
    rows = []
    for name in concept.names:
        scores: list[float | None] = [None for _ in SCORES for _ in range(3)]
        if name.record is not None:
            figures = (name.record.detection, name.record.fuzzing)
            scores = [value for figure in figures for value in (figure.value, figure.low, figure.high)]
        llm, moves = (name.record.llm, name.record.moves_as_said) if name.record is not None else (None, None)
        rows.append((concept.row["concept"], name.text, name.giver, name.is_unsure, llm, *scores, moves))
    return rows


def as_csv(table: pl.DataFrame) -> pl.DataFrame:
    """The table with lists as JSON, and texts that no spreadsheet runs."""
    nested = [name for name, kind in table.schema.items() if kind.is_nested()]
    table = table.with_columns(
        pl.Series(name, [None if v is None else json.dumps(v) for v in table[name].to_list()], dtype=pl.String)
        for name in nested
    )
    texts = [name for name, kind in table.schema.items() if kind == pl.String]
    return table.with_columns(_harmless(pl.col(name)).alias(name) for name in texts)


def _harmless(text: pl.Expr) -> pl.Expr:
    """The text with an apostrophe before what could be a formula, and without NUL."""
    text = text.str.replace_all("\0", "\ufffd", literal=True)
    return pl.when(text.str.contains(FORMULA)).then(pl.concat_str(pl.lit("'"), text)).otherwise(text)


def columns_page(columns: Mapping[str, Sequence[str]]) -> str:
    """What the columns of some tables mean, as Markdown."""
    parts = ["# Exported tables\n\nEffects are in units of reward. An empty cell was not measured."]
    for name, listed in columns.items():
        rows = [f"| `{column}` | {COLUMNS[name].get(column) or COLUMNS['shared'][column]} |" for column in listed]
        parts.append("\n".join([f"## {name}\n\n{COLUMNS['tables'][name]}\n", "| column | what it is |", "|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"

"""Pair files in any format, for the tests of readers."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rmscope.pairs.pair import Message, Pair
from rmscope.pairs.readers import ReadReport

PLAIN = {"prompt": "Is water wet?", "chosen": "Yes.", "rejected": "No."}
HH = {
    "chosen": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:  Because.\n\nSo it is.",
    "rejected": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant: No idea. ",
}


def turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows in the format that the name's ending asks for."""
    path.parent.mkdir(parents=True, exist_ok=True)
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


Read = Callable[..., tuple[list[Pair], ReadReport]]

"""The tables of docs/audit.md: audits of one plants file and one text side by side, and pooled.

usage: audit_page.py OUT OUT ...

OUT: folders of ``rmscope audit``, a seed each. A cell of the first table: the cue's ATE in SD(Δr), then for a hit the rank
of its best feature and the mediated share of its group (of its single feature where none hits); for a learned cue that was
missed, why; for a clean null, what matched it. The second: a row an audit, and all of them pooled.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from explained_page import figure, table

from rmscope.evidence.recall import KS, mediated, nulls_reported, recall, share, sign_accuracy

Audit = dict[str, Any]


def cell(row: dict[str, Any]) -> str:
    ate = f"{row['ate_sd']:+.2f}".replace("-", "−")
    if row["found"]:
        share_ = (row["group"] or row)["mediated"]["value"]
        return f"{ate}, rank {row['rank']}, {share_:.2f}"
    if row["learned"]:
        return f"{ate}, **{row['why']}**"
    if row["null"]:
        n = len(row["matched_by"])
        return f"{ate}, clean null" + (f", **{n} features match**" if n else "")
    return f"{ate}, {'not learned' if row['dose'] != 0.5 else 'no clean null'}"


def cues(audits: Sequence[Audit]) -> str:
    rows = []
    for plants in zip(*(a["plants"] for a in audits), strict=True):
        found = sum(bool(p["learned"] and p["found"]) for p in plants)
        learned = sum(bool(p["learned"]) for p in plants)
        sign = "null" if plants[0]["dose"] == 0.5 else "−+"[plants[0]["sign"] > 0]
        rows.append(
            [plants[0]["name"], plants[0]["kind"], sign, f"{found} of {learned}" if learned else "", *map(cell, plants)]
        )
    return table(["cue", "kind", "sign", "found", *(f"seed {a['audited']['seed']}" for a in audits)], rows)


def counted(f: dict[str, Any]) -> str:
    """5 of 7 [.29, .96]."""
    return f"{f['hits']} of {f['n']}" + (f" [{f['low']:.2f}, {f['high']:.2f}]" if f["n"] else "")


def figures(audits: Sequence[Audit]) -> str:
    named = [*(f"recall_at_{k}" for k in KS), "sign_accuracy", "null_reported", "false_discoveries", "stability"]
    head = ["recall@20", "recall@50", "signs", "nulls reported", "false discoveries", "found by other SAEs"]
    rows = [
        [a["audited"]["seed"], *(counted(a[name]) for name in named), figure(a["mediated_share"]), round(a["seconds"] / 60)]
        for a in audits
    ]
    if len(audits) > 1:
        plants = [p for a in audits for p in a["plants"]]
        pooled = [recall(plants, k) for k in KS] + [sign_accuracy(plants), nulls_reported(plants)]
        pooled += [share(*(sum(a[name][n] for a in audits) for n in ("hits", "n"))) for name in named[len(pooled) :]]
        rows.append(["**all**", *map(counted, pooled), figure(mediated(plants)), ""])
    return table(["seed", *head, "mediated, lexical", "minutes"], rows)


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    audits = [json.loads((Path(out) / "audit.json").read_text("utf-8")) for out in sys.argv[1:]]
    print(cues(audits), figures(audits), sep="\n\n")


if __name__ == "__main__":
    main()

"""The tables of docs/results/audit.md and its appendix: audits of one plants file and one text, side by side and pooled.

usage: audit_page.py OUT OUT ... [--figure FILE.svg --beside OUT OUT ...]

OUT: folders of ``rmscope audit``, a seed each. A cell of the first table: the cue's ATE in SD(Δr), then for a hit the rank
of its last feature and its mediated share, and beside a single feature the share of a group; for a learned cue that was
missed, why, and F1 and share of what was tried; for a null, how many reported features match it. The second: a row an audit,
and all of them pooled. The figure: a row a cue, a dot an audit, those ``--beside`` in another colour.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from explained_page import figure, table
from markupsafe import Markup

from rmscope.io import write_text
from rmscope.planted.recall_metrics import KS, mediated, nulls_reported, recall, share, sign_accuracy
from rmscope.report.figures import HEIGHT, WIDTH, Frame, _text, as_file

Audit = dict[str, Any]


def cell(row: dict[str, Any]) -> str:
    ate = f"{row['ate_sd']:+.2f}".replace("-", "−")
    if row["found"]:
        group = f", group {row['group']['mediated']['value']:.2f}" if row["hit"] == "single" and row["group"] else ""
        return f"{ate}, rank {row['rank']}, {row['mediated']['value']:.2f}{group}"
    if row["learned"]:
        tried = f" (F1 {row['f1']:.2f}, {max(0.0, row['mediated']['value']):.2f})" if row["mediated"] else ""
        return f"{ate}, **{row['why']}**{tried}"
    n = len(row["matched_by"])
    matched = f", **{n} {'features match' if n > 1 else 'feature matches'}**" if n else ""
    if row["null"]:
        return f"{ate}, clean null{matched}"
    return f"{ate}, {'not learned' if row['dose'] != 0.5 else 'no clean null'}{matched}"


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
    rows = [[a["audited"]["seed"], *(counted(a[name]) for name in named), figure(a["mediated_share"])] for a in audits]
    if len(audits) > 1:
        plants = [p for a in audits for p in a["plants"]]
        pooled = [recall(plants, k) for k in KS] + [sign_accuracy(plants), nulls_reported(plants)]
        pooled += [share(*(sum(a[name][n] for a in audits) for n in ("hits", "n"))) for name in named[len(pooled) :]]
        rows.append(["**all**", *map(counted, pooled), figure(mediated(plants))])
    return table(["seed", *head, "mediated, lexical"], rows)


DOTS = (("the project's text", "#1d5fa6", 0.17), ("hh-rlhf text", "#a94a06", -0.17))
"""Name, colour and place above the row's line of the audits and of those beside them."""
NAMES = 20
"""Room for the cues' names beside what a chart leaves for the numbers of an axis."""
TITLE = "share of the cue's effect that the features carry"


def dots(audits: Sequence[Audit], beside: Sequence[Audit]) -> Markup:
    """A row a cue, a dot an audit in which it was learned: filled where features were found, hollow where none were."""
    names = list(dict.fromkeys(p["name"] for a in [*audits, *beside] for p in a["plants"] if p["learned"]))
    frame = Frame((0.0, 1.25), (-0.6, len(names) + 0.5))
    place = {name: len(names) - 1 - i for i, name in enumerate(names)}
    parts = [frame.y_axis([(y, name) for name, y in place.items()], "")]
    for i, (part, (title, colour, shift)) in enumerate(zip((audits, beside), DOTS, strict=True)):
        for row in (p for a in part for p in a["plants"] if p["learned"]):
            value = ((row["group"] or row)["mediated"] or {"value": 0.0})["value"]
            x, y = frame.x(min(1.25, max(0.0, value))), frame.y(place[row["name"]] + shift)
            parts.append(_dot(x, y, colour, row["found"]))
        x, y = frame.x(0.02 + 0.43 * i), frame.y(len(names) + 0.05)
        parts += [_dot(x, y, colour, True), _text(x + 9, y + 4, title, "start")]
    x, y = frame.x(0.83), frame.y(len(names) + 0.05)
    parts += [_dot(x, y, DOTS[0][1], False), _dot(x + 11, y, DOTS[1][1], False), _text(x + 20, y + 4, "missed", "start")]
    marks = [(v, f"{v:g}") for v in (0.0, 0.25, 0.5, 0.75, 1.0)]
    head = Markup(
        f'<svg viewBox="{-NAMES} 0 {NAMES + WIDTH} {HEIGHT}" role="img" aria-label="Planted cues, found and missed">'
    )
    return head + Markup("").join([*parts, frame.x_axis(marks, TITLE)]) + Markup("</svg>")


def _dot(x: float, y: float, colour: str, filled: bool) -> Markup:
    fill = colour if filled else "#fdfdfc"
    return Markup('<circle cx="{:g}" cy="{:g}" r="4" fill="{}" stroke="{}" stroke-width="1.5"/>').format(x, y, fill, colour)


def read(folders: Sequence[str]) -> list[Audit]:
    return [json.loads((Path(out) / "audit.json").read_text("utf-8")) for out in folders]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("outs", nargs="+", metavar="OUT")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--beside", nargs="+", default=[], metavar="OUT")
    args = parser.parse_args()
    audits = read(args.outs)
    print(cues(audits), figures(audits), sep="\n\n")
    if args.figure:
        write_text(args.figure, as_file(dots(audits, read(args.beside))))


if __name__ == "__main__":
    main()

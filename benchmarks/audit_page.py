"""The tables of docs/results/audit.md and its appendix: audits of one plants file and one text, side by side and pooled.

usage: audit_page.py OUT OUT ... [--figure FILE.svg --beside OUT OUT ...]

OUT: folders of ``rmscope audit``, one seed each. A cell of the first table has the cue's ATE in SD(Δr), and then: for a hit
the rank of its last feature and its mediated share, and the share of a group beside a single feature; for a learned cue that
was missed the reason, and F1 and share of the best attempt; for a null the number of reported features that match it. The
second table has one row per audit, and one for all of them pooled. The figure has one row per cue and one dot per audit;
those ``--beside`` have another colour.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from explained_page import figure, table
from markupsafe import Markup

from rmscope.io import write_text
from rmscope.planted.results import KS, CueResult, mean_mediated_share, recall, reported_nulls, sign_accuracy
from rmscope.report.figures import HEIGHT, WIDTH, Frame, _text, as_file
from rmscope.statistics import Figure, share
from rmscope.studies.audit.result import AuditResult

SHARES = ("recall_at_20", "recall_at_50", "sign_accuracy", "null_reported", "false_discoveries", "stability")


def mediated(row: CueResult) -> float:
    """The mediated share of a match or of the best attempt; 0 where nothing was tried."""
    return (row.mediated and row.mediated.value) or 0.0


def carried(row: CueResult) -> float:
    """The same of the group, where there is one."""
    return (row.group.mediated.value or 0.0) if row.group else mediated(row)


def cell(row: CueResult) -> str:
    ate = f"{row.ate_sd:+.2f}".replace("-", "−")
    if row.found:
        group = f", group {carried(row):.2f}" if row.hit == "single" and row.group else ""
        return f"{ate}, rank {row.rank}, {mediated(row):.2f}{group}"
    if row.learned:
        tried = f" (F1 {row.f1:.2f}, {max(0.0, mediated(row)):.2f})" if row.mediated else ""
        return f"{ate}, **{row.why}**{tried}"
    n = len(row.matched_by)
    matched = f", **{n} {'features match' if n > 1 else 'feature matches'}**" if n else ""
    if row.null:
        return f"{ate}, clean null{matched}"
    return f"{ate}, {'not learned' if row.dose != 0.5 else 'no clean null'}{matched}"


def cues(audits: Sequence[AuditResult]) -> str:
    rows = []
    for plants in zip(*(a.plants for a in audits), strict=True):
        found = sum(p.learned and p.found for p in plants)
        learned = sum(p.learned for p in plants)
        sign = "null" if plants[0].dose == 0.5 else "−+"[plants[0].sign > 0]
        rows.append([plants[0].name, plants[0].kind, sign, f"{found} of {learned}" if learned else "", *map(cell, plants)])
    return table(["cue", "kind", "sign", "found", *(f"seed {a.audited.seed}" for a in audits)], rows)


def hits(f: Figure) -> int:
    """How many hits a share counts."""
    return round((f.value or 0.0) * (f.n or 0))


def counted(f: Figure) -> str:
    """5 of 7 [.29, .96]."""
    return f"{hits(f)} of {f.n}" + (f" [{f.low:.2f}, {f.high:.2f}]" if f.n else "")


def pool(figures: Sequence[Figure]) -> Figure:
    """One share of all that several count."""
    return share(sum(map(hits, figures)), sum(f.n or 0 for f in figures))


def figures(audits: Sequence[AuditResult]) -> str:
    head = ["recall@20", "recall@50", "signs", "nulls reported", "false discoveries", "found by other SAEs"]
    listed = [[getattr(a, name) for name in SHARES] for a in audits]
    rows = [
        [a.audited.seed, *map(counted, shares), figure(a.mediated_share.as_dict())]
        for a, shares in zip(audits, listed, strict=True)
    ]
    if len(audits) > 1:
        plants = [p for a in audits for p in a.plants]
        pooled = [recall(plants, k) for k in KS] + [sign_accuracy(plants), reported_nulls(plants)]
        pooled += [pool([shares[i] for shares in listed]) for i in range(len(pooled), len(SHARES))]
        rows.append(["**all**", *map(counted, pooled), figure(mean_mediated_share(plants).as_dict())])
    return table(["seed", *head, "mediated, lexical"], rows)


DOTS = (("the project's text", "#1d5fa6", 0.17), ("hh-rlhf text", "#a94a06", -0.17))
"""Name, colour and place above the row's line of the audits and of those beside them."""
NAMES = 20
"""Room for the cues' names beside what a chart leaves for the numbers of an axis."""
TITLE = "share of the cue's effect that the features carry"


def dots(audits: Sequence[AuditResult], beside: Sequence[AuditResult]) -> Markup:
    """One row per cue, one dot per audit in which it was learned: filled where features were found, else hollow."""
    names = list(dict.fromkeys(p.name for a in [*audits, *beside] for p in a.plants if p.learned))
    frame = Frame((0.0, 1.25), (-0.6, len(names) + 0.5))
    place = {name: len(names) - 1 - i for i, name in enumerate(names)}
    parts = [frame.y_axis([(y, name) for name, y in place.items()], "")]
    for i, (part, (title, colour, shift)) in enumerate(zip((audits, beside), DOTS, strict=True)):
        for row in (p for a in part for p in a.plants if p.learned):
            x, y = frame.x(min(1.25, max(0.0, carried(row)))), frame.y(place[row.name] + shift)
            parts.append(_dot(x, y, colour, row.found))
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


def read(folders: Sequence[str]) -> list[AuditResult]:
    return [AuditResult.model_validate_json((Path(out) / "audit.json").read_text("utf-8")) for out in folders]


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

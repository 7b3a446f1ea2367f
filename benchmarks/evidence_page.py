"""The tables of docs/results/evidence.md: jailbreaks, experiments and patches on the zoo's PMs, from what commands wrote.

usage: evidence_page.py MENDING.json EDIT.json RUN RUN ...

RUN: run folders in which ``rmscope jailbreak`` was run, in the first also the five ready-made ``rmscope experiment``;
MENDING.json: what ``mending.py`` wrote; EDIT.json: the output of ``rmscope edit RUN --site S --features ... --check
--rm-bench FILE --json`` on a run of zoo:hh.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from explained_page import figure, table

EXPERIMENTS = ("thanks", "youre_right", "dont_know", "urls", "repetition")
CUES = ("thanks", "youre_right", "dont_know", "url")
JOINT = "all four"
PAGE = """# Evidence beyond ablation: what fools a PM, what experiments say, what a patch mends

Figures of the commands `jailbreak`, `experiment` and `edit` on the zoo's two PMs; `benchmarks/evidence_page.py` made
the page from what they wrote. Intervals are 95 %, bootstrap by prompt; a unit is SD(Δr) where it says so, else
reward.

## In short

{short}

## Jailbreaks

`rmscope jailbreak RUN --data FILE`: bad text (another prompt's answer, the answer's own words shuffled, nonsense;
each scores below the prompt's chosen answer as it is) with one list of phrases put in. The list is searched on
prompts of the run's confirm split and measured on prompts that had no part in it. *By 1 SD*: it outranks the
chosen answer by at least SD(Δr). *Features ablated*: it still outranks the chosen answer once the named features are
ablated from it, exactly.

{jailbreaks}

*features*: phrases mined where reported features fire hardest. *blind*: the same search, with as many evaluations,
over phrases from random places. *without effect*: over phrases of features whose ablation does nothing. *shuffled*:
the words of the first list in random order. *own list*: searched for each prompt by itself.

## Experiments on `zoo:planted`

`rmscope experiment NAME --run RUN`. The truth is known: these five were planted, and the verdict should be
*supported*.

{experiments}

*Taken back*: what ablating the features that carry the condition takes of its effect; *alike*: the most that matched
sets take.

## Mending `zoo:planted`

`benchmarks/mending.py`: each patch damps features that were chosen by rule on the fit split, error kept. Taken: the
share of a cue's effect that is gone, held-out prompts and wordings. *Mean difference*: the same cue's mean-difference
direction projected out, without any SAE. *Matched*: random features, as many, as often and as strong (the largest of
three sets).

{mending}

What each costs, on pairs without cues ({demo_n}) and on human pairs ({human_n}) that the PM was not trained on:

{costs}

## An edit of `zoo:hh`, and RM-Bench chat

Six reported features of {edit_site} with the flag *length* ({edit_features}), suppressed; accuracy on {bench_n}
prompts of RM-Bench chat by style of the chosen and of the rejected response.

{bench}
"""


def percent(f: Mapping[str, float] | None) -> str:
    return "–" if f is None else f"{f['value']:.0%} [{f['low']:.0%}, {f['high']:.0%}]".replace("-", "−")


def jailbreak(found: dict[str, Any]) -> str:
    head = ["text", "prompts", "tokens", "outranks", "by 1 SD", "features ablated", "gain"]
    arms = [
        [a["arm"], a["prompts"], f"{a['tokens']:.0f}", percent(a["success"]), percent(a["by_sd"]), percent(a["without"]),
         figure(a["gain"])]
        for a in found["arms"]
    ]  # fmt: skip
    parts = [table(head, arms)]
    searches = found["searches"]
    parts.append("Searched on the confirm split: " + "; ".join(_searched(name, s) for name, s in searches.items()) + ".")
    if named := found["named"]:
        rows = [
            [p["jailbreak"], p["control"], figure(p["u"]), percent(p["share"]),
             percent(p["matched"]["largest"]) if p["matched"] else "–", {True: "yes", False: "no", None: "–"}[p["clear"]]]
            for p in found["mediation"]
        ]  # fmt: skip
        parts.append(
            f"Mediated by {len(named['features'])} features at {named['site']}, frozen on the search's prompts; U is the "
            "mean gain over the control:"
        )
        columns = ["jailbreak", "over", "U", "mediated share", "largest of 16 matched controls", "clear of all"]
        parts.append(table(columns, rows))
    phrases = "; ".join(f"“{p['text']}” ({p['slot']})" for p in found["lists"].get("features", {"phrases": []})["phrases"])
    parts.append(f"The list: {phrases}.")
    return "\n\n".join(parts)


def _searched(name: str, search: dict[str, Any]) -> str:
    needed = f"90 % after {search['needed']:,}" if search["needed"] else "90 % never reached"
    return f"{name} {search['evaluations']:,} reward evaluations, {needed}"


def experiments(tried: Mapping[str, Any]) -> str:
    rows = []
    for name, found in tried.items():
        taken = _taken(found)
        held = [c for c in found["claims"] if c["says"] != "taken_back"]
        right, ablated = sum(c["verdict"] == "supported" for c in held), found["ablated"]
        rows.append([
            name, found["verdict"], f"{right} of {len(held)}", found["by_features"], percent(taken["share"]),
            f"{taken['matched_controls']:.0%}", f"{len(ablated['features'])} at {ablated['site']}",
            f"{found['seconds']:.0f}",
        ])  # fmt: skip
    return table(["file", "verdict", "claims", "by features", "taken back", "matched controls", "features", "seconds"], rows)


def _taken(found: dict[str, Any]) -> dict[str, Any]:
    """The claim on what ablation takes back."""
    return next(c for c in found["claims"] if c["says"] == "taken_back")


def largest(variants: Mapping[str, Any], part: str, within: str = "") -> Mapping[str, float]:
    """Of the matched sets under a name the one with the largest figure."""
    return max((v[part] for n, v in variants.items() if n.startswith(f"{within}matched")), key=lambda f: float(f["value"]))


def mending(found: dict[str, Any]) -> str:
    rows = []
    for cue in CUES:
        bias, edit = found[f"bias {cue}"], found[f"choice of {cue}"][0]
        what = f"{edit['operation']} {edit['value']:g}, {len(edit['features'])} features at {edit['site']}"
        shares = [bias[n]["gone"] for n in ("edit", f"{JOINT}, edit", "mean difference")]
        rows.append([
            cue, what, figure(bias["before"]["ate"]), *map(percent, shares), percent(largest(bias, "gone"))
        ])  # fmt: skip
    head = ["cue", "patch", "effect before", "taken by it", "by all four joined", "by mean difference", "by matched"]
    return table(head, rows)


def costs(found: dict[str, Any]) -> str:
    rows = []
    for cue in (*CUES, JOINT):
        demo, human = found["pairs: demo pairs without cues"], found.get("pairs: human pairs", {})
        for variant in ("edit", "mean difference"):
            name = f"{cue}, {variant}"
            cells = [figure(s[name][p], 3) if name in s else "–" for s in (demo, human) for p in ("fall", "drift")]
            rows.append([name, *cells])
    head = ["patch", "accuracy falls by", "drift / SD(Δr)", "human pairs: accuracy falls by", "drift / SD(Δr)"]
    return table(head, rows)


def bench(check: dict[str, Any]) -> str:
    rows = []
    for r in check["styles"]:
        under = r["variants"]
        like = " / ".join(f"{under[name]['accuracy']['value']:.2f}" for name in under if name.startswith("matched"))
        both = (figure(under[name]["accuracy"]) for name in ("before", "edit"))
        rows.append([r["chosen"], r["rejected"], *both, like, figure(under["edit"]["fall"])])
    return table(["chosen", "rejected", "before", "edit", "as many matched features", "the edit's fall"], rows)


def short(
    runs: Sequence[dict[str, Any]], patch: dict[str, Any], tried: Mapping[str, Any], cells: Sequence[dict[str, Any]]
) -> str:
    """What the figures say."""
    lines = []
    for found in runs:
        arms = {a["arm"]: a for a in found["arms"]}
        names = ("features", "blind", "without effect", "shuffled")
        carried = next(p for p in found["mediation"] if (p["jailbreak"], p["control"]) == ("features", "without effect"))
        plain, by_sd = ("/".join(f"{100 * arms[n][m]['value']:.0f}" for n in names) for m in ("success", "by_sd"))
        lines += [
            f"- **`{found['model']}`, {found['prompts']} prompts of {_data(found)}**: bad text outranks the chosen answer",
            f"  in {plain} % with phrases of features / blind / of features without effect / shuffled, by 1 SD(Δr) in",
            f"  {by_sd} %; with the named features ablated the first figure is {arms['features']['without']['value']:.0%};",
            f"  they carry {percent(carried['share'])} of the gain over phrases of features without effect.",
        ]
    taken = [patch[f"bias {cue}"] for cue in CUES]
    clean = patch["pairs: demo pairs without cues"]
    further = sum(clean[f"{c}, edit"]["drift"]["value"] > clean[f"{c}, mean difference"]["drift"]["value"] for c in CUES)
    shares = [_span(t[n]["gone"] for t in taken) for n in ("edit", "mean difference")]
    lines += [
        f"- **Mending**: a cue's own patch takes {shares[0]} of its effect, the mean-difference direction {shares[1]}, the",
        f"  largest of three matched sets {_span(largest(t, 'gone') for t in taken)}.",
        f"  What it costs in accuracy cannot be told from 0 on so few pairs; {further} of the {len(CUES)} patches move",
        "  rewards elsewhere further than the direction does.",
    ]
    sets = [name for name in cells[0]["variants"] if name.startswith("matched")]
    mine, *like = (f"{np.mean([abs(r['variants'][v]['fall']['value']) for r in cells]):.3f}" for v in ("edit", *sets))
    lines += [
        f"- **RM-Bench chat** under an edit of `zoo:hh`: a cell's accuracy moves by {mine} in the mean; sets of as many",
        f"  matched features move it by {', '.join(like)}.",
    ]
    half = [name for name, found in tried.items() if _taken(found)["verdict"] != "supported"]
    right = sum(found["verdict"] == "supported" for found in tried.values())
    lines.append(
        f"- **Experiments**: the verdict on the reward is as planted in {right} of {len(tried)}; ablation of the features"
    )
    lines.append(f"  that carry it does not take back half of {', '.join(half) or 'none'}.")
    return "\n".join(lines)


def _span(figures: Iterable[Mapping[str, float]]) -> str:
    values = [f["value"] for f in figures]
    return f"{min(values):.0%} to {max(values):.0%}"


def read(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "evidence" / "jailbreak.json").read_text("utf-8")))


def _data(found: dict[str, Any]) -> str:
    data = found["data"].replace(", measure split", "")
    name = f"`{data}`" if data.startswith("demo:") else Path(data).stem
    return f"{name} (seed {found['seed']})" if found["seed"] else name


def section(found: dict[str, Any]) -> str:
    fresh = "that the run kept for measuring" if found["data"].endswith("measure split") else "that the run never saw"
    return f"### `{found['model']}`: {found['prompts']} prompts of {_data(found)} {fresh}\n\n{jailbreak(found)}"


def main(mended: Path, edited: Path, *runs: Path) -> None:
    patch = json.loads(mended.read_text("utf-8"))
    edit = json.loads(next(line for line in edited.read_text("utf-8").splitlines() if line.startswith("{")))
    (first,) = edit["edits"]
    folder = runs[0] / "evidence" / "experiments"
    tried = {name: json.loads((folder / f"{name}.json").read_text("utf-8")) for name in EXPERIMENTS}
    found = [read(run) for run in runs]
    page = PAGE.format(
        short=short(found, patch, tried, edit["check"]["styles"]), jailbreaks="\n\n".join(map(section, found)),
        experiments=experiments(tried),
        mending=mending(patch), costs=costs(patch), demo_n=patch["pairs: demo pairs without cues"]["n"],
        human_n=patch.get("pairs: human pairs", {"n": 0})["n"], edit_site=first["site"],
        edit_features=", ".join(map(str, first["features"])), bench=bench(edit["check"]),
        bench_n=edit["check"]["styles"][0]["pairs"],
    )  # fmt: skip
    sys.stdout.write(page)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

"""The table of docs/howto/plan.md: three studies on one card, on eight, and on four machines of eight.

PMs are config.json files of the sizes named; nothing is loaded or run. Prints the table, and with --stages the plan of each
study on one card, stage by stage.

usage: plans.py [--stages]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import yaml
from transformers import GPTJConfig, LlamaConfig

import rmscope as rs
from rmscope.report.formatting import duration
from rmscope.run.plan.result import Plan, size

REFERENCE = Path(__file__).parents[1] / "configs" / "riggs2024.yaml"
LLAMA = {"vocab_size": 128_256, "num_key_value_heads": 8, "num_labels": 1}
PMS: dict[str, Any] = {
    "gptj": GPTJConfig(num_labels=1),
    "8b": LlamaConfig(
        **LLAMA, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32
    ),
    "70b": LlamaConfig(
        **LLAMA, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64
    ),
}  # fmt: skip
ULTRAFEEDBACK: dict[str, Any] = {"pairs": 64_000, "tokens": 430, "shared": 0.37}
"""One pair per prompt. The lengths are assumed."""
HH: dict[str, Any] = {"pairs": 160_800, "tokens": 170, "shared": 0.74, "sae": {"d_sae": 32_768}}
"""Lengths as the tokenizer of zoo:hh counts them on a part of hh-rlhf."""
STUDIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "the reference study: GPT-J 6B, hh-rlhf": ("gptj", "H100", HH),
    "8B, UltraFeedback, with its base": ("8b", "H100", {**ULTRAFEEDBACK, "base": "its-base"}),
    "the same without a base": ("8b", "H100", ULTRAFEEDBACK),
    "70B, UltraFeedback, in bfloat16": ("70b", "B200", {**ULTRAFEEDBACK, "dtype": "bfloat16"}),
}
"""By title: the PM, the card, and the settings beside the defaults (of the reference study beside its own)."""
COUNTS = ("", "8x", "4x8x")


def plans(folder: Path) -> dict[str, list[Plan]]:
    """The plans of each study on each number of cards. ``folder`` takes the config.json files."""
    found: dict[str, list[Plan]] = {}
    for title, (pm, card, given) in STUDIES.items():
        PMS[pm].save_pretrained(folder / pm)
        own = yaml.safe_load(REFERENCE.read_text("utf-8")) if pm == "gptj" else {}
        settings = {**own, **given, "model": str(folder / pm)}
        found[title] = [rs.plan(**settings, devices=f"{count}{card}") for count in COUNTS]
    return found


def table(found: dict[str, list[Plan]]) -> str:
    """The table, in Markdown."""
    heads = ("study", "card", "1", "8", "4 x 8", "on disk", "memory of a card", "on 1, with a change")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for title, (one, *more) in found.items():
        times = " | ".join(duration(p.seconds) for p in (one, *more))
        fits = f"{size(one.memory)} of {size(one.device_memory)}" + ("" if one.fits else ": does not fit")
        best = f"`{one.best.change}`: {duration(one.best.seconds)}" if one.best else "by nothing that was tried"
        lines.append(f"| {title} | {one.devices} | {times} | {size(one.disk)} | {fits} | {best} |")
    return "\n".join(lines)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--stages", action="store_true", help="each study on one card, stage by stage")
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = plans(Path(scratch))
    print(table(found))
    for title, (one, *_) in found.items() if a.stages else ():
        print(f"\n{title}, {one.devices}")
        for stage in one.stages:
            print(f"  {stage.stage:10} {duration(stage.seconds):>14} {size(stage.memory):>9}")


if __name__ == "__main__":
    main()

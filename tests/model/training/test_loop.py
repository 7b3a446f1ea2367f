"""Our own loop trains a PM on a Llama-like base, and says how it does on prompts that it never saw."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from typer.testing import CliRunner

from rmscope.cli import app
from tests.model.small import SENTENCES, small_lm, tokenizer


def test_the_command_trains_measures_and_writes_the_card(tmp_path: Path) -> None:
    small_lm("llama").save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    rows = [
        {
            "prompt": f"Question {i}: {SENTENCES[i % 5]}",
            "chosen": "Thanks for asking!",
            "rejected": "I don't know of that.",
        }
        for i in range(40)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "name": "small", "base": str(tmp_path / "base"), "data": [str(tmp_path / "pairs.jsonl")], "held_out_rows": 8,
        "blocks": 4, "batch_pairs": 8, "epochs": 4, "learning_rate": 0.01,
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = CliRunner().invoke(app, ["train-pm", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "pm"), "--json"])
    figures = json.loads(done.stdout)
    accuracy = figures["held_out_accuracy"]
    assert figures["pairs"] == 32
    assert figures["held_out_pairs"] == 8
    assert figures["length_only"] == 1  # the shorter side is always the better one
    assert 0.9 <= accuracy["value"] <= accuracy["high"]
    assert accuracy["low"] <= accuracy["value"]
    assert json.loads((tmp_path / "pm" / "measured.json").read_text())["held_out_accuracy"] == accuracy
    assert f"{accuracy['value']:.3f} [{accuracy['low']:.3f}" in (tmp_path / "pm" / "README.md").read_text()

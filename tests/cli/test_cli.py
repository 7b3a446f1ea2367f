"""The command line: exit codes, one sentence an error, one JSON line a result; the public surface."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType
from unittest import mock

import polars as pl
import pytest

import rmscope
from rmscope.cli import main
from tests.model.small import saved_pm, small_model, tokenizer


@pytest.fixture(scope="module")
def pm(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_pm(tmp_path_factory.mktemp("pm"))


def rmscope_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A command through its entry point, in this process: libraries are imported once for all tests."""
    out, errors, code = io.StringIO(), io.StringIO(), 0
    with mock.patch.object(sys, "argv", ["rmscope", *arguments]), redirect_stdout(out), redirect_stderr(errors):
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        except Exception:  # with --debug: the interpreter would print it
            code = 1
            traceback.print_exc()
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), errors.getvalue())


def one_sentence(done: subprocess.CompletedProcess[str]) -> str:
    """What a person reads after bad input: exit code 2, a single line on stderr, nothing on stdout, no traceback."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    lines = [line for line in done.stderr.strip().splitlines() if "Loading weights" not in line]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("rmscope: ")
    return lines[0]


def test_the_public_surface_is_what_the_package_documents() -> None:
    """Every public name is importable and documented, and nothing public is left out of ``__all__``."""
    assert sorted(rmscope.__all__) == list(rmscope.__all__)
    for name in rmscope.__all__:
        assert (getattr(rmscope, name).__doc__ or "").strip(), name
    public = {n for n in vars(rmscope) if not n.startswith("_") and not isinstance(getattr(rmscope, n), ModuleType)}
    assert public - {"annotations", "import_module", "TYPE_CHECKING", "Any"} <= set(rmscope.__all__)
    reference = (Path(__file__).parents[2] / "docs" / "reference").rglob("*.md")
    told = "\n".join(path.read_text("utf-8") for path in reference)
    assert not [name for name in rmscope.__all__ if not re.search(rf"\b{name}\b", told)]


def test_a_missing_file_is_one_sentence(pm: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = rmscope_command("run", "--model", pm, "--data", str(tmp_path / "none.jsonl"), "--out", str(out))
    assert "none.jsonl" in one_sentence(done)
    assert not out.exists()


def test_a_plan_is_one_json_line_and_a_dry_run_is_the_same_plan(pm: str, tmp_path: Path) -> None:
    asked = ["--model", pm, "--data", "demo:plain", "--limit", "64", "--seeds", "2", "--json"]
    plans = [
        json.loads(rmscope_command(*command, *asked).stdout)
        for command in (("plan",), ("run", "--out", str(tmp_path / "run"), "--dry-run"))
    ]
    assert not (tmp_path / "run").exists()
    for timed in plans:
        for part in (timed, *timed["stages"], *timed["changes"], timed["best"] or {}):
            part.pop("seconds", None)  # each was timed anew
        timed.pop("best")
        timed["changes"].sort(key=lambda change: change["change"])
    assert plans[0] == plans[1]


def test_unknown_devices_are_one_sentence(pm: str) -> None:
    asked = ("--model", pm, "--pairs", "100", "--tokens", "50", "--devices", "8xH1000")
    assert "one of the cards A100" in one_sentence(rmscope_command("plan", *asked))


def test_a_bad_row_names_its_line_and_the_mend(pm: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "chosen": "b"}\n')
    sentence = one_sentence(rmscope_command("score", "--model", pm, "--data", str(path)))
    assert "line 2" in sentence
    assert "--on-bad-row skip" in sentence


def test_a_model_without_a_head_is_refused(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    assert "newly initialised" in one_sentence(rmscope_command("doctor", str(tmp_path)))


def test_an_unknown_zoo_name_lists_the_zoo() -> None:
    assert "zoo:hh, zoo:planted" in one_sentence(rmscope_command("doctor", "zoo:none"))


def test_an_unknown_setting_lists_the_known_ones(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("model: zoo:hh\ndata: demo:planted\nout: x\nlayers: [3]\n")
    assert "known settings are model, data" in one_sentence(rmscope_command("run", str(config)))


def test_a_traceback_comes_only_with_debug(tmp_path: Path) -> None:
    done = rmscope_command("report", str(tmp_path), "--debug")
    assert "Traceback" in done.stderr
    assert "Traceback" not in rmscope_command("report", str(tmp_path)).stderr


def test_score_gives_one_json_line_of_the_models_own_rewards(pm: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"Is {i} even?", "chosen": "Yes, it is.", "rejected": "No."} for i in range(4)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    done = rmscope_command("score", "--model", pm, "--data", str(path), "--json")
    assert done.returncode == 0
    (line,) = done.stdout.splitlines()
    figures = json.loads(line)
    rm = rmscope.RewardModel.load(pm)
    scores = rm.score(rmscope.load_pairs(str(path)))
    assert figures["mean_chosen"] == pytest.approx(scores.chosen.mean().item(), abs=1e-6)
    assert figures["pairs"] == 4


def test_the_text_baseline_of_a_pm_needs_no_sae(pm: str, tmp_path: Path) -> None:
    out = tmp_path / "terms.json"
    done = rmscope_command("baseline", "--model", pm, "--data", "demo:plain", "--limit", "120", "--out", str(out), "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["terms"] == json.loads(out.read_text())["terms"]
    assert "words, phrases and counts explain" in done.stderr


def test_one_of_several_outputs_or_weights_are_named_on_the_command_line_and_kept_by_a_run(tmp_path: Path) -> None:
    from rmscope.run.inputs import Inputs
    from rmscope.run.settings import RunConfig
    from rmscope.settings import read_settings

    small_model("llama", num_labels=3).save_pretrained(tmp_path / "pm")
    tokenizer().save_pretrained(tmp_path / "pm")
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"prompt": "Is 2 even?", "chosen": "Yes, it is.", "rejected": "No."}\n')
    given = ("--model", str(tmp_path / "pm"), "--data", str(data), "--json")
    assert "3 outputs, not one; pick one with --output 0 .. 2" in one_sentence(rmscope_command("score", *given))
    assert "neither the number of an output nor weights" in one_sentence(rmscope_command("score", *given, "--output", "x"))
    rewards = [
        json.loads(rmscope_command("score", *given, "--output", o).stdout)["mean_chosen"] for o in ("0", "2", "0.5,0,1")
    ]
    assert rewards[2] == pytest.approx(0.5 * rewards[0] + rewards[1], abs=1e-5)
    stored = {"model": str(tmp_path / "pm"), "data": str(data), "out": tmp_path, "output": [0.5, 0.0, 1.0]}
    config = read_settings(RunConfig, None, stored)
    again = read_settings(RunConfig, None, json.loads(config.model_dump_json()))  # as run.yaml keeps it
    assert again == config
    assert Inputs(again).rm.score(rmscope.load_pairs(data)).chosen[0] == pytest.approx(rewards[2], abs=1e-5)


def test_every_command_that_loads_a_pm_takes_its_options() -> None:
    from typer.main import get_command

    from rmscope.cli import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    for name in ("run", "score", "doctor", "harvest", "train", "attribute", "evaluate", "experiment"):
        assert {"adapter", "output", "trust_remote_code"} <= {p.name for p in commands[name].params}, name


def test_doctor_says_what_it_checked(pm: str) -> None:
    done = rmscope_command("doctor", pm, "--limit", "8", "--json")
    assert done.returncode == 0
    checks = {c["check"]: c["status"] for c in json.loads(done.stdout)["checks"]}
    assert checks["head"] == checks["packing"] == checks["batches"] == "ok"


def test_attribute_needs_a_run_or_a_model_with_its_data_and_sae() -> None:
    assert "--model, --data and --sae" in one_sentence(rmscope_command("attribute", "--model", "zoo:hh"))


def test_attribute_estimates_the_effects_of_a_brought_sae_and_says_that_they_are_estimates(pm: str, tmp_path: Path) -> None:
    from tests.model.small import small_sae

    sae, data = small_sae(), tmp_path / "pairs.jsonl"
    sae.save(tmp_path / "sae")
    rows = [{"prompt": f"Is {i} even?", "chosen": "Yes, it is.", "rejected": "No."} for i in range(3)]
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    flags = ("--model", pm, "--data", str(data), "--sae", str(tmp_path / "sae"), "--site", "resid_post.1")
    done = rmscope_command("attribute", *flags, "--json")
    assert done.returncode == 0, done.stderr
    assert "estimates of unknown quality" in done.stderr
    features = {f["feature"]: f["effect"] for f in json.loads(done.stdout)["features"]}
    table = rmscope.attribute(rmscope.RewardModel.load(pm), sae, rmscope.load_pairs(str(data)), site="resid_post.1")
    means = dict(table.group_by("feature").agg(pl.col("effect").mean()).iter_rows())
    assert features == pytest.approx(means, abs=1e-5)


def test_bad_usage_exits_with_2() -> None:
    assert rmscope_command("run", "--no-such-flag").returncode == 2
    assert rmscope_command("score", "--model", "zoo:hh").returncode == 2


def test_harvest_and_train_from_disk_and_from_a_stream(pm: str, tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"Question {i}?", "chosen": f"Yes, {i} it is.", "rejected": f"I was told {i}."} for i in range(40)]
    data.write_text("\n".join(json.dumps(row) for row in rows))
    given = ["--model", pm, "--data", str(data), "--sites", "resid_post.1"]
    done = rmscope_command("harvest", *given, "--out", str(tmp_path / "acts"), "--json")
    assert done.returncode == 0, done.stderr
    harvested = json.loads(done.stdout)
    assert 0 < harvested["pairs"] < 40  # the fit split alone
    sae = ["--d-sae", "48", "--k", "2,4", "--epochs", "3", "--batch-size", "64", "--json"]
    acts, out = str(tmp_path / "acts"), ["--out", str(tmp_path / "a")]
    done = rmscope_command("train", acts, *given, *sae, "--reward-aware", "2", *out)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)["saes"]
    names = ["resid_post.1/k2", "resid_post.1/k4"]
    assert [row["sae"] for row in told] == [*names, "reward-aware/k2/resid_post.1", "reward-aware/k4/resid_post.1"]
    assert [round(row["l0"]) for row in told] == [2, 4, 2, 4]
    assert "damage" in told[2]
    done = rmscope_command("train", *given, *sae, "--out", str(tmp_path / "b"))
    assert done.returncode == 0, done.stderr
    for name in names:
        for out in ("a", "b"):
            loaded = rmscope.Sae.load(tmp_path / out / name)
            assert (loaded.site, loaded.cfg, loaded.m) == ("resid_post.1", {"k": int(name[-1])}, 48)


def test_a_bad_sae_flag_is_one_sentence(pm: str, tmp_path: Path) -> None:
    out = str(tmp_path / "saes")
    given = ["--model", pm, "--data", "demo:planted", "--out", out]
    assert "--k some" in one_sentence(rmscope_command("train", *given, "--k", "8,some"))
    assert "--model and --data" in one_sentence(rmscope_command("train", "--out", out))
    assert "rmscope harvest" in one_sentence(rmscope_command("train", str(tmp_path / "none"), "--out", out))

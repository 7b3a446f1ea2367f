"""What is lost when things go wrong: kills, flipped bits, malformed inputs, broken checkpoints, two processes on one folder.

Prints one JSON line per kind. *lost*: a rerun failed, or ended with other bytes. *silent*: damage was read without a word.
*tracebacks*: an error that is no sentence. *hangs*: longer than :data:`LIMIT` seconds (of what runs in this process, told
afterwards). *unnamed*: damage was refused without
the file's name. The exit code is 0 where all of these are 0.

usage: faults.py [--kills N] [--flips N] [--inputs N] [--checkpoints N] [--two N]      0 leaves a kind out
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from tests.model.small import saved_pm
from tests.run.small import settings, tables

from rmscope.errors import InputError
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.readers import load_pairs
from rmscope.run.run import Run
from rmscope.run.settings import RunConfig
from rmscope.settings import read_settings

LIMIT = 300
"""Seconds after which a command hangs."""
Counts = Counter[str]
TRACEBACK = "Traceback (most recent call last)"


def command(config: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "rmscope.cli", "run", str(config), *flags]


def small_config(pm: str, out: Path, k: int = 6) -> Path:
    """The settings of a small run as a file."""
    config = settings(pm, out, sites=["resid_post.2"], seeds=1, ledger_pairs=1).model_dump(
        mode="json", exclude_defaults=True
    )
    config["sae"]["k"] = k
    path = out.parent / f"{out.name}.k{k}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def finish(config: Path, counts: Counts) -> bool:
    """Runs to the end; counts what is no success."""
    try:
        done = subprocess.run(command(config), capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        counts["hangs"] += 1
        return False
    counts["tracebacks"] += TRACEBACK in done.stderr
    counts["lost"] += done.returncode != 0
    return done.returncode == 0


def kills(n: int, folder: Path, pm: str, rng: random.Random) -> Counts:
    """Kills a run at random moments and starts it again, until it is done; its tables are those of a run left alone."""
    counts = Counts(tried=0, survived=0, lost=0, tracebacks=0, hangs=0)
    alone = small_config(pm, folder / "alone")
    began = time.monotonic()
    finish(alone, counts)
    seconds, expected = time.monotonic() - began, tables(folder / "alone")
    while counts["tried"] < n:
        out = folder / "killed"
        shutil.rmtree(out, ignore_errors=True)
        config = small_config(pm, out)
        for _ in range(min(8, n - counts["tried"])):
            process = subprocess.Popen(command(config), stderr=subprocess.PIPE, text=True)
            try:
                _, said = process.communicate(timeout=rng.uniform(0.1, seconds))
                counts["tracebacks"] += TRACEBACK in said
                break
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                counts["tried"] += 1
        if not finish(config, counts):
            break  # counted as lost
        found, left = tables(out), [str(p.relative_to(out)) for p in out.rglob("*.tmp")]
        differ = [name for name in sorted(found.keys() | expected.keys()) if found.get(name) != expected.get(name)]
        if differ or left:
            print(json.dumps({"kind": "kills", "differ": differ, "left": left}), flush=True)
        counts["lost" if differ or left else "survived"] += 1
    return counts


def read_all(run: Run) -> None:
    """Everything that a run's readers give."""
    run.evidence, run.scores, run.concepts, run.measured_effects, run.text_baseline, run.noise_floor  # noqa: B018
    (
        run.frozen_concepts,
        run.token_texts,
        run.vocabulary,
        run.joint_effects(),
        run.joint_effects("strong"),
        run.concept_firings,
    )
    for site in run.sites:
        run.features(site), run.frozen(site), run.sae(site), run.ledger(site)
        for kind in ("estimated", "exact", "strong", "contribution"):
            run.effects(site, kind)  # type: ignore[arg-type]
        run.store.rows(site, torch.arange(run.store.tokens(site)))
        for column in ("token", "pair", "position", "region"):
            run.store.column(site, column)


OF_STAGES_ALONE = (
    "controls", "estimate_quality", "examples", "others", "quality_sample", "screened", "seeds.json", "training",
)  # fmt: skip
"""Files that no reader of a run opens, by how their names begin: their checksums are compared when the run is made again."""


def flips(n: int, folder: Path, pm: str, rng: random.Random) -> Counts:
    """Flips one bit of one file after the other. Reading names the file; of a file that only stages read, the next
    ``rmscope run`` sees that its checksum differs."""
    counts = Counts(tried=0, named=0, seen_by_run=0, silent=0, unnamed=0, tracebacks=0)
    config = small_config(pm, folder / "sound")
    finish(config, counts)
    files = sorted(p for p in (folder / "sound").rglob("*") if p.is_file() and not p.name.startswith("."))
    files = [p for p in files if p.name != "report.html" and p.stat().st_size]
    for number in range(n):
        path = files[number % len(files)]
        sound = path.read_bytes()
        damaged = bytearray(sound)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(damaged))
        counts["tried"] += 1
        try:
            read_all(Run.open(folder / "sound"))
        except InputError as error:
            is_named = path.name in str(error) or path.parent.name in str(error)
            counts["named" if is_named else "unnamed"] += 1
            if not is_named:
                print(json.dumps({"flip": path.name, "error": str(error)[:200]}), file=sys.stderr)
        except Exception as error:
            counts["tracebacks"] += 1
            print(json.dumps({"flip": path.name, "error": repr(error)[:200]}), file=sys.stderr)
        else:
            kept = path.relative_to(folder / "sound").as_posix()
            noticed = path.name.startswith(OF_STAGES_ALONE) and not Run.open(folder / "sound").on_disk.is_sound(kept)
            counts["seen_by_run" if noticed else "silent"] += 1
            if not noticed:
                print(json.dumps({"silent": kept}), file=sys.stderr)
        path.write_bytes(sound)
    return counts


def in_a_sentence(work: Callable[[], object], counts: Counts, what: str) -> None:
    """Counts a success, a refusal in a sentence, or a traceback."""
    began = time.monotonic()
    counts["tried"] += 1
    try:
        work()
        counts["read"] += 1
    except InputError as error:
        counts["refused" if "\n" not in str(error) else "tracebacks"] += 1
    except Exception as error:
        counts["tracebacks"] += 1
        print(json.dumps({what: repr(error)[:300]}), file=sys.stderr)
    counts["hangs"] += time.monotonic() - began > LIMIT


ROW = {"prompt": "Is water wet?", "chosen": "Yes, it is.", "rejected": "No."}
STRANGE = [
    "",
    None,
    3,
    2.5,
    True,
    [],
    {},
    [1, [2]],
    {"role": "user"},
    "\0",
    "\udcff",
    "x" * 20_000,
    [{"role": 3, "content": {}}],
]


def malformed_text(rng: random.Random) -> bytes:
    """A pairs or settings file with something wrong in it."""
    rows: list[Any] = [dict(ROW) for _ in range(rng.randrange(1, 5))]
    for _ in range(rng.randrange(1, 4)):
        row = rng.choice(rows)
        if isinstance(row, dict):
            row[rng.choice([*ROW, "messages", "label", "score", "[/bold]"])] = rng.choice(STRANGE)
        if rng.random() < 0.2:
            rows.append(rng.choice(STRANGE))
    text = "\n".join(json.dumps(row) for row in rows).encode()
    damage = rng.randrange(4)
    if damage == 1:
        text = text[: rng.randrange(len(text) + 1)]
    if damage == 2 and text:
        at = rng.randrange(len(text))
        text = text[:at] + bytes([rng.randrange(256)]) + text[at + 1 :]
    return text


def inputs(n: int, folder: Path, _pm: str, rng: random.Random) -> Counts:
    """Malformed pairs and settings are read, or refused in a sentence."""
    counts = Counts(tried=0, read=0, refused=0, tracebacks=0, hangs=0)
    for number in range(n):
        ending = rng.choice([".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz"])
        path = folder / f"pairs{number}{ending}"
        path.write_bytes(malformed_text(rng))
        in_a_sentence(lambda path=path: load_pairs(str(path)), counts, "pairs")
        config = folder / f"settings{number}.yaml"
        config.write_bytes(malformed_text(rng).replace(b"prompt", rng.choice([b"model", b"sae", b"seed", b"sites"])))
        given = {"model": "m", "data": "d", "out": str(folder / "o")}
        in_a_sentence(lambda config=config, given=given: read_settings(RunConfig, config, given), counts, "settings")
    return counts


def broken_checkpoint(folder: Path, rng: random.Random) -> str:
    """Damages a PM's folder; tells how."""
    files = sorted(p for p in folder.iterdir() if p.is_file())
    how = rng.choice(["cut", "flip", "delete", "key", "value", "nan", "shape", "empty"])
    path = rng.choice(files)
    content = path.read_bytes()
    weights = folder / "model.safetensors"
    if how == "cut":
        path.write_bytes(content[: rng.randrange(len(content))])
    elif how == "flip":
        at = rng.randrange(min(len(content), 4000))
        path.write_bytes(content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :])
    elif how == "delete":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how in ("key", "value"):
        path = folder / "config.json"
        config = json.loads(path.read_text())
        key = rng.choice(sorted(config))
        config.pop(key) if how == "key" else config.update({key: rng.choice([*STRANGE[:8], -1, 10**9])})
        path.write_text(json.dumps(config))
    else:
        tensors = load_file(weights)
        name = rng.choice(sorted(tensors))
        tensors[name] = tensors[name].fill_(float("nan")) if how == "nan" else tensors[name][..., :-1].contiguous()
        save_file(tensors, weights, {"format": "pt"})
    return f"{how} {path.name}"


def checkpoints(n: int, folder: Path, pm: str, rng: random.Random) -> Counts:
    """Broken checkpoints load and score, or are refused in a sentence."""
    counts = Counts(tried=0, read=0, refused=0, tracebacks=0, hangs=0)
    for number in range(n):
        broken = folder / f"pm{number}"
        shutil.copytree(pm, broken, ignore=shutil.ignore_patterns("pairs.jsonl"))
        how = broken_checkpoint(broken, rng)

        def score(broken: Path = broken) -> None:
            rewards = RewardModel.load(str(broken), device="cpu").score_texts("Is water wet?", ["Yes.", "No, it is not."])
            if not all(abs(r) < float("inf") for r in rewards):
                raise AssertionError(f"rewards {rewards}")

        in_a_sentence(score, counts, how)
        shutil.rmtree(broken)
    return counts


def two(n: int, folder: Path, pm: str, rng: random.Random) -> Counts:
    """Two processes with different settings on one folder: one is refused with exit code 2, the folder is the other's."""
    counts = Counts(tried=0, survived=0, lost=0, tracebacks=0, hangs=0)
    for number in range(n):
        out = folder / f"two{number}"
        configs = [small_config(pm, out, k) for k in (4, 6)]
        counts["tried"] += 1
        processes = []
        for config in configs:
            processes.append(subprocess.Popen(command(config), stderr=subprocess.PIPE, text=True))
            time.sleep(rng.uniform(0, 3))
        try:
            said = [process.communicate(timeout=LIMIT)[1] for process in processes]
        except subprocess.TimeoutExpired:
            for process in processes:
                process.kill()
                process.communicate()
            counts["hangs"] += 1
            continue
        codes = [process.returncode for process in processes]
        counts["tracebacks"] += any(TRACEBACK in text for text in said)
        finished = [config for config, code in zip(configs, codes, strict=True) if code == 0]
        if sorted(codes) == [0, 2] and "Another process works on" in said[codes.index(2)]:
            alone = out.with_name(f"{out.name}.alone")
            given = yaml.safe_load(finished[0].read_text())
            given["out"] = str(alone)
            path = folder / "alone.yaml"
            path.write_text(yaml.safe_dump(given))
            finish(path, counts)
            counts["survived" if tables(alone) == tables(out) else "lost"] += 1
            shutil.rmtree(alone)
        else:
            counts["lost"] += 1
        shutil.rmtree(out)
    return counts


KINDS = {"kills": kills, "flips": flips, "inputs": inputs, "checkpoints": checkpoints, "two": two}
DEFAULTS = {"kills": 200, "flips": 200, "inputs": 50, "checkpoints": 60, "two": 20}
BAD = ("lost", "silent", "tracebacks", "hangs", "unnamed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for kind, number in DEFAULTS.items():
        parser.add_argument(f"--{kind}", type=int, default=number)
    parser.add_argument("--seed", type=int, default=0)
    given = vars(parser.parse_args())
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    bad = 0
    with tempfile.TemporaryDirectory() as temporary:
        pm = saved_pm(Path(temporary) / "pm")
        for kind, work in KINDS.items():
            if given[kind]:
                folder = Path(temporary) / kind
                folder.mkdir()
                counts = work(given[kind], folder, pm, random.Random(given["seed"]))
                bad += sum(counts[name] for name in BAD)
                print(json.dumps({"kind": kind, **counts}), flush=True)
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()

"""What was typed on the bench as an experiment file: do completions keep their order under other prompts?"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import yaml

from rmscope.app.bench import Request
from rmscope.errors import InputError
from rmscope.io import write_text
from rmscope.studies.experiment.conditions import Experiment

FOLDER = "evidence/experiments"
"""Where a run keeps its experiments."""
NAME = re.compile("[A-Za-z0-9_-]{1,60}")


def save_experiment(run: Path, name: str, request: Request, rewards: Sequence[float]) -> Path:
    """Writes ``NAME.yaml`` to a run's experiments: each completion under the prompts of the measure split.

    It expects the order of ``rewards``, one for each completion. Completion A is the baseline.

    Raises:
        InputError: the name has other characters than letters, digits, - and _, or is taken; or there are fewer than two
            completions, or all have one reward.
    """
    if not NAME.fullmatch(name):
        raise InputError(f"{name[:60]!r} cannot be the name of an experiment; use letters, digits, - and _, at most 60.")
    path = run / FOLDER / f"{name}.yaml"
    if path.exists() or path.with_suffix(".json").exists():
        raise InputError(f"There is an experiment {name} already; choose another name.")
    if len(request.completions) < 2 or len(rewards) != len(request.completions):
        raise InputError("An experiment compares completions; measure at least two.")
    names = [f"completion_{letter}" for letter in "ABCD"[: len(rewards)]]
    expects = {
        "up": [n for n, r in zip(names, rewards, strict=True) if r > rewards[0]],
        "down": [n for n, r in zip(names, rewards, strict=True) if r < rewards[0]],
    }
    if not any(expects.values()):
        raise InputError("These completions have one reward, so there is no order to test.")
    experiment = {
        "hypothesis": "The completions of the bench keep their order under other prompts.",
        "prompts": "data",
        "conditions": {n: {"replace": text} for n, text in zip(names, request.completions, strict=True)},
        "baseline": names[0],
        "expects": {direction: listed for direction, listed in expects.items() if listed},
    }
    Experiment(name=name, **experiment)  # what is written can be read
    typed = "".join(c if c.isprintable() or c == "\n" else " " for c in request.prompt)
    about = "".join(f"# {line}\n" for line in f"Typed under the prompt\n{typed}".splitlines())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, about + yaml.safe_dump(experiment, sort_keys=False, allow_unicode=True))
    return path

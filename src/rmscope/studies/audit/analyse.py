"""``rmscope audit``: plant, train, run, score.

The run is that of ``rmscope run`` with its own settings, without ledgers, by which nothing here is scored: it gets a PM and
a file of pairs, and nothing else.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rmscope.errors import InputError
from rmscope.io import write_json, write_table
from rmscope.model.training.loop import base_of
from rmscope.model.training.recipe import Recipe
from rmscope.pairs.pair import Pair
from rmscope.pairs.plants import Plant, read_plants
from rmscope.pairs.readers import load_pairs
from rmscope.planted.recall_metrics import summary
from rmscope.run.folder import Display, NoDisplay
from rmscope.run.run import Run
from rmscope.run.settings import RunConfig, read_config
from rmscope.studies.audit import calibration, planting, pms
from rmscope.studies.audit.scoring import Scoring

FRESH_SEED = 7919
"""Added to the audit's seed where held-out prompts are planted: pairs that neither the PM nor the run saw."""


class AuditConfig(BaseModel):
    """What ``rmscope audit`` does. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    plants: Path
    """The plants file."""
    pairs: str
    """The text that cues are planted into: a pairs file, a hub id, or demo:plain."""
    out: Path
    """The folder of the audit."""
    base: str = "zoo:smollm2"
    """What the PM is trained from: zoo:smollm2, or a folder of a Llama-like model."""
    limit: int = Field(800, gt=0)
    """At most this many pairs, from the start, among those short enough."""
    max_tokens: int = Field(110, gt=0)
    """Pairs with a longer side are left out, before planting."""
    copies: int = Field(4, gt=0)
    """How often each pair is planted anew."""
    seed: int | None = Field(None, ge=0)
    """Fixes planting, the PM, the SAEs and the run; left out, the plants file's own."""
    calibrate: bool = False
    """Also a PM of shuffled labels, one of random weights, and decoy cues: about three times the work."""
    recipe: Path | None = None
    """A YAML file of changes to how the PM is trained."""
    run: Path | None = None
    """A YAML file of changes to the run's settings, which are otherwise those of rmscope run."""


@dataclass(frozen=True)
class _Texts:
    """What was planted: the run's file as it reads it, and the held-out pairs."""

    planted: list[Pair]
    path: Path
    held_out: list[Pair]


def audit(config: AuditConfig, shown: Display | None = None) -> dict[str, Any]:
    """Plants, trains, runs, scores; writes ``audit.json`` and returns the same.

    Raises:
        InputError: a file is missing or malformed, or the pairs are too few.
    """
    show, started = shown or NoDisplay(), time.time()
    listed = read_plants(config.plants)
    seed = listed.seed if config.seed is None else config.seed
    recipe = _recipe(config, seed)
    texts = _plant(config, listed.plants, recipe, seed)
    with show.stage("train PM") as progress:
        pm = pms.planted_pm(recipe, texts.planted, progress, _device(config))
    run = Run(_run_config(config, pm, texts.path, config.out / "run", seed), show)
    run.go()
    planting.write_cues(config.out / "cues.parquet", texts.planted, run.rm)
    scoring = Scoring(run, listed.plants, texts.held_out, seed)
    with show.stage("cues") as progress:
        rows = scoring.rows(progress)
    fresh = planting.planted_copies(texts.held_out, listed.plants, config.copies, seed + FRESH_SEED, held_out=None)
    with show.stage("fresh pairs") as progress:
        replicated = scoring.replicated(fresh, progress)
    for site, table in replicated.items():
        write_table(config.out / f"replicated.{site}.parquet", table)
    with show.stage("second SAEs") as progress:
        stability = scoring.stability(progress)
    result = summary(rows, replicated) | {"stability": stability}
    if config.calibrate:
        result["calibration"] = _calibrate(config, recipe, texts, scoring, show, seed)
    result |= {"plants": _with_tokens(rows, config.out / "cues.parquet"), "audited": _about(config, run, pm, texts, seed)}
    result |= {"seconds": round(time.time() - started, 1), "peak_gb": _peak_gb()}
    write_json(config.out / "audit.json", result)
    return result


def _plant(config: AuditConfig, plants: tuple[Plant, ...], recipe: Recipe, seed: int) -> _Texts:
    """Writes the run's file, and reads it back: the PM is trained on what the run will read."""
    _, tokenizer = base_of(recipe)
    bases, held_out = planting.base_pairs(config.pairs, config.limit, config.max_tokens, tokenizer)
    planted = planting.planted_copies(bases, plants, config.copies, seed)
    path = config.out / "pairs.jsonl"
    planting.write_pairs(path, planted)
    planting.must_read_the_same(planted, load_pairs(path))
    return _Texts(planted, path, held_out)


def _recipe(config: AuditConfig, seed: int) -> Recipe:
    changes = _yaml(config.recipe)
    try:
        return Recipe(**{**pms.RECIPE.model_dump(), "base": config.base, "seed": seed, **changes})
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"The recipe {config.recipe}: {first['loc'][0]}: {str(first['msg']).lower()}.") from error


def _run_config(config: AuditConfig, pm: Path, pairs: Path, out: Path, seed: int) -> RunConfig:
    changes = _yaml(config.run)
    sae = {"seed": seed, **changes.pop("sae", {})}
    told = {"model": str(pm), "data": str(pairs), "out": out, "seed": seed, "ledger_pairs": 0, "sae": _sae(sae)}
    return read_config(None, {**told, **changes})


def _device(config: AuditConfig) -> str:
    """Where the run's settings have it, the PM is trained."""
    return str(_yaml(config.run).get("device", RunConfig.model_fields["device"].default))


def _sae(given: dict[str, Any]) -> dict[str, Any]:
    """A run's own SAE settings with these on top: settings that name an SAE at all start from the family's own."""
    return {**RunConfig.model_fields["sae"].default.model_dump(exclude_unset=True), **given}


def _yaml(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    if not path.is_file():
        raise InputError(f"{path} is not there; name a YAML file of settings.")
    try:
        content = yaml.safe_load(path.read_text("utf-8")) or {}
    except yaml.YAMLError as error:
        raise InputError(f"{path} is no YAML: {str(error).splitlines()[0]}.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no settings (key: value lines).")
    return content


def _calibrate(
    config: AuditConfig, recipe: Recipe, texts: _Texts, scoring: Scoring, show: Display, seed: int
) -> dict[str, Any]:
    coin = pms.shuffled(texts.planted, seed)
    with show.stage("train PM") as progress:
        folders = {
            "shuffled": pms.planted_pm(recipe, coin, progress, _device(config)),
            "random": pms.random_pm(recipe),
        }
    found: dict[str, Any] = {}
    for name, pm in folders.items():
        run = Run(_run_config(config, pm, texts.path, config.out / name, seed), show)
        found[name] = calibration.reported_in(run, run.go())
    with show.stage("decoys") as progress:
        found["decoys"] = calibration.decoys_matched(scoring, progress=progress)
    return found


def _with_tokens(rows: list[dict[str, Any]], cues: Path) -> list[dict[str, Any]]:
    """The rows with what was planted of each cue: pairs, realised dose, tokens of the cue and of what stands for it."""
    planted = planting.planted_counts(pl.read_parquet(cues))
    return [row | {"planted": planted.get(row["name"])} for row in rows]


def _about(config: AuditConfig, run: Run, pm: Path, texts: _Texts, seed: int) -> dict[str, Any]:
    held = {p.first_human_turn() for p in texts.held_out}
    return {
        "base": config.base, "pm": pm.name, "pm_identity": run.rm.identity, "pairs": config.pairs, "seed": seed,
        "planted_pairs": len(texts.planted), "held_out_prompts": len(held), "sd_delta": run.sd, "sites": run.sites,
    }  # fmt: skip


def _peak_gb() -> float:
    """The most memory that this process has held (Linux counts it in KB)."""
    import resource

    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)

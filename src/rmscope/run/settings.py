"""Settings of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, model_validator

from rmscope.errors import InputError, one_line
from rmscope.io import content_hash, local_path, write_text
from rmscope.sae.config import SaeConfig
from rmscope.settings import Flag, LoadSettings, ModelSettings, Names, ReadSettings, Seed

RECORD, CHECKSUM = "run.yaml", "checksum"
"""The file that makes a folder a run folder, and its first entry."""


class RunConfig(LoadSettings, ReadSettings, ModelSettings):
    """What ``rmscope run`` does. Unknown keys are refused."""

    title = "Run"

    out: Path
    """The run folder."""
    sites: Names | None = None
    """Sites such as diff.12 or resid_post.6, comma-separated; left out, the setting study decides."""
    study: Literal["both", "difference", "whole"] = "both"
    """What is studied where no sites are named. difference: what preference training wrote, after each of some blocks. both:
    that, and the base's stream after two of them. whole: the whole stream, at about one and two thirds of the depth; so is a
    PM without a known base."""
    blocks: int = Field(8, gt=0)
    """At how many blocks, at most, what training wrote is studied: first those where most of it is still at its own tokens,
    then others at even distances."""
    max_tokens: int | None = Field(None, gt=0)
    """Only pairs whose sides have at most this many tokens each."""
    top_share: float | None = Field(None, gt=0, le=1)
    """Of the scored pairs, study only this share: those of largest |Δr|."""
    top_pairs: int | None = Field(None, gt=0)
    """Of the scored pairs, study at most this many: those of largest |Δr|."""
    sae: SaeConfig = SaeConfig()
    """How the SAEs are trained."""
    diff_features: int | None = Field(None, gt=0)
    """Features of a difference SAE (sites such as diff.12 and both.12). Left out, the smallest of 64, 128 and 256 at which
    more explain no more of what training wrote, on some pairs of the fit split."""
    diff_k: int = Field(2, gt=0)
    """Features of a difference SAE that fire on a token."""
    diff_tokens: int = Field(1_000_000, gt=0)
    """Training tokens of a difference SAE."""
    sae_dir: Annotated[str | None, Flag("--sae")] = None
    """SAEs to use instead of training: a folder (or hub:owner/repo) with one subfolder per site, or a pattern with {site} or
    {L}, the block's number, such as hub:owner/repo/ae_layer{L}.pt. A pattern with {L} brings no difference SAEs: they are
    trained."""
    reward_aware: int = Field(0, ge=0)
    """Steps of reward-aware fine-tuning after the SAEs are trained: less of the reward then runs through their error."""
    estimate: Literal["atp", "midpoint", "ig"] = "atp"
    """How the screen estimates ablation effects: atp (clean point), midpoint, or ig (along the path from zero on which all
    features move together)."""
    estimate_pairs: int | None = Field(None, gt=0)
    """Pairs of the fit split on which effects are estimated, one per prompt while prompts last; left out, all."""
    screen: int = Field(100, gt=0)
    """Features that the estimate proposes up, and as many down; each is then ablated exactly."""
    others: int = Field(100, ge=0)
    """Other active features that are ablated exactly, a stratified sample."""
    responses: int = Field(16, gt=0)
    """Responses on which a screened feature is ablated exactly."""
    quality_responses: int = Field(24, gt=0)
    """Responses on which a stratified sample of features is ablated, to measure the quality of the estimate."""
    frozen: int = Field(200, gt=0)
    """Features of a run that go to the confirm split, all sites together."""
    concepts: int = Field(30, gt=0)
    """Concepts of a run that go to the confirm split: those of the largest effects on the fit split."""
    confirm_prompts: int = Field(64, gt=0)
    """Confirm prompts on which a frozen concept is ablated."""
    feature_prompts: int = Field(24, gt=0)
    """Confirm prompts on which a frozen feature is ablated."""
    confirm_pairs: int = Field(1, gt=0)
    """Pairs of each of those prompts on which it is ablated, if it fires on so many; their mean counts once."""
    null_prompts: int = Field(12, gt=0)
    """Confirm prompts on which a reported concept is compared with moves of the same size in 32 other directions."""
    measure_prompts: int = Field(64, gt=0)
    """Prompts of the measure split on which a reported concept is ablated again: what is shown of it is measured there."""
    seeds: int = Field(3, gt=0)
    """SAE seeds in which a reported concept's effect is measured, with the run's own; 1: only that."""
    ledger_pairs: int = Field(24, ge=0)
    """Pairs of the measure split that get a ledger, one per prompt while prompts last; each takes many gradients, 0 none."""
    baseline: Literal["mean", "zero"] = "mean"
    """Where a ledger's path starts: the dataset means of features and error, or zero (the SAE's b_dec)."""
    ledger_halvings: int = Field(6, ge=0)
    """How often a stretch of a ledger's path is halved at most where its gap is too large; at 1 many gaps stay open."""
    seed: Seed = 0
    """Fixes every draw of the run; the SAEs' too, unless they have a seed of their own."""

    def difference_config(self, sae: SaeConfig, features: int) -> SaeConfig:
        """How a difference SAE of some features is trained beside SAEs of the whole stream."""
        own = {"d_sae": features, "k": self.diff_k, "tokens": self.diff_tokens, "init": None}
        return sae.model_copy(update=own)

    @model_validator(mode="after")
    def _one_seed(self) -> RunConfig:
        if "seed" in self.model_fields_set and "seed" not in self.sae.model_fields_set:
            self.sae = self.sae.model_copy(update={"seed": self.seed})
        return self

    @model_validator(mode="after")
    def _can_be_fine_tuned(self) -> RunConfig:
        if self.reward_aware and self.sae_dir:
            raise ValueError(
                "reward_aware fine-tunes SAEs that the run trains, and sae_dir brings others; leave one of them out"
            )
        if self.sae.init and self.sae_dir:
            raise ValueError("init trains on from existing SAEs, and sae_dir brings SAEs as they are; leave one of them out")
        if self.reward_aware and self.dtype != "float32":
            raise ValueError(f"reward_aware needs rewards in float32, not {self.dtype}")
        return self


DEMO: dict[str, Any] = {
    "model": "zoo:planted",
    "data": "demo:planted",
    # What training wrote, with few features and responses: on this PM that is enough, and the demo shall be quick.
    "study": "difference",
    "blocks": 3,
    "diff_features": 64,
    "estimate_pairs": 252,
    "others": 20,
    "responses": 10,
    "quality_responses": 10,
    "frozen": 75,
    "concepts": 25,
    "confirm_prompts": 42,
    "feature_prompts": 20,
    "null_prompts": 8,
    "measure_prompts": 30,
}
"""Settings of ``rmscope demo``."""


def recorded_settings(folder: Path) -> dict[str, Any]:
    """The settings of the run in a folder, but for ``trust_remote_code``: the folder may be a stranger's.

    Raises:
        InputError: the folder holds no run, or its record is not as a run wrote it.
    """
    record = read_record(folder)
    if record.get(CHECKSUM, checksum(record)) != checksum(record):
        raise InputError(
            f"{folder / RECORD} is damaged or was changed by hand (its checksum differs). If you changed it, delete "
            f"its first line; else start the run again with its settings and --out {folder}: what is sound is kept."
        )
    return {**record["config"], "out": folder, "trust_remote_code": False}


def checksum(record: Mapping[str, Any]) -> str:
    """The checksum of a record, which its first line holds."""
    return content_hash({name: value for name, value in record.items() if name != CHECKSUM})


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes ``run.yaml``, with its checksum."""
    text = yaml.safe_dump({n: value for n, value in record.items() if n != CHECKSUM}, sort_keys=False, allow_unicode=True)
    write_text(folder / RECORD, f"{CHECKSUM}: '{checksum(yaml.safe_load(text))}'\n{text}")


def read_record(folder: Path) -> dict[str, Any]:
    """What ``run.yaml`` in a run folder records: config, identity, versions, stages.

    Raises:
        InputError: the folder holds no run, or its record cannot be read.
    """
    path = local_path(folder / RECORD)
    if not path.is_file():
        raise InputError(f"{folder} is no run folder (it holds no {RECORD}); make one with rmscope run.")
    try:
        record = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({one_line(error)}); make the run anew.") from error
    config = record.get("config") if isinstance(record, dict) else None
    if not isinstance(config, dict) or not all(isinstance(name, str) for name in config):
        raise InputError(f"{path} holds no settings of a run; make the run anew.")
    return record

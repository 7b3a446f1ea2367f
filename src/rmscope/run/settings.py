"""Settings of a run; the sentence under a field is its help text, and the command line is made from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rmscope.errors import InputError
from rmscope.sae.config import SaeConfig


class RunConfig(BaseModel):
    """What ``rmscope run`` does. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    model: str
    """The PM: a hub id, a folder, or zoo:NAME."""
    data: str
    """The pairs: a file, a hub id, or demo:planted."""
    out: Path
    """The run folder."""
    split: str = "train"
    """Which split of a hub dataset."""
    limit: int | None = Field(None, gt=0)
    """At most this many pairs, from the start of the data."""
    columns: dict[str, str] | None = None
    """Own column names for prompt, chosen, rejected."""
    format: str | None = None
    """The shape of the data, such as "best of n"; left out, its columns tell."""
    max_tokens: int | None = Field(None, gt=0)
    """Only pairs whose sides have at most this many tokens each."""
    top_share: float | None = Field(None, gt=0, le=1)
    """Of the scored pairs, only this share is studied further: those of largest |Δr|."""
    top_pairs: int | None = Field(None, gt=0)
    """Of the scored pairs, at most so many are studied further: those of largest |Δr|."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Whether a row that gives no pair ends the run or is counted, listed and left out."""
    adapter: str | None = None
    """A PEFT adapter to put on the PM."""
    output: int | list[float] | None = None
    """Of several outputs: the number of one (0 is the first), or a weight for each."""
    trust_remote_code: bool = False
    """Whether code that comes with the PM's checkpoint may run."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of rewards, gradients and ablations; anything but float32 is labelled."""
    device: str = "auto"
    """cpu, cuda, cuda:1, or auto."""
    sites: list[str] | None = None
    """Sites such as resid_post.6; left out, about one and two thirds of the depth."""
    sae: SaeConfig = SaeConfig()
    """How the SAEs are trained."""
    sae_dir: str | None = None
    """SAEs to use instead of training: a folder (or hub:owner/repo) with one subfolder a site, or a pattern with {site} or
    {L}, the block's number, such as hub:owner/repo/ae_layer{L}.pt."""
    reward_aware: int = Field(0, ge=0)
    """Steps of reward-aware fine-tuning after the SAEs are trained: less of the reward then runs through their error."""
    estimate: Literal["atp", "midpoint", "ig"] = "atp"
    """How the screen estimates ablation effects: atp (clean point), midpoint, or ig (along the path from zero on which all
    features move together)."""
    screen: int = Field(100, gt=0)
    """Features proposed up, and as many down, by the estimate; each is then ablated exactly."""
    others: int = Field(100, ge=0)
    """Other active features that are ablated exactly, a stratified sample."""
    responses: int = Field(16, gt=0)
    """Responses on which a screened feature is ablated exactly."""
    quality_responses: int = Field(24, gt=0)
    """Responses of which a stratified sample of features is ablated, for the trust score."""
    frozen: int = Field(200, gt=0)
    """Features of a run that go to the confirm split, all sites together."""
    confirm_prompts: int = Field(24, gt=0)
    """Confirm prompts on which a frozen feature is ablated."""
    confirm_pairs: int = Field(1, gt=0)
    """Pairs of each of them on which it is ablated, if it fires on so many; their mean counts once."""
    ledger_pairs: int = Field(24, ge=0)
    """Pairs of the measure split that get a ledger, one a prompt while prompts last; each takes many gradients, 0 none."""
    baseline: Literal["mean", "zero"] = "mean"
    """Where a ledger's path starts: the dataset means of features and error, or zero (the SAE's b_dec)."""
    ledger_halvings: int = Field(6, ge=0)
    """How often a stretch of a ledger's path is halved at most where its gap is too large; at 1 many stay open."""
    seed: int = Field(0, ge=0)
    """Fixes every draw of the run."""

    @model_validator(mode="after")
    def _can_be_fine_tuned(self) -> RunConfig:
        if self.reward_aware and self.sae_dir:
            raise ValueError(
                "reward_aware fine-tunes SAEs that the run trains, and sae_dir brings others; leave one of them out"
            )
        if self.reward_aware and self.dtype != "float32":
            raise ValueError(f"reward_aware needs rewards in float32, not {self.dtype}")
        return self


def read_config(path: Path | None, overrides: dict[str, Any]) -> RunConfig:
    """A run's settings from a YAML file and flags, the flags on top.

    Raises:
        InputError: the file is missing or malformed, a key is unknown, or a value does not fit.
    """
    values: dict[str, Any] = {}
    if path is not None:
        if not path.is_file():
            raise InputError(f"The config {path} is not there; name a YAML file.")
        try:
            values = yaml.safe_load(path.read_text("utf-8")) or {}
        except yaml.YAMLError as error:
            raise InputError(f"The config {path} is no YAML: {str(error).splitlines()[0]}.") from error
        if not isinstance(values, dict):
            raise InputError(f"The config {path} holds no settings (key: value lines).")
    sae = {**values.get("sae", {}), **overrides.pop("sae", {})}
    values |= {k: v for k, v in overrides.items() if v is not None}
    if sae:
        values["sae"] = sae
    try:
        return RunConfig(**values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(p) for p in first["loc"]) or "settings"
        known = ", ".join(RunConfig.model_fields)
        mend = f"; known settings are {known}" if first["type"] == "extra_forbidden" else ""
        raise InputError(f"Setting {where}{f' in {path}' if path else ''}: {first['msg'].lower()}{mend}.") from error

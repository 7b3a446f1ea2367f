"""Settings of the single steps; those of runs and studies are in their own rooms."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from rmscope.run.settings import RunConfig
from rmscope.sae.config import SaeConfig
from rmscope.settings import Argument, DeviceSettings, LoadSettings, ModelSettings, Names, ReadSettings, Seed, Settings


class DemoConfig(DeviceSettings):
    """The run on the embedded PM with six planted biases."""

    out: Path = Path("demo")
    """The run folder."""
    seed: Seed = 0
    """Fixes every draw."""


class DoctorConfig(LoadSettings, ReadSettings):
    """Checks of a PM."""

    model: Annotated[str, Argument]
    """The PM: a hub id, a folder, or zoo:hh / zoo:planted."""
    data: str = "demo:plain"
    """Pairs to check it on, best of the kind that it was trained on."""
    limit: int | None = Field(64, gt=0)
    """At most this many pairs, from the start of the data."""


class ScoreConfig(LoadSettings, ReadSettings, ModelSettings):
    """Rewards of pairs."""

    out: Path | None = None
    """Write one row per pair to this Parquet file."""


class BaselineConfig(LoadSettings, ReadSettings, ModelSettings):
    """Words, phrases and simple style, fitted to Δr on half of the prompts and measured on the others."""

    out: Path | None = None
    """Write the terms to this JSON file."""


class FitSettings(LoadSettings, ReadSettings, ModelSettings):
    """A PM, and the pairs whose activations SAEs are trained on."""

    sites: Names | None = None
    """Sites, comma-separated; left out, those at about one and two thirds of the depth."""
    all_pairs: bool = False
    """Take every pair, not the fit split of the prompts alone."""


class HarvestConfig(FitSettings):
    """Activations on disk."""

    out: Path
    """Folder for the activations."""


class SweepConfig(SaeConfig):
    """Settings of SAE training, three of which may take several values: one SAE for each combination."""

    k: Names = []  # type: ignore[assignment]
    """Features that fire on a token (topk), or on average; several values, comma-separated, make a sweep."""
    l1: Names = []  # type: ignore[assignment]
    """Weight of the L1 penalty (gated, standard); several values, comma-separated, make a sweep."""
    l0: Names = []  # type: ignore[assignment]
    """Weight of each feature that fires (jumprelu); several values, comma-separated, make a sweep."""


class TrainConfig(FitSettings):
    """SAEs on stored or streamed activations."""

    store: Annotated[Path | None, Argument] = None
    """Activations from rmscope harvest; left out, the PM streams."""
    model: str | None = None  # type: ignore[assignment]
    """The PM: to stream from, or for --reward-aware."""
    data: str | None = None  # type: ignore[assignment]
    """Pairs: to stream, or for --reward-aware."""
    out: Path
    """Folder for the SAEs, one subfolder per site."""
    sae: SweepConfig = SweepConfig()
    """How the SAEs are trained."""
    reward_aware: int = Field(0, ge=0)
    """Then fine-tune for so many steps on what the SAE does to the reward difference."""
    weight: float = Field(1.0, ge=0)
    """Weight of the rewards in that."""


class AttributeConfig(LoadSettings, ReadSettings):
    """Estimated ablation effects."""

    run: Annotated[Path | None, Argument] = None
    """A run folder: its SAEs on its measure split. Without one, name --model, --data and --sae."""
    model: str | None = None
    """The PM: a hub id, a folder, or zoo:hh / zoo:planted."""
    data: str | None = None
    """The pairs: a file, a hub id, or demo:planted."""
    sae: Path | None = None
    """An SAE's folder or file."""
    site: str | None = None
    """The site; left out, the SAE's own, or the run's first."""
    method: Literal["atp", "midpoint", "ig"] = "atp"
    """atp (clean point), midpoint (slower, closer), or ig (contributions)."""
    limit: int | None = Field(64, gt=0)
    """At most this many pairs; of a run, from its measure split."""
    out: Path | None = None
    """Write the table to this Parquet file."""


class AblateConfig(Settings):
    """Exact ablation effects on fresh pairs of a run."""

    site: str
    """The site, such as resid_post.7."""
    features: str = "top:10"
    """active, top:K, or a list such as 12,405,77."""
    limit: int = Field(8, gt=0)
    """At most this many pairs of the measure split."""
    out: Path | None = None
    """Write the table to this Parquet file."""


class LedgerConfig(Settings):
    """Where reward differences come from."""

    site: str
    """The site, such as resid_post.7."""
    pair: str | None = None
    """A pair's id: its own ledger, feature by feature. Left out, the shares over all pairs with a ledger."""
    top: int = Field(15, gt=0)
    """Features of each side that a pair's ledger lists."""


class RankConfig(Settings):
    """The frozen features of a run, ranked."""

    site: str | None = None
    """One site, such as resid_post.7; left out, all."""
    by: Literal["effect", "preference"] = "effect"
    """effect: what drives reward; preference: what parts chosen from rejected."""
    top: int = Field(20, gt=0)
    """Features of each site to print."""
    interactions: bool = False
    """Also ablate the best 30 in pairs, and the reported ones as a group."""


class ReportConfig(Settings):
    """The page of a finished run."""


class TrainPmConfig(Settings):
    """Training of a PM."""

    recipe: Annotated[Path, Argument]
    """A recipe, such as configs/train-trl.yaml."""
    out: Path
    """Folder for the PM, its settings and its card."""


class RunCommandConfig(RunConfig):
    """What the command ``run`` takes."""

    dry_run: bool = False
    """Only tell what the run would take, as rmscope plan does: work, time, disk and memory of each stage."""

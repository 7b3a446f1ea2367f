"""Settings of a plan: those of the run that is planned, and where it would run."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from rmscope.run.settings import RunConfig


class PlanConfig(RunConfig):
    """What a run would take: FLOPs, time, disk and memory of each stage. It is an estimate (docs/howto/plan.md)."""

    title = "Plan"

    model: str
    """The PM: as of a run, or a folder that holds only its config.json."""
    data: str = ""
    """The pairs, whose tokens are counted, as of a run; or --pairs and --tokens describe them."""
    out: Path = Path("plan")
    """Not used: a plan writes nothing."""
    devices: str | None = None
    """Cards to plan for, such as H100, 8xH100 or 4x8xH100 (four machines of eight); left out, the device of this machine is
    timed."""
    pairs: int | None = Field(None, gt=0)
    """The number of pairs; with --tokens, no data is read."""
    tokens: int | None = Field(None, gt=0)
    """Tokens of one side of a pair, prompt and response together, on average."""
    shared: float = Field(0.5, ge=0, lt=1)
    """The share of a side's tokens that both sides begin with, such as the prompt; with --pairs."""

    @model_validator(mode="after")
    def _has_pairs(self) -> PlanConfig:
        if (self.pairs is None) != (self.tokens is None) or not (self.data or self.pairs):
            raise ValueError("a plan needs pairs; name --data, or give both --pairs and --tokens")
        return self

    def run_config(self) -> RunConfig:
        """The settings of the run that is planned."""
        given = {name: getattr(self, name) for name in RunConfig.model_fields if name in self.model_fields_set}
        return RunConfig(**{**given, "data": self.data, "out": self.out})

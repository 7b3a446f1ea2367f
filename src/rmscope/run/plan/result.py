"""What a plan tells."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from rmscope.report.formatting import duration
from rmscope.report.page import Page, render
from rmscope.report.result import Result, Rows

LISTED = 8
"""Changes that are shown."""


class StagePlan(BaseModel):
    """One stage. ``load`` stands for what is measured before the first stage."""

    stage: str
    flops: float
    seconds: float
    disk: float
    """Bytes that it writes."""
    memory: float
    """Bytes of one device, at its peak."""


class ChangePlan(BaseModel):
    """The same run with one change, or two."""

    change: str
    seconds: float
    memory: float
    fits: bool


class Plan(Result):
    """What a run would take. Every figure is an estimate (docs/howto/plan.md)."""

    model: str
    data: str
    pairs: int
    studied: int
    """Of the scored pairs, those whose features are studied."""
    tokens: float
    """Of one side of a pair, on average."""
    devices: str
    measured: bool
    """Whether the rates were measured on this machine; if not, they are those of a table of cards."""
    sites: list[str]
    sites_assumed: bool
    """Whether the run itself would choose the sites: those here are in the middle of the blocks that training changed."""
    features: list[int]
    """Of the SAEs of each site."""
    stages: list[StagePlan]
    seconds: float
    flops: float
    disk: float
    memory: float
    """Bytes of one device, in the stage that takes most."""
    model_memory: float
    """Bytes of the PM, and of what its base has of its own."""
    device_memory: float
    fits: bool
    best: ChangePlan | None
    """The change that makes it fit in the fewest device seconds, or, where it fits, shortens it most."""
    changes: list[ChangePlan]

    def summary(self) -> str:
        told = f"{self.model} on {self.pairs:,} pair{'s' * (self.pairs != 1)}, {self.devices}: about "
        told += f"{duration(self.seconds)}, {size(self.disk)} on disk, {size(self.memory)} of {size(self.device_memory)} of "
        told += "memory"
        if self.fits:
            return told + (f". With {self.best.change} it takes {duration(self.best.seconds)}." if self.best else ".")
        told += ". It does not fit"
        if self.model_memory > self.device_memory:
            told += f": the PM alone takes {size(self.model_memory)}, and rmscope cannot spread a PM over devices"
        if self.best is None:
            return f"{told}. No change that was tried makes it fit."
        return f"{told}. With {self.best.change} it fits, and takes {duration(self.best.seconds)}."

    def tables(self) -> dict[str, Rows]:
        stages = [*self.stages, StagePlan(stage="all", flops=self.flops, seconds=self.seconds, disk=self.disk,
                                          memory=self.memory)]  # fmt: skip
        where = f"{self.devices}, {'rates measured here' if self.measured else 'rates of a table'}"
        about = f"{self.studied:,} pairs studied at {', '.join(self.sites)}" + (" or the like" if self.sites_assumed else "")
        return {
            f"{where}; {about}": [
                {
                    "stage": s.stage, "TFLOP": f"{s.flops / 1e12:,.1f}", "time": duration(s.seconds),
                    "on disk": size(s.disk) if s.disk else "", "memory": size(s.memory),
                }
                for s in stages
            ],
            "With one change": [
                {
                    "change": c.change, "time": duration(c.seconds), "memory": size(c.memory),
                    "": "" if c.fits else "does not fit",
                }
                for c in self.changes[:LISTED]
            ],
        }  # fmt: skip

    def show(self) -> Page:
        """The page, inline in a notebook; it has no file before it is saved."""
        return Page(render("plan.html", data=self), Path("plan.html"))


def size(count: float) -> str:
    """Bytes in words."""
    for unit, name in ((1e12, "TB"), (1e9, "GB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count / 1e6:.3g} MB"

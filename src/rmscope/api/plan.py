"""The plan of a run as a function: what it would take, before anything is run."""

from __future__ import annotations

from typing import Any

from rmscope.io import Display
from rmscope.run.plan.plan import make_plan
from rmscope.run.plan.result import Plan
from rmscope.run.plan.settings import PlanConfig
from rmscope.settings import read_settings


def plan(config: PlanConfig | None = None, display: Display | None = None, **settings: Any) -> Plan:
    """FLOPs, time, disk and memory of each stage of a run, and what would shorten it. Settings: :class:`PlanConfig`.

    With ``devices`` ("8xH100") a PM's config.json is enough; without, this machine is timed. All figures are estimates
    (docs/howto/plan.md).
    """
    return make_plan(config or read_settings(PlanConfig, None, settings), display)

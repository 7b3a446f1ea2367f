"""Rewards of bad texts with phrases, computed from shared prefixes and counted.

Each text whose reward is computed is one evaluation; a gradient is one too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from rmscope.model.clean_run import CleanRun
from rmscope.model.reward_model import RewardModel
from rmscope.model.shared_prefix import rewards_from_prefix, run_from_prefix
from rmscope.statistics import Array
from rmscope.studies.jailbreak.placement import Layout
from rmscope.studies.jailbreak.targets import Target

SCREEN = 4
"""Targets on which every placement and every token replacement is tried first."""


@dataclass(frozen=True, slots=True)
class TracePoint:
    """The list of a search after one more phrase."""

    evaluations: int
    """Evaluations so far."""
    gain: float
    """Mean gain in reward over the bad texts alone."""
    success: float
    """Share of the targets on which it outranks the chosen answer."""


@dataclass
class Scorer:
    """Rewards of targets with phrases. A text is run from the token at which it diverges from the target's clean run."""

    rm: RewardModel
    targets: Sequence[Target]
    limit: int | None = None
    """Evaluations that may be spent; None for no limit."""
    spent: int = 0
    """Evaluations so far."""
    trace: list[TracePoint] = field(default_factory=list)
    _base: Layout = ()
    """The phrases in the clean runs."""
    _clean: dict[int, CleanRun] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """Evaluations that may still be spent."""
        return float("inf") if self.limit is None else self.limit - self.spent

    @property
    def chosen(self) -> Float[Array, " targets"]:
        """Rewards of the chosen answers."""
        return np.array([t.chosen for t in self.targets])

    def rewards(self, layouts: Sequence[Layout], which: Sequence[int] | None = None) -> Float[Array, "layouts targets"]:
        """Rewards on the targets ``which`` (default: all). The last layouts are dropped where the limit is reached."""
        at = range(len(self.targets)) if which is None else which
        if self.left < len(layouts) * len(at):
            layouts = layouts[: int(self.left) // len(at)]
        out = np.zeros((len(layouts), len(at)))
        for column, i in enumerate(at):
            ids = [self.targets[i].ids(self.rm, layout) for layout in layouts]
            out[:, column] = rewards_from_prefix(self.rm, self._clean_run(i), ids).numpy()
        self.spent += out.size
        return out

    def _clean_run(self, i: int) -> CleanRun | None:
        if not self.rm.capabilities.resume:
            return None
        if i not in self._clean:
            self._clean[i] = self.rm.prefill(self.targets[i].ids(self.rm, self._base), [])
        return self._clean[i]

    def move_to(self, layout: Layout) -> None:
        """Puts these phrases in the clean runs: texts with one phrase more share most of their tokens with them."""
        self._base = layout
        for i, before in self._clean.items():
            self._clean[i] = run_from_prefix(self.rm, before, self.targets[i].ids(self.rm, layout), [])

    def restart(self) -> None:
        """Takes all phrases out of the clean runs."""
        self._base, self._clean = (), {}

    def record(self, rewards: Float[Array, " targets"]) -> None:
        """Adds a point to the trace."""
        bad = np.array([t.reward for t in self.targets])
        gain, success = float((rewards - bad).mean()), float((rewards > self.chosen).mean())
        self.trace.append(TracePoint(self.spent, gain, success))

"""The PMs of a comparison, and their SAEs.

A comes with a finished run. B is another PM of the same width that reads texts as the same tokens, with or without a run of
its own, or a base without a scalar head, of which only the stream can be read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rmscope.errors import InputError
from rmscope.model.loading import is_base
from rmscope.model.reward_model import RewardModel
from rmscope.model.zoo import base_identity, load_base
from rmscope.run.inputs import load_pm
from rmscope.run.run import Run
from rmscope.run.settings import RECORD
from rmscope.sae.base import Sae
from rmscope.studies.edit.patch import is_patch, load_edited


def _no_tokens(_site: str, _feature: int) -> list[tuple[str, float]]:
    return []


@dataclass(frozen=True)
class ComparedModel:
    """One of the compared PMs. A PM without a run has no SAEs and no reported features."""

    rm: RewardModel
    name: str
    identity: str
    """Content hash of the weights."""
    base: bool = False
    """Whether it has no scalar head, so that its rewards mean nothing."""
    saes: Mapping[str, Sae] = field(default_factory=dict)
    reported: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """The reported features of each site, by rank."""
    top_tokens: Callable[[str, int], list[tuple[str, float]]] = _no_tokens
    """(site, feature) to the tokens on which the feature is most active, with their share of its activation."""

    @classmethod
    def of_run(cls, run: Run) -> ComparedModel:
        """The PM of a finished run, with its SAEs and reported features. InputError where the run is not finished."""
        reported = {site: run.reported(site)["feature"].to_list() for site in run.sites}
        name = f"{run.config.model} (run {run.folder.name})"
        return cls(run.rm, name, run.rm.identity, saes=run.saes, reported=reported, top_tokens=run.top_tokens)

    @classmethod
    def of_base(cls, source: str, like: RewardModel) -> ComparedModel:
        """The base ``source``, reading texts as ``like`` renders them."""
        model, tokenizer = load_base(base=source)
        rm = RewardModel(model.to(like.device, like.dtype), tokenizer, like.rendering, source)
        return cls(rm, source, base_identity(source), base=True)


@dataclass(frozen=True)
class Dictionary:
    """An SAE of A or of B with its reported features. It reads the streams of both PMs."""

    of: str
    """Whose it is: a or b."""
    site: str
    sae: Sae
    reported: list[int]

    @property
    def key(self) -> tuple[str, str]:
        return self.of, self.site


def dictionaries(a: ComparedModel, b: ComparedModel) -> list[Dictionary]:
    """A's SAEs, then B's, each by depth."""
    return [
        Dictionary(of, site, model.saes[site], list(model.reported.get(site, [])))
        for of, model in (("a", a), ("b", b))
        for site in sorted(model.saes, key=model.rm.site_index)
    ]


def open_other(run: Run, other: str) -> tuple[ComparedModel, Run | None]:
    """B as it is named: the model, and its run where it has one.

    ``other`` is a run folder, a base, a patch of the PM of ``run``, or a PM.
    """
    if (Path(other) / RECORD).is_file():
        second = Run.open(other, run.display)
        return ComparedModel.of_run(second), second
    if is_base(other):
        return ComparedModel.of_base(other, run.rm), None
    if is_patch(other):
        rm = load_edited(load_pm(run.config.model, run.config), other)
    else:
        rm = RewardModel.load(other, run.config.dtype, run.config.device)
    return ComparedModel(rm, rm.name, rm.identity), None


def open_control(run: Run, control: str, b: ComparedModel) -> ComparedModel:
    """The control, of which only the reward is read. InputError where it or B has no scalar head."""
    if b.base:
        raise InputError(
            f"{b.name} has no scalar head, so no effect in it can be held against a control; leave --control out."
        )
    model, _ = open_other(run, control)
    if model.base:
        raise InputError(f"The control {model.name} has no scalar head; name another PM of A's kind.")
    return replace(model, saes={}, reported={})


def check_match(a: ComparedModel, b: ComparedModel) -> None:
    """InputError where B cannot be compared with A: it has another width or rendering, or lacks a site."""
    if a.rm.d_model != b.rm.d_model:
        raise InputError(
            f"{b.name} has a stream of width {b.rm.d_model}, {a.name} one of {a.rm.d_model}, so no SAE reads both; "
            "name a PM of the same model."
        )
    for model, other in ((a, b), (b, a)):
        for site in model.saes:
            if model.rm.site_index(site) >= len(other.rm.blocks):
                raise InputError(
                    f"{other.name} has {len(other.rm.blocks)} blocks and no {site}, where {model.name} has an SAE; compare "
                    "runs whose sites both PMs have."
                )
    if a.rm.rendering != b.rm.rendering:
        raise InputError(
            f"{a.name} reads conversations as {a.rm.rendering.as_dict()}, {b.name} as {b.rm.rendering.as_dict()}, so they "
            "share no text; give one of them the other's rendering in rmscope.json."
        )

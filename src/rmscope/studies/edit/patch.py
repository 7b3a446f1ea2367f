"""A patch of a PM: named features are suppressed, clamped or damped at a site; the rest of the stream is kept.

    x'_t = x_t + Σ_j (f'_tj - f_tj) d_j        f' = 0 (suppress), c (clamp) or a f (damp)

Features are encoded once, from the unedited stream. The SAE's error stays. The edit applies to every token of a text but
the first, while ablation effects apply from the divergence of a pair on. A PM in use gets one text, so an edited reward
must depend on that text alone. It may depend neither on a second text nor on the batch. It may not depend on a turn's
header either: the author of a response can write a second header, and text before it would then escape the edit. On texts
whose features fire in the response alone, the two are the same. A patch is a small folder: ``edit.json`` and its SAEs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from rmscope.errors import InputError
from rmscope.io import atomic_folder, content_hash, write_json
from rmscope.model.edits import install
from rmscope.model.reward_model import RewardModel
from rmscope.model.sites import Edit
from rmscope.sae.base import Sae

Operation = Literal["suppress", "clamp", "damp"]
OPERATIONS: tuple[Operation, ...] = ("suppress", "clamp", "damp")
EDIT_FILE = "edit.json"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class FeatureEdit:
    """Features of one site, and what is done to them."""

    site: str
    features: tuple[int, ...]
    operation: Operation = "suppress"
    value: float = 0.0
    """clamp: f := value, at every token. damp: f := value f; below 0 this reverses the feature's effect."""

    @property
    def action(self) -> str:
        """The operation with its value, such as "damp -0.5"."""
        return self.operation if self.operation == "suppress" else f"{self.operation} {self.value:g}"


@dataclass(frozen=True)
class EditPatch:
    """Edits of one PM.

    Raises:
        InputError: an edit has no SAE, names a feature that its SAE does not have, or names a feature twice.
    """

    edits: tuple[FeatureEdit, ...]
    saes: Mapping[str, Sae]
    """The SAE of every edited site."""
    model: str
    """The PM's identity hash."""
    name: str = ""
    """The PM's name, for messages."""

    def __post_init__(self) -> None:
        seen: set[tuple[str, int]] = set()
        for edit in self.edits:
            _check(edit, self.saes)
            named = [(edit.site, j) for j in edit.features]
            if len(set(named)) < len(named) or seen & set(named):
                raise InputError(f"A feature of {edit.site} is named twice in one patch; name each feature once.")
            seen |= set(named)
        if not self.edits:
            raise InputError("The patch edits nothing; name some features.")

    @property
    def identity(self) -> str:
        """Content hash of the PM, the edits and the SAEs."""
        hashes = {site: sae.identity() for site, sae in sorted(self.saes.items())}
        return content_hash(self.model, [asdict(e) for e in self.edits], hashes)

    def callables(self) -> dict[str, Edit]:
        """The edit of each site, as a function of the stream [..., d]."""
        return {site: edit_at(sae, [e for e in self.edits if e.site == site]) for site, sae in self.saes.items()}

    def save(self, folder: Path | str) -> None:
        """Writes ``edit.json`` and ``saes/SITE``. The write is atomic: a kill leaves no half folder."""
        record = {
            "format": FORMAT,
            "model": {"name": self.name, "identity": self.model},
            "edits": [asdict(e) for e in self.edits],
            "saes": {site: sae.identity() for site, sae in self.saes.items()},
        }
        with atomic_folder(Path(folder)) as target:
            for site, sae in self.saes.items():
                sae.save(target / "saes" / site)
            write_json(target / EDIT_FILE, record)

    @classmethod
    def load(cls, folder: Path | str) -> EditPatch:
        """Opens a patch.

        Raises:
            InputError: the folder holds no patch, or one of its SAEs has changed since the patch was saved.
        """
        path = Path(folder) / EDIT_FILE
        if not path.is_file():
            raise InputError(f"{folder} is no patch (it holds no {EDIT_FILE}); make one with rmscope edit.")
        try:
            record = json.loads(path.read_text("utf-8"))
            edits = tuple(FeatureEdit(**{**row, "features": tuple(row["features"])}) for row in record["edits"])
            hashes, model = dict(record["saes"]), record["model"]
            patch = cls(edits, {s: Sae.load(Path(folder) / "saes" / s) for s in hashes}, model["identity"], model["name"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} cannot be read as a patch ({error}); make it again with rmscope edit.") from error
        for site, sae in patch.saes.items():
            if sae.identity() != hashes[site]:
                raise InputError(
                    f"The SAE of {site} in {folder} was changed after the patch was saved; make the patch again."
                )
        return patch


def is_patch(folder: Path | str) -> bool:
    """Whether the folder holds a patch."""
    return (Path(folder) / EDIT_FILE).is_file()


def edit_at(sae: Sae, edits: Sequence[FeatureEdit]) -> Edit:
    """The edits of one site as a differentiable function of the stream [..., d]."""
    features = torch.tensor([j for e in edits for j in e.features])
    kept = torch.tensor([e.value if e.operation == "damp" else 0.0 for e in edits for _ in e.features])
    added = torch.tensor([e.value if e.operation == "clamp" else 0.0 for e in edits for _ in e.features])

    def edit(x: Tensor) -> Tensor:
        if sae.W_dec.device != x.device:
            sae.to(x.device)
        f = sae.encode(x)[..., features.to(x.device)]
        change = (f * (kept - 1).to(x.device) + added.to(x.device)) @ sae.W_dec[features.to(x.device)]
        return x + change.to(x.dtype)

    return edit


def load_edited(model: str | RewardModel, patch: EditPatch | str | Path) -> RewardModel:
    """A PM with a patch: every reward it gives is the edited one. A given :class:`RewardModel` is edited in place.

    Raises:
        InputError: the patch was made for another PM, or edits ``embed``.
    """
    patch = patch if isinstance(patch, EditPatch) else EditPatch.load(patch)
    rm = RewardModel.load(model) if isinstance(model, str) else model
    if rm.identity != patch.model:
        raise InputError(
            f"The patch was made for another PM ({patch.name}, {patch.model}), not for {rm.name} ({rm.identity}); "
            "name that PM, or make a patch for this one."
        )
    for site, sae in patch.saes.items():
        sae.check_width(rm.d_model, rm.name)
        if rm.site_index(site) < 0:
            raise InputError(
                "Edits at embed are not supported, because models process the embedding in different ways; "
                "name a site resid_post.L."
            )
    install(rm.model.base_model, rm.blocks, {rm.site_index(site): edit for site, edit in patch.callables().items()})
    rm.identity = content_hash(rm.identity, patch.identity)
    rm.name = f"{rm.name}, edited"
    return rm


def _check(edit: FeatureEdit, saes: Mapping[str, Sae]) -> None:
    if edit.operation not in OPERATIONS:
        raise InputError(f"There is no operation {edit.operation}; use {', '.join(OPERATIONS)}.")
    if not math.isfinite(edit.value):
        raise InputError(f"{edit.operation} {edit.value} is no number; give a finite value.")
    if edit.site not in saes:
        raise InputError(f"The patch edits {edit.site} but has no SAE for it; give the SAE of that site.")
    wrong = [j for j in edit.features if not 0 <= j < saes[edit.site].m]
    if wrong or not edit.features:
        named = f"the feature {wrong[0]}" if wrong else "no feature"
        raise InputError(f"The edit at {edit.site} names {named}; its SAE has features 0 to {saes[edit.site].m - 1}.")

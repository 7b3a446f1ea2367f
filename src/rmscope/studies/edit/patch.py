"""A patch of a PM: named features are suppressed, clamped or damped at a site; the rest of the stream is kept.

    x'_t = x_t + Σ_j (f'_tj - f_tj) d_j        f' = 0 (suppress), c (clamp) or a f (damp)

Features are encoded once, from the unedited stream. The SAE's error stays. The edit applies to every token of a text but
the first. Ablation effects apply from the divergence of a pair on; the two are the same where features fire in the response
alone. A PM in use gets one text, so its reward may depend neither on a second text nor on the batch. Nor may the edit begin
at a turn's header: the author of a response can write a second one, and text before it would then escape the edit.

An exported patch is a folder that plain transformers opens. No plain weights can express an edit, since it depends on the
stream. The folder therefore contains code, and its config names a model type of its own: without ``trust_remote_code=True``
transformers refuses to load it, rather than load the unedited PM silently.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from rmscope.errors import InputError
from rmscope.io import atomic_folder, content_hash, local_path, write_json, write_text
from rmscope.model import edits as model_edits
from rmscope.model.base import edit_of_part, split_stream
from rmscope.model.rendering import SETTINGS_FILE
from rmscope.model.reward_model import RewardModel
from rmscope.model.site_names import needs_base
from rmscope.model.sites import Edit
from rmscope.sae.base import Sae
from rmscope.sae.joint import load_site
from rmscope.studies.edit import modeling

Operation = Literal["suppress", "clamp", "damp"]
EDIT_FILE, FORMAT = "edit.json", 1
REMOTE = "modeling_rmscope"
EXPORT_FILE = f"{REMOTE}.py"
"""The file that marks an exported folder."""
CARD = """# {name}

{model}, with features edited by rmscope: {edits}.

The edit is code: `{remote}.py` and `edits.py` run when the model is loaded. transformers asks for your trust first.

```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

The PM expects texts rendered in this way: {rendering}.
"""


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

    @property
    def terms(self) -> tuple[float, float]:
        """(kept, added), with f' = kept f + added."""
        return {"suppress": (0.0, 0.0), "clamp": (0.0, self.value), "damp": (self.value, 0.0)}[self.operation]


@dataclass(frozen=True)
class EditPatch:
    """Edits of the PM of identity ``model`` and name ``name``, with the SAE of every edited site. InputError where an edit
    has no SAE, or names a feature twice or one that its SAE does not have."""

    edits: tuple[FeatureEdit, ...]
    saes: Mapping[str, Sae]
    model: str
    name: str = ""

    def __post_init__(self) -> None:
        for e in self.edits:
            if e.operation not in get_args(Operation):
                raise InputError(f"There is no operation {e.operation}; use {', '.join(get_args(Operation))}.")
            if not math.isfinite(e.value):
                raise InputError(f"{e.operation} {e.value} is no number; give a finite value.")
            if e.site not in self.saes:
                raise InputError(f"The patch edits {e.site} but has no SAE for it; give the SAE of that site.")
            last = self.saes[e.site].m - 1
            if (wrong := [j for j in e.features if not 0 <= j <= last]) or not e.features:
                named = f"the feature {wrong[0]}" if wrong else "no feature"
                raise InputError(f"The edit at {e.site} names {named}; its SAE has features 0 to {last}.")
        named_features = Counter((e.site, j) for e in self.edits for j in e.features)
        if twice := [site for (site, _), n in named_features.items() if n > 1]:
            raise InputError(f"A feature of {twice[0]} is named twice in one patch; name each feature once.")
        if not self.edits:
            raise InputError("The patch edits nothing; name some features.")

    def record(self) -> dict[str, Any]:
        """What ``edit.json`` holds."""
        edits, saes = [asdict(e) for e in self.edits], {site: sae.identity() for site, sae in self.saes.items()}
        return {"format": FORMAT, "model": {"name": self.name, "identity": self.model}, "edits": edits, "saes": saes}

    @property
    def identity(self) -> str:
        """Content hash of the PM, the edits and the SAEs."""
        record = self.record()
        return content_hash(self.model, record["edits"], record["saes"])

    def save(self, folder: Path | str) -> None:
        """Writes the patch, ``edit.json`` and ``saes/SITE``. The write is atomic: a kill leaves no half folder."""
        with atomic_folder(Path(folder), EDIT_FILE) as target:
            for site, sae in self.saes.items():
                sae.save(target / "saes" / site)
            write_json(target / EDIT_FILE, self.record())

    @classmethod
    def load(cls, folder: Path | str) -> EditPatch:
        """Opens a patch. InputError where there is none, or one of its SAEs has changed since the patch was saved."""
        path = local_path(folder) / EDIT_FILE
        if not is_patch(folder):
            raise InputError(f"{folder} is no patch (it holds no {EDIT_FILE}); make one with rmscope edit.")
        try:
            record = json.loads(path.read_text("utf-8"))
            edits = tuple(FeatureEdit(**{**row, "features": tuple(row["features"])}) for row in record["edits"])
            hashes, model = dict(record["saes"]), record["model"]
            patch = cls(edits, {s: load_site(path.parent / "saes", s) for s in hashes}, model["identity"], model["name"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} cannot be read as a patch ({error}); make it again with rmscope edit.") from error
        if changed := [site for site, identity in patch.record()["saes"].items() if identity != hashes[site]]:
            raise InputError(f"The SAE of {changed[0]} in {folder} was changed after the patch was saved; make it again.")
        return patch


def is_patch(folder: Path | str) -> bool:
    """Whether the folder holds a patch."""
    return (local_path(folder) / EDIT_FILE).is_file()


def edit_at(sae: Sae, edits: Sequence[FeatureEdit]) -> Edit:
    """The edits of one site as a differentiable function of the stream [..., d]."""
    features = torch.tensor([j for e in edits for j in e.features])
    kept, added = torch.tensor([e.terms for e in edits for _ in e.features]).unbind(1)

    def edit(x: Tensor) -> Tensor:
        if sae.W_dec.device != x.device:
            sae.to(x.device)
        f = sae.encode(x)[..., features.to(x.device)]
        change = (f * (kept - 1).to(x.device) + added.to(x.device)) @ sae.W_dec[features.to(x.device)]
        return x + change.to(x.dtype)

    return edit


def edits_by_site(saes: Mapping[str, Sae], edits: Sequence[FeatureEdit]) -> dict[str, Edit]:
    """The edits of each site as a function of the stream [..., d]."""
    return {site: edit_at(saes[site], [e for e in edits if e.site == site]) for site in dict.fromkeys(e.site for e in edits)}


def _edit_part(site: str, edit: Edit, x: Tensor, b: Tensor) -> Tensor:
    """The stream x with a part of it edited; b is the base's stream."""
    return edit_of_part(site, edit, split_stream(site, x, b)[1])(x)


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
            raise InputError("Edits at embed are not supported: models process it in different ways; name a resid_post.L.")
    edits = edits_by_site(patch.saes, patch.edits)
    whole = {rm.site_index(site): edit for site, edit in edits.items() if not needs_base(site)}
    parts = {rm.site_index(site): partial(_edit_part, site, edit) for site, edit in edits.items() if needs_base(site)}
    if whole:
        model_edits.install(rm.model.base_model, rm.blocks, whole)
    if parts and (base := rm.base) is not None:
        if base.embeddings_differ:
            raise InputError(
                f"A patch cannot edit what training wrote in {rm.name}: its embeddings were trained too, so its base would "
                "have to run beside it from the start; edit features of the whole stream (--base none)."
            )
        others = {i: base.blocks[i] for i in range(base.first, max(parts) + 1)}
        model_edits.install_beside_base(rm.model.base_model, rm.blocks, others, parts)
        rm.__dict__.pop("capabilities", None)  # runs cannot be resumed any more: measured anew on first use
    rm.identity = content_hash(rm.identity, patch.identity)
    rm.name = f"{rm.name}, edited"
    return rm


def export_patch(rm: RewardModel, patch: EditPatch, folder: Path | str) -> None:
    """Writes the folder. InputError where the patch is of another PM than ``rm``, or its class is not of transformers."""
    if rm.identity != patch.model:
        raise InputError(f"The patch was made for another PM ({patch.name}), not for {rm.name}; name that PM.")
    config_class, model_class = type(rm.model.config).__name__, type(rm.model).__name__
    if not (hasattr(transformers, config_class) and hasattr(transformers, model_class)):
        raise InputError(f"{rm.name} is a {model_class}, no class of transformers; only its classes can be exported.")
    if parts := [site for site in patch.saes if needs_base(site)]:
        raise InputError(
            f"A patch of {parts[0]} cannot be exported: the folder would have to hold the PM's base too; load the patch "
            "with rs.load_edited, or make a run with --base none and edit features of the whole stream."
        )
    rows, weights = [], dict[str, Tensor]()
    for site in patch.saes:
        row, own = _site(patch, site, rm.site_index(site))
        rows.append(row)
        weights |= {f"edit_{row['layer']}.{name}": w.detach().float().cpu().contiguous() for name, w in own.items()}
    classes = {"AutoConfig": "EditedConfig", "AutoModelForSequenceClassification": modeling.NAME}
    config = {
        "model_type": modeling.MODEL_TYPE,
        "architectures": [modeling.NAME],
        "auto_map": {auto: f"{REMOTE}.{name}" for auto, name in classes.items()},
        "rmscope_edits": rows,
    }
    code = Path(modeling.__file__).read_text("utf-8").replace("from rmscope.model.edits", "from .edits")
    code += f'\n\nEditedConfig, {modeling.NAME} = edited_classes("{config_class}", "{model_class}")\n'
    edits_in_words = "; ".join(f"{e.action} features {', '.join(map(str, e.features))} at {e.site}" for e in patch.edits)
    rendering = f"{rm.rendering.style}{', eos appended' if rm.rendering.append_eos else ''}"
    card = CARD.format(name=Path(folder).name, model=rm.name, edits=edits_in_words, remote=REMOTE, rendering=rendering)
    with atomic_folder(Path(folder), EXPORT_FILE) as target:
        rm.model.save_pretrained(target, max_shard_size="1000GB")
        rm.tokenizer.save_pretrained(target)
        held = load_file(target / "model.safetensors")
        save_file({**held, **weights}, target / "model.safetensors", {"format": "pt"})
        write_json(target / "config.json", rm.model.config.to_dict() | config)
        write_json(target / SETTINGS_FILE, {"rendering": rm.rendering.as_dict()})
        write_text(target / EXPORT_FILE, code)
        write_text(target / "edits.py", Path(model_edits.__file__).read_text("utf-8"))
        write_text(target / "README.md", card)


def _site(patch: EditPatch, site: str, layer: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The arguments of a site's :class:`modeling.SiteEdit`, and its weights. In a top-k encoder features compete, so all of
    them are exported; of other encoders only the edited features."""
    sae, edits_here = patch.saes[site], [e for e in patch.edits if e.site == site]
    features, terms = [j for e in edits_here for j in e.features], [e.terms for e in edits_here for _ in e.features]
    columns = torch.arange(sae.m) if sae.architecture == "topk" else torch.tensor(features)
    row = {
        "layer": layer, "kind": sae.architecture, "k": sae.cfg.get("k"), "width": len(columns),
        "features": features if sae.architecture == "topk" else list(range(len(features))),
        "kept": [kept for kept, _ in terms], "added": [added for _, added in terms],
    }  # fmt: skip
    per_feature = {name: getattr(sae, name)[columns] for name in modeling.PER_FEATURE[sae.architecture]}
    return row, {"W_enc": sae.W_enc[:, columns], "W_dec": sae.W_dec[features], "b_dec": sae.b_dec, **per_feature}

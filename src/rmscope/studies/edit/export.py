"""A patched PM as a folder that plain transformers opens: the PM's weights, the patch's weights, and a modelling file.

An edit depends on the stream, so no plain weights can express it. The folder therefore contains code, which transformers
runs only with ``trust_remote_code=True``. Its config names a model type of its own, so that transformers refuses to load
the folder without that trust. Otherwise it would load the unedited PM silently.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rmscope.errors import InputError
from rmscope.io import atomic_folder, write_json, write_text
from rmscope.model import edits
from rmscope.model.rendering import SETTINGS_FILE
from rmscope.model.reward_model import RewardModel
from rmscope.sae.base import Sae
from rmscope.studies.edit import modeling
from rmscope.studies.edit.patch import EditPatch

REMOTE = "modeling_rmscope"
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


def export(rm: RewardModel, patch: EditPatch, folder: Path | str) -> None:
    """Writes the folder. ``rm`` is the unedited PM.

    Raises:
        InputError: the patch was made for another PM, or the PM's class is not part of transformers.
    """
    import transformers

    folder = Path(folder)
    if rm.identity != patch.model:
        raise InputError(f"The patch was made for another PM ({patch.name}), not for {rm.name}; name that PM.")
    kinds = (type(rm.model.config).__name__, type(rm.model).__name__)
    if not all(hasattr(transformers, kind) for kind in kinds):
        raise InputError(
            f"{rm.name} is a {kinds[1]}, no class of transformers; only patches of its classes can be exported."
        )
    rows, weights = [], dict[str, Tensor]()
    for site, sae in patch.saes.items():
        row, own = _site(patch, site, sae, rm.site_index(site))
        rows.append(row)
        weights |= {f"edit_{row['layer']}.{name}": w.detach().float().cpu().contiguous() for name, w in own.items()}
    with atomic_folder(folder) as target:
        rm.model.save_pretrained(target, max_shard_size="1000GB")
        rm.tokenizer.save_pretrained(target)
        held = load_file(target / "model.safetensors")
        save_file({**held, **weights}, target / "model.safetensors", {"format": "pt"})
        write_json(target / "config.json", _config(rm, rows))
        write_json(target / SETTINGS_FILE, {"rendering": rm.rendering.as_dict()})
        write_text(target / f"{REMOTE}.py", _code(kinds))
        write_text(target / "edits.py", Path(edits.__file__).read_text("utf-8"))
        write_text(target / "README.md", _card(rm, patch, folder.name))


def _site(patch: EditPatch, site: str, sae: Sae, layer: int) -> tuple[modeling.SiteRow, dict[str, Tensor]]:
    """The config row of a site, and its weights. In a top-k encoder features compete, so all of them are exported; of other
    encoders only the edited features."""
    edits_here = [e for e in patch.edits if e.site == site]
    features = [j for e in edits_here for j in e.features]
    columns = torch.arange(sae.m) if sae.architecture == "topk" else torch.tensor(features)
    row: modeling.SiteRow = {
        "layer": layer, "kind": sae.architecture, "k": sae.cfg.get("k"), "width": len(columns),
        "features": features if sae.architecture == "topk" else list(range(len(features))),
        "kept": [e.value if e.operation == "damp" else 0.0 for e in edits_here for _ in e.features],
        "added": [e.value if e.operation == "clamp" else 0.0 for e in edits_here for _ in e.features],
    }  # fmt: skip
    per_feature = {name: getattr(sae, name)[columns] for name in modeling.PER_FEATURE[sae.architecture]}
    matrices = {"W_enc": sae.W_enc[:, columns], "W_dec": sae.W_dec[features], "b_dec": sae.b_dec}
    return row, {**matrices, **per_feature}


def _config(rm: RewardModel, rows: list[modeling.SiteRow]) -> dict[str, Any]:
    """The PM's config.json with the edits; transformers' own keys, so its shape is not ours."""
    config: dict[str, Any] = rm.model.config.to_dict()
    return config | {
        "model_type": modeling.MODEL_TYPE,
        "architectures": [modeling.NAME],
        "auto_map": {
            "AutoConfig": f"{REMOTE}.EditedConfig",
            "AutoModelForSequenceClassification": f"{REMOTE}.{modeling.NAME}",
        },
        "rmscope_edits": rows,
    }


def _code(kinds: tuple[str, str]) -> str:
    """The modelling file as it runs without rmscope."""
    text = Path(modeling.__file__).read_text("utf-8").replace("from rmscope.model.edits", "from .edits")
    return f'{text}\n\nEditedConfig, {modeling.NAME} = edited_classes("{kinds[0]}", "{kinds[1]}")\n'


def _card(rm: RewardModel, patch: EditPatch, name: str) -> str:
    told = "; ".join(f"{e.action} features {', '.join(map(str, e.features))} at {e.site}" for e in patch.edits)
    eos = ", eos appended" if rm.rendering.append_eos else ""
    return CARD.format(name=name, model=rm.name, edits=told, remote=REMOTE, rendering=f"{rm.rendering.style}{eos}")

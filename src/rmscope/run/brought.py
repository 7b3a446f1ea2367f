"""SAEs that the settings bring from elsewhere: of which model they are, and whether they fit the run's own stream."""

from __future__ import annotations

from dataclasses import asdict

import torch

from rmscope.io import write_json
from rmscope.model.checks import verdict
from rmscope.model.loading import base_name
from rmscope.model.reward_model import NO_BASE
from rmscope.run.data import RunData
from rmscope.sae.base import Sae
from rmscope.sae.fit import MEND, ROWS, measure_fit, same_model

FILE = "saes/fit.json"
"""The result, one check per brought SAE; the report shows it with the checks of the PM."""


def check_brought(run: RunData) -> None:
    """Tries every brought SAE on rows of the run's store, notes what does not fit, and stores the checks."""
    (run.folder / FILE).unlink(missing_ok=True)
    checks = []
    for part, sae in run.brought_saes.items():
        sae.encode_on(run.rm.device)
        fit = measure_fit(sae, run.store.sample(part, ROWS, torch.Generator().manual_seed(0)))
        told = [*fit.doubts(), *_other_model(run, sae)]
        checks.append(verdict(f"SAE at {part}", not told, "; ".join([*told, fit.figures()]), MEND))
        if told:
            run.display.note("; ".join(filter(None, (f"{checks[-1].check}: {checks[-1].detail}", checks[-1].mend))) + ".")
    if checks:
        write_json(run.folder / FILE, [asdict(check) for check in checks])


def _other_model(run: RunData, sae: Sae) -> list[str]:
    """In words that its card names another model than the PM and its base."""
    stated, config = sae.metadata.get("model_name"), run.config
    if not isinstance(stated, str) or same_model(stated, [run.rm.name, run.rm.identity]):  # our own SAEs state the identity
        return []
    base = config.base or base_name(config.model, config.adapter, config.revision)
    known = [run.rm.name, *([base] if base and base != NO_BASE else [])]
    if same_model(stated, known):
        return []
    return [f"it was trained on {stated}, and this is {' on '.join(known)}"]

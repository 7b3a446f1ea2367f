"""Opens a folder that we saved with SAELens itself, and compares: saelens_open.py SAE_DIR CASE.safetensors

To be run by the python of an environment that holds SAELens. CASE holds x [n, d], f [n, m] and x_hat [n, d] as we computed
them. Prints a JSON line with the relative differences of the features and the reconstructions.
"""

from __future__ import annotations

import json
import sys

import torch
from sae_lens import SAE
from safetensors.torch import load_file


@torch.no_grad()
def main(folder: str, case: str) -> None:
    sae, given = SAE.load_from_disk(folder, device="cpu"), load_file(case)
    f = sae.encode(given["x"])
    x_hat = sae.decode(f)
    row = {"architecture": sae.cfg.architecture(), "hook_name": sae.cfg.metadata.hook_name}
    for name, found in (("f", f), ("x_hat", x_hat)):
        row[name] = float((found - given[name]).norm() / given[name].norm())
    print(json.dumps(row))


if __name__ == "__main__":
    main(*sys.argv[1:])

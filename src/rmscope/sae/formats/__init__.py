"""Files of SAEs, one module per source. :func:`read_sae` finds the layout, hands its files to the reader, and refuses an SAE
of which the reader did not use every tensor and every setting. Nothing is ever unpickled.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rmscope.errors import InputError
from rmscope.io import local_path
from rmscope.sae.formats import dictionary_learning, gemma_scope, goodfire, openmoss, qwen_scope, saelens, sparsify
from rmscope.sae.formats.source import HUB, Source, fetch_from_hub
from rmscope.sae.formats.stored import StoredSae

Reader = Callable[[Source], StoredSae]


@dataclass(frozen=True)
class Layout:
    """The files of a source within an SAE's folder, and what reads them."""

    name: str
    weights: str
    settings: str
    """The settings file."""
    read: Reader
    needs_settings: bool = True


LAYOUTS = (
    Layout("an SAE of SAELens", saelens.WEIGHTS, saelens.CFG, saelens.read_saelens),
    Layout(openmoss.WHAT, saelens.WEIGHTS, "config.json", openmoss.read_openmoss),
    Layout(sparsify.WHAT, "sae.safetensors", saelens.CFG, sparsify.read_sparsify),
    Layout(
        "an SAE of dictionary_learning", "ae.pt", "config.json", dictionary_learning.read_dictionary_learning,
        needs_settings=False,
    ),
    Layout("an SAE of Gemma Scope", "params.npz", "config.json", gemma_scope.read_gemma_scope, needs_settings=False),
    Layout("an SAE of Gemma Scope", "params.safetensors", "config.json", gemma_scope.read_gemma_scope, needs_settings=False),
    *(
        Layout(openmoss.WHAT, f"checkpoints/{name}.safetensors", settings, openmoss.read_openmoss)
        for settings in (openmoss.HYPERPARAMS, "config.json")
        for name in ("pruned", "final")
    ),
)  # fmt: skip
"""In the order in which they are looked for; where two share a file of weights, the settings that are there decide."""
FILES = list(dict.fromkeys(name for layout in LAYOUTS for name in (layout.settings, layout.weights)))
"""Files in the folders of the tools. The name of one of them may be given in place of its folder."""
WEIGHT_FILES = (".pt", ".pth", ".npz", ".safetensors")


def read_sae(source: Path | str) -> StoredSae:
    """Reads a folder or file in any known format; ``hub:owner/repo/path`` is fetched from the Hugging Face hub first.

    Raises InputError: nothing there, an unknown layout, a tensor or a setting that the layout's reader does not know, an
    unsupported convention, contradicting shapes, values that are not finite, a hook that is no site, or a pickle that holds
    more than tensors.
    """
    from_hub = isinstance(source, str) and source.startswith(HUB)
    place = fetch_from_hub(str(source), FILES) if from_hub else local_path(source)
    layout, files = _files_of(place)
    stored = layout.read(files)
    files.close(layout.name)
    return stored


def _files_of(place: Path) -> tuple[Layout, Source]:
    """The layout at a folder or file, and its opened files."""
    named = next((name for name in FILES if place.parts[-len(Path(name).parts) :] == Path(name).parts), None)
    named = None if place.is_dir() else named
    folder = place.parents[len(Path(named).parts) - 1] if named else place
    asked = [layout for layout in LAYOUTS if named in (None, layout.settings, layout.weights)]
    present = [layout for layout in asked if (folder / layout.weights).is_file()]
    complete = [layout for layout in present if (folder / layout.settings).is_file()]
    if present:
        layout = (complete or present)[0]
        has_settings = layout.needs_settings or bool(complete)
        return layout, Source.open(folder / layout.weights, folder / layout.settings if has_settings else None)
    inside = sorted(p for p in folder.iterdir() if p.suffix in WEIGHT_FILES) if folder.is_dir() else [place]
    if len(inside) == 1 and inside[0].is_file():
        files = Source.open(inside[0], None)
        return _layout_of_file(files), files
    raise InputError(
        f"There is no SAE at {place}; expected a folder with cfg.json and sae_weights.safetensors, ae.pt and config.json, "
        "sae.safetensors, params.npz, or hyperparams.json and checkpoints/, or a file of weights (from the hub: "
        "hub:owner/repo/path)."
    )


def _layout_of_file(files: Source) -> Layout:
    """What reads a file of weights that stands alone, from its name and its tensors."""
    name, read = "an SAE of dictionary_learning", dictionary_learning.read_dictionary_learning
    if qwen_scope.FILE.fullmatch(files.path.name):
        name, read = qwen_scope.WHAT, qwen_scope.read_qwen_scope
    elif files.path.suffix == ".npz":
        name, read = "an SAE of Gemma Scope", gemma_scope.read_gemma_scope
    elif "encoder_linear.weight" in files.weights:
        name, read = goodfire.WHAT, goodfire.read_goodfire
    return Layout(name, files.path.name, "", read, needs_settings=False)


def sae_source(saes: Path | str, site: str) -> str:
    """The source of a site's SAE: ``saes`` with {site} and {L}, the block's number, filled in.

    Without either, ``saes`` is a folder (or hub:owner/repo) with one subfolder per site. Raises InputError where there is
    another name in braces, or {L} is used for ``embed``, which has no block.
    """
    pattern, layer = str(saes), site.partition(".")[2]
    names = set(re.findall(r"\{([^}]*)\}", pattern))
    if unknown := sorted(names - {"site", "L"}):
        raise InputError(
            f"The SAEs {pattern} name {{{unknown[0]}}}, which is not known; use {{site}} or {{L}}, the block's number."
        )
    if "L" in names and not layer:
        raise InputError(f"The SAEs {pattern} are named by their block, but the site {site} is none; use {{site}}.")
    return pattern.replace("{site}", site).replace("{L}", layer) if names else f"{pattern}/{site}"

"""Names of sites, and the hooks of other tools that are sites: ``resid_post.L`` is the whole stream after block L.

Where the PM's base is known, ``diff.L`` and ``base.L`` are its two parts, and ``both.L`` is the two side by side.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

DIFF, BASE, BOTH = "diff", "base", "both"
MODULE = re.compile(
    r"(?P<path>(?:\w+\.)*)(?:layers|layer|h|blocks)[.\[](?P<block>\d+)\]?(?:\.(?P<end>input|output)(?:\.0|\[0\])?)?"
)
"""A block as transformers and nnsight name it: model.layers.4, transformer.h.4, model.model.layers[4].output[0]."""
TRANSFORMER_LENS = re.compile(r"blocks\.(?P<block>\d+)\.hook_(?P<kind>resid_post|resid_pre|out|in|diff|base)")
"""TransformerLens 2 has hook_resid_pre and hook_resid_post, its bridges hook_in and hook_out. The last two are our own."""
OTHER_TOWERS = ("vision", "visual", "image", "audio", "speech")


def kind_of(site: str) -> str:
    """``diff`` for ``diff.12``."""
    return site.partition(".")[0]


def needs_base(site: str) -> bool:
    """Whether a site exists only beside the PM's base: ``diff.L``, ``base.L`` or ``both.L``."""
    return kind_of(site) in (DIFF, BASE, BOTH)


def is_difference(site: str) -> bool:
    """Whether a site is what preference training wrote."""
    return kind_of(site) == DIFF


def whole_site(site: str) -> str:
    """The site of the whole stream: resid_post.12 for diff.12, base.12 and both.12, and every other site itself."""
    return f"resid_post.{site.partition('.')[2]}" if needs_base(site) else site


def parts_of(site: str) -> list[str]:
    """diff.12 and base.12 for both.12; every other site itself. SAEs and stored activations are of these."""
    block = site.partition(".")[2]
    return [f"{DIFF}.{block}", f"{BASE}.{block}"] if kind_of(site) == BOTH else [site]


def all_parts(sites: Iterable[str]) -> list[str]:
    """The parts of all sites, each once."""
    return list(dict.fromkeys(part for site in sites for part in parts_of(site)))


def same_stream(site: str, other: str) -> bool:
    """Whether an SAE of one site reads the stream of the other: a base model's own stream is ``base.L`` of its PM."""
    whole = {s if is_difference(s) else whole_site(s) for s in (site, other)}
    return len(whole) == 1


def hook_name(site: str) -> str:
    """``resid_post.6`` as ``blocks.6.hook_resid_post``, ``embed`` as ``hook_embed``."""
    kind, _, layer = site.partition(".")
    return f"blocks.{layer}.hook_{kind}" if layer else f"hook_{kind}"


def site_of_hook(hook: str) -> str | None:
    """The site that a hook of TransformerLens, or a module of transformers or nnsight, names; None where it is none.

    What goes into block L is the stream after the block before it, and ``embed`` for the first block.
    """
    if hook == "hook_embed":
        return "embed"
    if named := TRANSFORMER_LENS.fullmatch(hook):
        kind, block = named["kind"], int(named["block"])
        if kind in (DIFF, BASE):
            return f"{kind}.{block}"
        return _stream_at(block, before=kind in ("resid_pre", "in"))
    module = MODULE.fullmatch(hook)
    if module is None or any(tower in module["path"] for tower in OTHER_TOWERS):
        return None
    return _stream_at(int(module["block"]), before=module["end"] == "input")


def _stream_at(block: int, before: bool) -> str:
    after = block - 1 if before else block
    return f"resid_post.{after}" if after >= 0 else "embed"

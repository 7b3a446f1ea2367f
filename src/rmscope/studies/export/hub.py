"""A folder for a hub repo: the SAEs in SAELens' layout, and a model card with how they were trained and their figures.

Texts from models and data are escaped in the card. Paths of this machine are not in it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from rmscope.io import write_text
from rmscope.model.site_names import all_parts, is_difference, kind_of
from rmscope.report import formatting
from rmscope.report.page import is_reported, shown_effect
from rmscope.run.evidence import SaeEvidence, SiteEvidence
from rmscope.run.run import Run
from rmscope.statistics import Figure
from rmscope.studies.export.settings import ExportConfig
from rmscope.studies.export.texts import markdown, public_name
from rmscope.studies.label.names import NamedConcept

CARD = "README.md"
UNKNOWN = "unknown"
TAGS = ["rmscope", "sparse-autoencoder", "reward-model", "interpretability"]
KINDS = {
    "diff": "`diff.L`: what preference training wrote, the stream after block L minus that of the base on the same tokens",
    "base": "`base.L`: the base's stream after block L",
    "resid_post": "`resid_post.L`: the preference model's stream after block L",
    "embed": "`embed`: the embeddings",
}
"""What an SAE of each kind of site reads."""


def export_hub(run: Run, config: ExportConfig, concepts: Sequence[NamedConcept], folder: Path) -> None:
    """Writes every SAE of the run, and the card, to ``folder``."""
    for site in run.sites:
        sae = run.sae(site)
        if "config" in (made := sae.metadata.get("rmscope", {})):
            sae.metadata = {**sae.metadata, "rmscope": {**made, "config": _public_settings(made["config"])}}
        sae.save(folder / site)
    write_text(folder / CARD, card(run, config, concepts))


def card(run: Run, config: ExportConfig, concepts: Sequence[NamedConcept]) -> str:
    """The model card."""
    evidence, parts = run.evidence, all_parts(run.sites)
    kinds = dict.fromkeys(kind_of(part) for part in parts)
    return (
        files(__package__)
        .joinpath("card.md")
        .read_text("utf-8")
        .format(
            front=_front(run, config),
            model=markdown(public_name(run.config.model)),
            data=markdown(public_name(run.config.data)),
            licence=f"Licence: {config.licence}." if config.licence != UNKNOWN else "Their licence is not stated.",
            first=parts[0],
            kinds="\n".join(f"- {KINDS[kind]}" for kind in kinds),
            saes=_table(
                ("SAE", "family", "features", "k", "FVU", "L0", "dead", "training tokens"),
                [_sae_row(sae) for site in evidence.sites for sae in site.saes],
            ),
            explained=_explained(run),
            origin=_origin(run, parts),
            settings=yaml.safe_dump(
                _public_settings(run.config.sae.model_dump(mode="json", exclude_none=True)), sort_keys=False
            ),
            concepts=_table(
                ("concept", "named", "site", "mean effect", "q"), [_concept_row(c) for c in concepts if is_reported(c.row)]
            ),
        )
    )


def _front(run: Run, config: ExportConfig) -> str:
    """The card's front matter, which the hub reads."""
    front: dict[str, Any] = {"license": config.licence, "library_name": "saelens", "tags": TAGS}
    for key, name in (("base_model", run.config.model), ("datasets", run.config.data)):
        if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not Path(name).exists():  # an id of the hub
            front[key] = name if key == "base_model" else [name]
    return yaml.safe_dump(front, sort_keys=False)


def _public_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a training, with the name of the SAE that it went on from, not its place on this machine."""
    init = settings.get("init")
    return {**settings, "init": public_name(init)} if init else dict(settings)


def _sae_row(sae: SaeEvidence) -> list[str]:
    k, tokens = (formatting.count(value) for value in (sae.k, sae.tokens))
    figures = [formatting.number(sae.fvu), formatting.number(sae.l0), formatting.percent(sae.dead)]
    return [f"`{sae.site}`", sae.architecture, formatting.count(sae.d_sae), k, *figures, tokens]


def _explained(run: Run) -> str:
    """What features explain of Δr, by site, and what the reported concepts carry together."""
    rows = [row for site in run.evidence.sites if any((row := _explained_row(site))[1:])]
    heads = ("site", "features' share of Δr, by the ledger", "explained of what training wrote")
    text = _table(heads, rows) if rows else "How much of the reward difference Δr they explain was not measured."
    if (carried := run.evidence.reported_set) is not None:
        text += f"\n\nAblated together, the reported concepts take away {_share(carried.completeness)} of Δr."
    return text


def _explained_row(site: SiteEvidence) -> list[str]:
    shares = site.ledger.shares if site.ledger else []
    of_ledger = next((" ".join(formatting.share(s.value, s.low, s.high)) for s in shares if s.part == "features"), "")
    return [f"`{site.site}`", of_ledger, _share(site.written.explained_of_written) if site.written else ""]


def _share(figure: Figure) -> str:
    return " ".join(formatting.share(figure.value, figure.low, figure.high))


def _origin(run: Run, parts: Sequence[str]) -> str:
    """Where the SAEs come from."""
    c = run.config
    brought = [part for part in parts if c.sae_dir and not (is_difference(part) and "{L}" in c.sae_dir)]
    trained = [part for part in parts if part not in brought]
    told = []
    if trained:
        pairs = run.evidence.data
        told.append(
            f"{_listed(trained)}: trained by rmscope on prompts and responses of {pairs.splits.get('fit', 0):,} of "
            f"{pairs.pairs:,} pairs (the fit split)."
        )
    if any(map(is_difference, trained)):
        told.append(
            "Difference SAEs have features, k and tokens of their own: those of the table, not of the settings below."
        )
    if brought:
        told.append(f"{_listed(brought)}: not trained here, but taken from {markdown(public_name(c.sae_dir or ''))}.")
    if c.sae.init and any(not is_difference(part) for part in trained):
        told.append(f"Those of the whole stream go on from the weights of {markdown(public_name(c.sae.init))}.")
    if c.reward_aware:
        told.append(
            f"All were then fine-tuned for {c.reward_aware:,} steps, so that less of the reward runs through their error."
        )
    return " ".join(told)


def _listed(parts: Sequence[str]) -> str:
    return ", ".join(f"`{part}`" for part in parts)


def _concept_row(concept: NamedConcept) -> list[str]:
    value, low, high, q = shown_effect(concept.row)
    mean = " ".join(formatting.effect(value, low, high))
    return [markdown(concept.title.text), concept.title.giver, f"`{concept.row['site']}`", mean, formatting.q_value(q)]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; its cells are escaped already."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if rows else "None."

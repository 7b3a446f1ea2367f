"""The rows of a site for Neuronpedia and for SAEDashboard (see :mod:`rmscope.studies.export.neuronpedia`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rmscope.model.site_names import hook_name, parts_of
from rmscope.ranking.concepts import members_in
from rmscope.report import formatting
from rmscope.report.page import shown_effect
from rmscope.run.firings import AFTER, BEFORE, FiringText, SiteFirings
from rmscope.run.run import Run
from rmscope.sae.base import Sae
from rmscope.sae.joint import JointSae
from rmscope.studies.export.settings import ExportConfig
from rmscope.studies.export.texts import public_name, storable
from rmscope.studies.label.names import Name, NamedConcept

SHOWN_TOKENS = BEFORE + 1 + AFTER
"""The most tokens of a text."""
VISIBILITY = "PUBLIC"
NOT_MEASURED = (
    "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1", "correlated_neurons_indices",
    "correlated_neurons_pearson", "correlated_neurons_l1", "correlated_features_indices", "correlated_features_pearson",
    "correlated_features_l1", "neg_str", "neg_values", "pos_str", "pos_values", "logits_hist_data_bar_heights",
    "logits_hist_data_bar_values", "decoder_weights_dist",
)  # fmt: skip
"""Lists that stay empty."""
KINDS = {
    "resid_post": "The residual stream after a block",
    "diff": "What preference training wrote into the residual stream",
    "base": "The base's part of the residual stream",
    "both": "What preference training wrote into the residual stream, and the base's part of it",
    "embed": "The embeddings",
}
"""What SAEs of a kind of site read."""
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Source:
    """A site, as Neuronpedia names it."""

    site: str
    model: str

    @property
    def kind(self) -> str:
        return self.site.partition(".")[0]

    @property
    def layer(self) -> int:
        return int(self.site.partition(".")[2] or 0)

    @property
    def set(self) -> str:
        return "rmscope-" + self.kind.replace("_", "-")

    @property
    def id(self) -> str:
        return f"{self.layer}-{self.set}"

    @property
    def release(self) -> str:
        return f"rmscope-{self.model}"

    def feature_key(self, feature: int) -> Row:
        """What names a feature in every table."""
        return {"modelId": self.model, "layer": self.id, "index": str(feature)}

    def row_id(self, *parts: Any) -> str:
        """An id of 25 characters, as cuid's; the same row has the same one again."""
        return "c" + hashlib.sha256(json.dumps([self.model, self.id, *parts]).encode()).hexdigest()[:24]


class SiteRows:
    """The rows of one site. Floats have six digits."""

    def __init__(self, run: Run, config: ExportConfig, source: Source, firings: SiteFirings) -> None:
        self.run, self.config, self.source, self.firings = run, config, source, firings
        self.sae, self.data = run.saes[source.site], public_name(run.config.data)
        self._token = run.store.column(source.site, "token").numpy()
        self._texts: dict[int, str] = {}

    def metadata(self) -> dict[str, Row]:
        """The one row of Model, SourceRelease, SourceSet and Source, by file."""
        name, creator = public_name(self.run.config.model), self.config.creator
        about = f"SAEs of the preference model {name} ({self.data}), made with rmscope"
        owner = {"creatorId": self.config.creator_id, "visibility": VISIBILITY}
        parts = parts_of(self.source.site)
        return {
            "model": {
                "id": self.source.model,
                "displayName": name,
                "displayNameShort": name,
                "owner": creator,
                "instruct": False,
                "layers": len(self.run.rm.blocks),
                "neuronsPerLayer": 0,
                "dimension": self.run.rm.d_model,
                "inferenceEnabled": False,
                **owner,
            },
            "release": {
                "name": self.source.release,
                "description": about,
                "descriptionShort": f"Preference model {name}",
                "urls": [],
                "creatorName": creator,
                "isNewUi": False,
                "featured": False,
                **owner,
            },
            "sourceset": {
                "modelId": self.source.model,
                "name": self.source.set,
                "description": f"{KINDS[self.source.kind]}; {about}",
                "type": self.source.kind,
                "creatorName": creator,
                "urls": [],
                "releaseName": self.source.release,
                "hasDashboards": True,
                "allowInferenceSearch": False,
                **owner,
            },
            "source": {
                "id": self.source.id,
                "modelId": self.source.model,
                "setName": self.source.set,
                "hasDashboards": True,
                "inferenceEnabled": False,
                "hfRepoId": self.config.push,
                "hfFolderId": parts[0] if self.config.push and len(parts) == 1 else None,
                "num_prompts": self.firings.texts,
                "num_tokens_in_prompt": SHOWN_TOKENS,
                "dataset": self.data,
                "notes": f"Site {self.source.site} of the run; activations are in the stream's own units.",
                **owner,
            },
        }

    def feature(self, feature: int) -> Row:
        """A row of Neuron."""
        _, values = self.firings.of(feature)
        return {
            **self.source.feature_key(feature),
            "sourceSetName": self.source.set,
            "creatorId": self.config.creator_id,
            "hookName": hook_of(self.sae, self.source.site, feature),
            "hasVector": False,
            "maxActApprox": digits(values.max(initial=0.0)),
            **self._measured(feature),
        }

    def activation(self, feature: int, text: FiringText) -> Row:
        """A row of Activation."""
        peak, values = text.peak, [digits(v) for v in text.values]
        return {
            "id": self.source.row_id("activation", feature, int(text.rows[peak])),
            **self.source.feature_key(feature),
            "creatorId": self.config.creator_id,
            "dataSource": self.data,
            "tokens": self._tokens(text),
            "values": values,
            "maxValue": values[peak],
            "maxValueTokenIndex": peak,
            "minValue": min(values),
            "qualifyingTokenIndex": peak,
            "binMin": digits(text.low),
            "binMax": digits(text.high),
            "binContains": digits(text.share),
        }

    def dashboards(self, shown: Mapping[int, Sequence[FiringText]]) -> Row:
        """A batch of SAEDashboard."""
        return {
            "model_id": self.source.model,
            "layer": self.source.layer,
            "sae_set": self.source.set,
            "sae_id_suffix": None,
            "features": [self._dashboard(j, texts) for j, texts in shown.items()],
        }

    def _dashboard(self, feature: int, texts: Sequence[FiringText]) -> Row:
        return {
            "feature_index": feature,
            **self._measured(feature),
            "n_prompts_total": self.firings.texts,
            "n_tokens_in_prompt": SHOWN_TOKENS,
            "dataset": self.data,
            "activations": [
                {
                    "bin_min": digits(text.low),
                    "bin_max": digits(text.high),
                    "bin_contains": digits(text.share),
                    "tokens": self._tokens(text),
                    "values": [digits(v) for v in text.values],
                    "qualifying_token_index": text.peak,
                }
                for text in texts
            ],
        }

    def _measured(self, feature: int) -> Row:
        """What both formats say of a feature."""
        middles, counts = self.firings.histogram(feature)
        return {
            "frac_nonzero": digits(self.firings.rate(feature)),
            "freq_hist_data_bar_values": [digits(v) for v in middles],
            "freq_hist_data_bar_heights": counts,
            "vector": [],
            **{name: [] for name in NOT_MEASURED},
        }

    def _tokens(self, text: FiringText) -> list[str]:
        return [self._token_text(int(token)) for token in self._token[text.rows]]

    def _token_text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = storable(str(self.run.rm.tokenizer.decode([token])))
        return self._texts[token]


def hook_of(sae: Sae, site: str, feature: int) -> str:
    """The hook of the stream that a feature reads; at ``both.L`` that of its own part."""
    in_base = isinstance(sae, JointSae) and feature >= sae.difference.m
    return hook_name(parts_of(site)[int(in_base)])


def features_at(concept: Mapping[str, Any], site: str) -> list[int]:
    """The features of a concept at a site."""
    return list(members_in(concept).get(site, ()))


def explanations(source: Source, creator_id: str, concepts: Sequence[NamedConcept]) -> Iterator[Row]:
    """Rows of Explanation: one for each name of a concept and each of its features at the site."""
    for concept in concepts:
        for feature in features_at(concept.row, source.site):
            for name in concept.names:
                yield {
                    "id": source.row_id("explanation", feature, concept.row["concept"], name.giver),
                    **source.feature_key(feature),
                    "authorId": creator_id,
                    "description": storable(name.text),
                    "notes": storable(_notes(concept.row, name)),
                    "typeName": None,
                    "explanationModelName": None,
                }


def _notes(concept: Row, name: Name) -> str:
    """Who gave a name, and what its concept does to the reward."""
    value, low, high, q = shown_effect(concept)
    mean, between = formatting.effect(value, low, high)
    unsure, tested = "; unsure" if name.is_unsure else "", "reported" if concept["reported"] else "not reported"
    return (
        f"Named {name.origin}{unsure}. Concept {concept['concept']} of the run gives {mean} {between} reward: what its "
        f"joint ablation takes away, mean over fresh responses (q {formatting.q_value(q)}, {tested})."
    )


def digits(value: float) -> float:
    """A number with six digits."""
    return float(f"{float(value):.6g}")

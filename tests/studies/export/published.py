# ruff: noqa: N815  (the names are theirs)
"""The rows that Neuronpedia and SAEDashboard read, as their public sources declare them.

Neuronpedia: ``apps/webapp/prisma/schema.prisma`` of hijohnnylin/neuronpedia at commit
008d5040ab97abd5c44d92d190b30034ad7a6e97. A column with a default, or one that may be null, need not be given; but ids that
only its client makes (cuid) must be. Relations are left out. SAEDashboard: ``neuronpedia_dashboard.py`` and
``neuronpedia_export.py`` of jbloomAus/SAEDashboard at commit 3ea1249ac0e31c3f8433c6c270c40d4e3bec9169.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Cuid = Annotated[str, Field(pattern=r"^c[a-z0-9]{24}$")]
Visibility = Literal["PUBLIC", "UNLISTED", "PRIVATE"]


class Table(BaseModel):
    """No other columns, and no value that is only almost of its type."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class Model(Table):
    id: Annotated[str, Field(pattern=r"^[a-z0-9-_]+$", min_length=1, max_length=128)]
    displayNameShort: str = ""
    displayName: str = ""
    creatorId: str
    tlensId: str | None = None
    openRouterId: str | None = None
    dimension: int | None = None
    thinking: bool = False
    visibility: Visibility = "PRIVATE"
    defaultSourceSetName: str | None = None
    defaultSourceId: str | None = None
    defaultGraphSourceSetName: str | None = None
    inferenceEnabled: bool = False
    instruct: bool = False
    layers: int
    neuronsPerLayer: int
    owner: Annotated[str, Field(min_length=1)]
    website: str | None = None


class SourceRelease(Table):
    name: str
    visibility: Visibility = "PRIVATE"
    isNewUi: bool = False
    featured: bool = False
    description: str
    descriptionShort: str | None = None
    urls: list[str]
    creatorEmail: str | None = None
    creatorName: str
    creatorNameShort: str | None = None
    creatorId: str
    defaultSourceSetName: str | None = None
    defaultSourceId: str | None = None
    defaultUmapSourceIds: list[str] = []


class SourceSet(Table):
    modelId: str
    name: str
    hasDashboards: bool = True
    allowInferenceSearch: bool = True
    visibility: Visibility = "PRIVATE"
    description: str
    type: str = ""
    creatorName: str
    urls: list[str]
    creatorEmail: str | None = None
    creatorId: str
    releaseName: str | None = None
    defaultRange: int = 1
    defaultShowBreaks: bool = True
    showDfa: bool = False
    showCorrelated: bool = False
    showHeadAttribution: bool = False
    showUmap: bool = False


class Source(Table):
    id: str
    modelId: str
    hasDashboards: bool = True
    inferenceEnabled: bool = False
    saelensRelease: str | None = None
    saelensSaeId: str | None = None
    hfRepoId: str | None = None
    hfFolderId: str | None = None
    visibility: Visibility = "PRIVATE"
    setName: str
    creatorId: str
    hasUmap: bool = False
    num_prompts: int | None = None
    num_tokens_in_prompt: int | None = None
    dataset: str | None = None
    notes: str | None = None


class Alignment(BaseModel):
    """Lists that Neuron and SAEDashboard's features share."""

    neuron_alignment_indices: list[int] = []
    neuron_alignment_values: list[float] = []
    neuron_alignment_l1: list[float] = []
    correlated_neurons_indices: list[int] = []
    correlated_neurons_pearson: list[float] = []
    correlated_neurons_l1: list[float] = []
    correlated_features_indices: list[int] = []
    correlated_features_pearson: list[float] = []
    correlated_features_l1: list[float] = []
    neg_str: list[str] = []
    neg_values: list[float] = []
    pos_str: list[str] = []
    pos_values: list[float] = []
    frac_nonzero: Annotated[float, Field(ge=0, le=1)] = 0
    freq_hist_data_bar_heights: list[float] = []
    freq_hist_data_bar_values: list[float] = []
    logits_hist_data_bar_heights: list[float] = []
    logits_hist_data_bar_values: list[float] = []
    decoder_weights_dist: list[float] = []
    vector: list[float] = []


class Neuron(Table, Alignment):
    modelId: str
    layer: str
    index: Annotated[str, Field(pattern=r"^\d+$")]
    sourceSetName: str | None = None
    creatorId: str | None = None
    maxActApprox: float | None = 0
    hasVector: bool = False
    vectorLabel: str | None = None
    vectorDefaultSteerStrength: float | None = 10
    hookName: str | None = None
    topkCosSimIndices: list[int] = []
    topkCosSimValues: list[float] = []


class Activation(Table):
    id: Cuid
    tokens: list[str]
    dataIndex: str | None = None
    index: str
    layer: str
    modelId: str
    dataSource: str | None = None
    maxValue: float
    maxValueTokenIndex: int
    minValue: float
    values: list[float]
    dfaValues: list[float] = []
    dfaTargetIndex: int | None = None
    dfaMaxValue: float | None = None
    creatorId: str
    lossValues: list[float] = []
    logitContributions: str | None = None
    binMin: float | None = None
    binMax: float | None = None
    binContains: float | None = None
    qualifyingTokenIndex: int | None = None


class Explanation(Table):
    id: Cuid
    modelId: str
    layer: str
    index: str
    description: str
    authorId: str
    triggeredByUserId: str | None = None
    notes: str | None = None
    scoreV1: float = 0
    scoreV2: float | None = None
    typeName: str | None = None
    explanationModelName: str | None = None


class DashboardActivation(Table):
    bin_min: float
    bin_max: float
    bin_contains: float
    tokens: list[str]
    values: list[float]
    qualifying_token_index: int
    dfa_values: list[float] = []
    dfa_maxValue: float | None = None
    dfa_targetIndex: int | None = None


class DashboardFeature(Table, Alignment):
    feature_index: int
    n_prompts_total: int
    n_tokens_in_prompt: int
    dataset: str
    activations: list[DashboardActivation]


class DashboardBatch(Table):
    model_id: str
    layer: int
    sae_set: str
    sae_id_suffix: str | None
    features: list[DashboardFeature]

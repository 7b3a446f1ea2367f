"""All that a run's pages show, computed once by the evidence stage and stored as JSON.

Effects are in units of reward. A figure that could not be measured is null.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from rmscope.evaluation.text_baseline import Term
from rmscope.model.checks import Check
from rmscope.planted.results import CueMatch
from rmscope.statistics import Figure


class Stored(BaseModel):
    """A part of what is stored; not finite numbers are kept as they are."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants", protected_namespaces=())


class ModelEvidence(Stored):
    """The PM."""

    name: str
    blocks: int
    d_model: int
    identity: str
    rendering: str
    preflight: list[Check]


class PairsEvidence(Stored):
    """The pairs."""

    name: str
    pairs: int
    prompts: int
    splits: dict[str, int]
    left_out: dict[str, int]
    """How many pairs were left out, by reason."""


class Histogram(Stored):
    """Counts between consecutive edges."""

    edges: list[float]
    counts: list[int]


class ScoreEvidence(Stored):
    """How the PM orders the pairs."""

    accuracy: Figure
    length_only: float
    mean_chosen: float
    mean_rejected: float
    mean_abs_delta: float
    sd_delta: float
    histogram: Histogram


class SaeEvidence(Stored):
    """An SAE's figures on stored tokens of the fit split, and its training curve (step, FVU)."""

    site: str
    architecture: str
    d_sae: int
    k: int | None
    fvu: float
    l0: float
    dead: float
    tokens: int | None
    curve: list[tuple[int, float]]


class LedgerShare(Stored):
    """A part of the ledger: its share of Δr with the 95 % interval."""

    part: str
    value: float
    low: float
    high: float


class LedgerEvidence(Stored):
    """The ledgers of a site."""

    pairs: int
    shares: list[LedgerShare]
    largest_gap: float
    open: int
    """Pairs whose gap is larger than its bound although the path was halved as often as allowed."""


class Side(Stored):
    """One response: (token, activation in 0 .. 1), and its reward before and after the ablation."""

    side: str
    tokens: list[tuple[str, float]]
    before: float
    after: float
    fires: bool


class Context(Stored):
    """A confirm pair on which a feature was ablated."""

    pair: str = ""
    """Its id."""
    prompt: str
    delta_before: float
    delta_after: float
    sides: list[Side]


class FeatureEvidence(Stored):
    """A frozen feature: its row of ``features/<site>.parquet``, the tokens it fires on, and examples."""

    model_config = ConfigDict(extra="allow", ser_json_inf_nan="constants")

    feature: int
    rank: int
    reported: bool
    mean_effect: float
    flags: list[str]
    tokens: list[tuple[str, float]]
    """(token, its share of the feature's activation), largest first."""
    examples: list[Context]


class ConceptEvidence(Stored):
    """A frozen concept: its row of ``concepts.parquet``, and examples."""

    model_config = ConfigDict(extra="allow", ser_json_inf_nan="constants")

    concept: int
    name: str
    form: bool
    site: str
    features: list[int]
    rank: int
    reported: bool
    mean_effect: float
    flags: list[str]
    examples: list[Context]


class WrittenEvidence(Stored):
    """What preference training wrote before the end of a site's block, on pairs of the measure split."""

    written: Figure
    """Its share of Δr."""
    explained: Figure
    """delta_r2 with the difference SAE's reconstruction in its place."""
    explained_of_written: Figure
    """1 - Σ(Δr - Δr^)² / Σ(Δr - Δr of b)²."""
    by_concepts: Figure
    """The same with the features of reported concepts alone."""
    by_others: Figure
    """The same with all other features alone."""
    by_first: dict[int, Figure] = {}
    """At the last site: the same with the features of the first K concepts alone, by K."""
    pairs: int


class SetEvidence(Stored):
    """What all reported concepts together carry, on pairs of the measure split."""

    completeness: Figure
    """The share of Δr that goes when all of their features are ablated together."""
    content: Figure
    """The same of the concepts of content that are specific: those of the headline."""
    rest: Figure
    """The same of all other features than those of the reported concepts."""
    all_features: Figure
    """The same of every feature of every site."""
    resampled: dict[str, float]
    """By home site of concepts: Spearman of the effects of single responses, to zero and by place in other responses."""
    without: dict[int, Figure]
    """By concept: the share of Δr that the set no longer takes away when the concept is left out of it."""
    pairs: int


class TextEvidence(Stored):
    """What text statistics alone explain, and what the reported concepts add to them."""

    terms: list[Term]
    """In the order in which they were chosen."""
    explained: Figure
    """delta_r2 of the baseline on the measure split."""
    agreement: Figure
    """The share of those pairs whose sign it gives."""
    pairs: int
    text: Figure
    """delta_r2 on the confirm split, of the baseline up to a factor, each pair's from a fit on other prompts."""
    concepts: Figure
    """The same of the activations of reported concepts of content, summed over a response."""
    both: Figure
    """The same of both together."""
    adds: dict[int, Figure]
    """By concept: 1 - Σ(Δr - Δr^ of both)² / Σ(Δr - Δr^ of the baseline)²."""
    confirm_pairs: int
    cues: dict[str, str | None] = {}
    """Where the truth is known: by planted cue the term that names it."""


class BlockEvidence(Stored):
    """What was written up to the end of a block, as shares of Δr on some fit pairs."""

    block: int
    written: float
    at_own_tokens: float


class BaseEvidence(Stored):
    """The PM's base: how far training moved each block, and what was written before each."""

    name: str
    first: int
    changes: list[float]
    blocks: list[BlockEvidence]


class SiteEvidence(Stored):
    """A site: its SAEs, how good the estimate is, the ledger, and the features that are shown."""

    site: str
    saes: list[SaeEvidence]
    """Two where both parts of the stream are studied: the difference SAE and the base's."""
    quality: dict[str, float]
    missed: Figure
    """Of a sample of the features that the estimate did not propose, the share whose effect on the fit split is above the
    bound."""
    scatter: list[tuple[float, float]]
    """(estimate, exact effect) of a sample."""
    ledger: LedgerEvidence | None
    """None where too few pairs have a ledger."""
    written: WrittenEvidence | None = None
    """None where the site does not hold what was written."""
    frozen: int
    eligible: int
    reported: int
    flagged: int
    prefers: int
    bound: float
    power: str
    features: list[FeatureEvidence]


class Footer(Stored):
    """How the run was made."""

    seconds: float
    versions: dict[str, str]
    seed: int


class Evidence(Stored):
    """The whole."""

    title: str
    command: str
    made: str
    model: ModelEvidence
    data: PairsEvidence
    scores: ScoreEvidence
    noise_floor: float
    base: BaseEvidence | None = None
    """None where the PM's base is not known."""
    why_no_base: str = ""
    """Why there is no base, where one was looked for."""
    text: TextEvidence
    concepts: list[ConceptEvidence] = []
    """The frozen concepts, by rank."""
    reported_set: SetEvidence | None = None
    """None where no concept is reported."""
    sites: list[SiteEvidence]
    planted: list[CueMatch] | None
    """Where the truth is known: one row per planted cue."""
    footer: Footer

"""What a run holds: settings, PM, pairs, and the tables and SAEs of its folder, each loaded on first use."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Literal

import polars as pl
from pydantic import ValidationError

from rmscope.activations.store import ActivationStore
from rmscope.effects.ledger import Baseline, baseline, joint_baseline
from rmscope.errors import InputError
from rmscope.evaluation.text_baseline import TextBaseline
from rmscope.io import Display, NoDisplay
from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel
from rmscope.model.site_names import all_parts, is_difference, parts_of
from rmscope.pairs.pair import Pair, Split, largest_differences
from rmscope.ranking.feature_statistics import FeatureStatistics, feature_statistics
from rmscope.run.concept_table import concept_table
from rmscope.run.evidence import Evidence
from rmscope.run.firings import SiteFirings
from rmscope.run.folder import RunFolder
from rmscope.run.inputs import Inputs, PairSet, evenly
from rmscope.run.labels import Labels
from rmscope.run.settings import RunConfig
from rmscope.sae import Sae
from rmscope.sae.formats.saelens import CFG, WEIGHTS
from rmscope.sae.initial import load_initial
from rmscope.sae.joint import JointSae, join_parts, load_site

TOKENS, VOCABULARY = "tokens.parquet", "vocabulary.parquet"
"""Tables in ``evidence/``: token, text; and site, feature, text, logit."""
MOST_TOKENS = 500_000
"""Stored tokens in which a page looks for a feature's firings: they stay in memory."""


class RunData:
    """The data of a run, as the stages make them and the studies read them."""

    def __init__(self, config: RunConfig, display: Display | None = None) -> None:
        self.config = config
        self.display: Display = display or NoDisplay()
        self.folder = config.out
        self.inputs = Inputs(config)
        self.on_disk = RunFolder(config.out, self.display)
        self._firings: dict[str, SiteFirings] = {}

    # What the folder holds

    def _finished(self, *parts: str) -> Path:
        path = self.folder.joinpath(*parts)
        if not path.is_file():
            raise InputError(
                f"The run in {self.folder} is not finished ({path.name} is missing); rmscope run {self.folder} resumes it."
            )
        return self._sound(path)

    def _sound(self, path: Path) -> Path:
        """The path of a file of the run. InputError where the file is not what its stage wrote."""
        if not self.on_disk.is_sound(path.relative_to(self.folder).as_posix()):
            raise InputError(f"{path} is damaged (its checksum differs); rmscope run {self.folder} makes it again.")
        return path

    def _table(self, *parts: str) -> pl.DataFrame:
        return pl.read_parquet(self._finished(*parts))

    @cached_property
    def scores(self) -> pl.DataFrame:
        """One row per pair: pair, chosen, rejected, delta, n_chosen, n_rejected, divergence, split."""
        return self._table("scores.parquet")

    @cached_property
    def sd(self) -> float:
        """SD(Δr) over the dataset: all scored pairs, also those that a filter on |Δr| leaves out afterwards."""
        return float(self.scores["delta"].std())  # type: ignore[arg-type]

    def features(self, site: str) -> pl.DataFrame:
        """One row per frozen feature of a site: mean effect, interval, q, preference, firing rates, flags."""
        return self._table("features", f"{self.check_site(site)}.parquet")

    def reported(self, site: str) -> pl.DataFrame:
        """The reported features of a site, by rank."""
        return self.features(site).filter("reported").sort("rank")

    @cached_property
    def concepts(self) -> pl.DataFrame:
        """One row per frozen concept, by rank: name, site, features, joint effect, interval, q, flags, where else it is.

        A reported concept has q < .05 and beats its direction null. Its effect is that of the measure split
        (:func:`~rmscope.run.concept_table.concept_table`). ``by_place`` and ``by_token`` are its resampled effects,
        ``seed_effects`` those in SAEs of other seeds.
        """
        parts = (self._table("concepts", f"{name}.parquet") for name in ("directions", "measured"))
        return concept_table(self.ranked_concepts, *parts)

    @property
    def ranked_concepts(self) -> pl.DataFrame:
        """The same as they were tested on the confirm split, before the direction null."""
        return self._table("concepts.parquet")

    def frozen(self, site: str) -> pl.DataFrame:
        """The frozen features of a site, from the fit split: feature, fit_effect, sign, sign_diff."""
        return self._table("effects", self.check_site(site), "frozen.parquet")

    @property
    def frozen_concepts(self) -> pl.DataFrame:
        """The frozen concepts, from the fit split: concept, name, form, site, features, weights, elsewhere, signs."""
        return self._table("concepts", "frozen.parquet")

    def joint_effects(self, kind: Literal["exact", "strong"] = "exact") -> pl.DataFrame:
        """Joint ablations of concepts on the confirm split: pair, side, feature (the concept's number), effect, kind."""
        return self._table("concepts", f"{kind}.parquet")

    @property
    def concept_firings(self) -> pl.DataFrame:
        """Concepts in the responses of the confirm split: pair, side, feature (the concept's number), effect (Σ_t of its
        activation), ending."""
        return self._table("concepts", "firing.parquet")

    @property
    def measured_effects(self) -> pl.DataFrame:
        """Ablations of reported concepts on the measure split: concept, pair, side, kind (own, by_place, by_token, seed N),
        effect."""
        return self._table("concepts", "measured_effects.parquet")

    @cached_property
    def text_baseline(self) -> TextBaseline:
        """What text statistics alone say of Δr, fitted on the fit split."""
        return TextBaseline.model_validate_json(self._finished("baseline.json").read_text("utf-8"))

    def ledger(self, site: str) -> pl.DataFrame:
        """One row per pair: pair, delta_r, features, error, remainder, gap, nodes."""
        return self._table("ledger", f"{self.check_site(site)}.parquet")

    def effects(self, site: str, kind: Literal["estimated", "exact", "strong", "contribution"] = "exact") -> pl.DataFrame:
        """One row per response and feature: pair, side, feature, effect, kind."""
        return self._table("effects", self.check_site(site), f"{kind}.parquet")

    @cached_property
    def evidence(self) -> Evidence:
        """All that the report shows, as the evidence stage stored it."""
        path = self._finished("evidence", "evidence.json")
        try:
            return Evidence.model_validate_json(path.read_text("utf-8"))
        except ValidationError as error:
            raise InputError(
                f"{path} is damaged, or of another version of rmscope; delete it, then rmscope run {self.folder} mends it."
            ) from error

    @cached_property
    def noise_floor(self) -> float:
        """How far the reward of one text moves when it is run again in another batch, in units of reward."""
        return float(json.loads(self._finished("preflight.json").read_text("utf-8"))["noise_floor"])

    @cached_property
    def store(self) -> ActivationStore:
        """The stream of the fit split at every site."""
        for manifest in self.folder.glob("activations/*/manifest.json"):
            self._sound(manifest)
        return ActivationStore.open(self.folder / "activations")

    @cached_property
    def saes(self) -> dict[str, Sae]:
        """The SAE of every site; features are encoded where the PM is."""
        saes = {site: self.sae(site) for site in self.sites}
        for sae in saes.values():
            sae.check_width(self.rm.d_model, self.rm.name)
            sae.encode_on(self.rm.device)
        return saes

    @property
    def other_seeds(self) -> list[int]:
        """What is added to the SAEs' seed for the run's other dictionaries; none where it trains no SAE itself."""
        trains = any(part not in self.brought_saes for part in all_parts(self.sites))
        return list(range(1, self.config.seeds)) if trains else []

    def seed_folder(self, seed: int) -> str:
        """Where the SAEs of another seed are, in the run folder."""
        return f"saes/seeds/{seed}"

    @cached_property
    def other_saes(self) -> list[dict[str, Sae]]:
        """The SAE of every site, for each of the run's other seeds."""
        folders = [self.folder / self.seed_folder(seed) for seed in self.other_seeds]
        seeds = [
            {site: join_parts([self._again(folder, part) for part in parts_of(site)], site) for site in self.sites}
            for folder in folders
        ]
        for saes in seeds:
            for sae in saes.values():
                sae.encode_on(self.rm.device)
        return seeds

    def _again(self, folder: Path, part: str) -> Sae:
        """The SAE of a part from another seed; a brought one is the same in all."""
        return self.brought_saes[part] if part in self.brought_saes else load_site(folder, part)

    @cached_property
    def brought_saes(self) -> dict[str, Sae]:
        """The SAEs that the settings bring, of each part of each site."""
        source = self.config.sae_dir
        parts = [part for part in all_parts(self.sites) if source and not (is_difference(part) and "{L}" in source)]
        saes = {part: load_site(source or "", part) for part in parts}
        for sae in saes.values():
            sae.check_width(self.rm.d_model, self.rm.name)
        return saes

    @cached_property
    def initial_saes(self) -> dict[str, Sae]:
        """The SAEs from which the run's training goes on, of each part but the differences from the base.

        InputError where the settings name some, and the run has no site for them.
        """
        parts = [part for part in all_parts(self.sites) if not is_difference(part)]
        if self.config.sae.init and not parts:
            raise InputError(
                f"init names weights to go on from, and the run's sites ({', '.join(self.sites)}) are all differences from "
                "the base, which start anew; name --sites such as resid_post.6 or both.6."
            )
        loaded = {part: load_initial(self.config.sae, part, self.rm.d_model) for part in parts}
        return {part: sae for part, sae in loaded.items() if sae is not None}

    def sae(self, site: str) -> Sae:
        """The SAE of one site, from the run folder; the PM is not loaded."""
        for part in parts_of(self.check_site(site)):
            for name in (CFG, WEIGHTS):
                self._sound(self.folder / "saes" / part / name)
        return load_site(self.folder / "saes", site)

    def sae_identity(self, site: str) -> str:
        """What changes when the SAE of a site is trained again: the checksums of its weights."""
        files = [f"saes/{part}/{WEIGHTS}" for part in parts_of(self.check_site(site))]
        return " ".join(self.on_disk.checksum(file) for file in files)

    def has_firings(self, site: str) -> bool:
        """Whether :meth:`firings` was called for a site, so that it answers at once."""
        return site in self._firings

    def firings(self, site: str) -> SiteFirings:
        """Where every feature of a site fires in the stored texts, or in a sample of some :data:`MOST_TOKENS` tokens; the PM
        is not loaded. Those of the last two sites are kept."""
        if site not in self._firings:
            while len(self._firings) > 1:
                self._firings.pop(next(iter(self._firings)))
            self._firings[site] = SiteFirings(self.store, self.sae(site), self.check_site(site), MOST_TOKENS)
        return self._firings[site]

    @property
    def token_texts(self) -> dict[int, str]:
        """The text of every stored token."""
        return dict(self._table("evidence", TOKENS).rows())

    @property
    def vocabulary(self) -> pl.DataFrame:
        """What each frozen feature writes, in words of the base: site, feature, text, logit. Empty where it is not known."""
        return self._table("evidence", VOCABULARY)

    @property
    def labels(self) -> Labels:
        """What people and language models named."""
        return Labels(self.folder, {site: self.sae_identity(site) for site in self.sites})

    @cached_property
    def feature_statistics(self) -> dict[str, FeatureStatistics]:
        """What each feature of each site fires on, over the stored tokens."""
        tokenizer = self.rm.tokenizer
        normal: dict[str, int] = {}

        def normal_form(token: int) -> int:
            return normal.setdefault(tokenizer.decode([token]).strip().lower(), token)

        return {site: feature_statistics(self.store, sae, site, normal_form) for site, sae in self.saes.items()}

    def top_tokens(self, site: str, feature: int) -> list[tuple[str, float]]:
        """The tokens on which a feature is most active, with their share of its activation."""
        return self.feature_statistics[site].top_tokens(feature, lambda t: self.rm.tokenizer.decode([t]))

    def confirmed(self, site: str, kind: Literal["exact", "strong"] = "exact") -> pl.DataFrame:
        """Exact effects on the confirm split with each pair's prompt, Δr (delta) and length difference in tokens."""
        return self.on_confirm(self.effects(site, kind))

    def on_confirm(self, effects: pl.DataFrame) -> pl.DataFrame:
        """The rows of an effect table on the confirm split, with prompt, delta and length_difference."""
        lengths = (pl.col("n_chosen") - pl.col("n_rejected")).alias("length_difference")
        scores = self.scores.filter(pl.col("split") == "confirm").select("pair", "delta", lengths)
        prompt = pl.col("pair").replace_strict(self.prompts, return_dtype=pl.String).alias("prompt")
        return effects.join(scores, on="pair").with_columns(prompt)

    def baseline(self, site: str) -> Baseline:
        """Where a ledger's path starts at a site."""
        if is_difference(site):
            return baseline(self.saes[site], "base")
        statistics = self.feature_statistics[site]
        if isinstance(sae := self.saes[site], JointSae):
            return joint_baseline(sae, statistics.f_mean, statistics.x_mean)
        return baseline(self.saes[site], self.config.baseline, statistics.f_mean, statistics.x_mean)

    # What is studied

    @property
    def rm(self) -> RewardModel:
        return self.inputs.rm

    @cached_property
    def sites(self) -> list[str]:
        """The run's sites; where the folder records them, the PM is not loaded."""
        return self.on_disk.sites_of(self.config.model_dump(include={"sites", "study", "blocks"})) or self.inputs.sites

    @property
    def ledger_sites(self) -> list[str]:
        """The sites that get ledgers: those that the settings name; else those of both parts of the stream, or, without
        such, the first, the middle and the last."""
        if self.config.sites:
            return self.sites
        return [site for site in self.sites if len(parts_of(site)) > 1] or evenly(self.sites, 3)

    def check_site(self, site: str) -> str:
        """The site. InputError where the run has no SAE there."""
        if site not in self.sites:
            raise InputError(f"The run in {self.folder} has no SAE at {site}; it has {', '.join(self.sites)}.")
        return site

    @cached_property
    def pair_set(self) -> PairSet:
        """The studied pairs: those that were scored, or those of largest |Δr| where the settings ask for them."""
        c, scored = self.config, self.inputs.scored
        if c.top_share is None and c.top_pairs is None:
            return scored
        return scored.only(largest_differences(self.scores["delta"].to_numpy(), c.top_share, c.top_pairs))

    @property
    def pairs(self) -> list[Pair]:
        return self.pair_set.pairs

    @property
    def tokens(self) -> list[PairTokens]:
        return self.pair_set.tokens

    @property
    def ids(self) -> list[str]:
        return self.pair_set.ids

    @property
    def prompts(self) -> dict[str, str]:
        """The prompt key of every scored pair, by pair id."""
        return self.inputs.scored.prompts

    def of_split(self, split: Split) -> list[int]:
        """Places of a split's pairs among the studied ones."""
        return self.pair_set.of_split(split)

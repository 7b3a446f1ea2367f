"""What a run folder holds, read on first use: scores, activations, SAEs, exact ablations."""

from __future__ import annotations

import shutil
import time
from functools import cached_property
from pathlib import Path

import polars as pl

from rmscope.activations.store import ActivationStore
from rmscope.effects.ledger import Baseline, baseline
from rmscope.errors import InputError
from rmscope.evaluation.reward_aware import RewardAwareConfig, fine_tune
from rmscope.io import Progress, silent
from rmscope.model.preflight import Preflight
from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import Scores
from rmscope.pairs.filters import largest
from rmscope.pairs.pair import Pair
from rmscope.ranking.feature_statistics import FeatureStatistics, census
from rmscope.run.folder import Display, NoDisplay, RunFolder
from rmscope.run.settings import RunConfig
from rmscope.run.study import Study
from rmscope.sae import Sae, SaeConfig, train_saes
from rmscope.sae.formats import sae_source


class Results(Study):
    """A study and its run folder."""

    preflight: Preflight

    def __init__(self, config: RunConfig, shown: Display | None = None) -> None:
        super().__init__(config)
        self.folder = config.out
        self.shown: Display = shown or NoDisplay()
        self.started = time.time()
        self.on_disk = RunFolder(config.out, self.shown)

    @cached_property
    def scores(self) -> pl.DataFrame:
        return pl.read_parquet(self.folder / "scores.parquet")

    @cached_property
    def studied(self) -> list[tuple[Pair, PairTokens]]:
        share, most = self.config.top_share, self.config.top_pairs
        if share is None and most is None:
            return self.scored
        return [self.scored[i] for i in largest(self.scores["delta"].to_numpy(), share, most)]

    @cached_property
    def sd(self) -> float:
        """SD(Δr) over the dataset: all scored pairs, also those that a filter on |Δr| leaves out afterwards."""
        return float(self.scores["delta"].std())  # type: ignore[arg-type]

    @cached_property
    def store(self) -> ActivationStore:
        return ActivationStore.open(self.folder / "activations")

    @cached_property
    def saes(self) -> dict[str, Sae]:
        sources = {site: sae_source(self.config.sae_dir or self.folder / "saes", site) for site in self.sites}
        saes = {site: Sae.load(source) for site, source in sources.items()}
        for site, sae in saes.items():
            if sae.d != self.rm.d_model:
                raise InputError(
                    f"The SAE at {sources[site]} reads {sae.d} dimensions, the PM's stream has {self.rm.d_model}; "
                    "name an SAE that was trained on this PM."
                )
            sae.site = sae.site or site  # bare weights do not say where they belong
            sae.encode_on(self.rm.device)
        return saes

    def trained(self, config: SaeConfig, folder: Path, progress: Progress = silent) -> dict[str, Sae]:
        """SAEs of every site from the run's store, in ``folder``. Where the run is reward-aware, those in ``folder/plain``
        are fine-tuned on its fit split, in ``folder/reward-aware-STEPS``, and these stand in ``folder``."""
        steps = self.config.reward_aware
        plain, device = folder / "plain" if steps else folder, str(self.rm.device)
        saes = train_saes(self.store, config, plain, self.sites, progress, device)
        if not steps:
            return saes
        pairs = [self.pairs[i] for i in self.of_split("fit")]
        known = pl.DataFrame({"pair": [p.id for p in pairs]}).join(self.scores, on="pair", how="left", maintain_order="left")
        scores = Scores(known["chosen"].cast(pl.Float32).to_torch(), known["rejected"].cast(pl.Float32).to_torch())
        tuning = RewardAwareConfig(steps=steps, seed=config.seed)
        made, own = {}, folder / f"reward-aware-{steps}"
        for site, sae in saes.items():
            made[site] = fine_tune(self.rm, sae, pairs, tuning, config, own, progress, scores)
            shutil.copytree(own / site, folder / site, dirs_exist_ok=True)
        return made

    @cached_property
    def census(self) -> dict[str, FeatureStatistics]:
        tokenizer = self.rm.tokenizer
        normal: dict[str, int] = {}

        def normal_form(token: int) -> int:
            return normal.setdefault(tokenizer.decode([token]).strip().lower(), token)

        return {site: census(self.store, sae, site, normal_form) for site, sae in self.saes.items()}

    def confirmed(self, site: str, name: str = "exact") -> pl.DataFrame:
        """Exact ablations on the confirm split with each pair's prompt, Δr (delta) and length difference in tokens; with the
        name ``strong`` those where a feature fires hardest."""
        lengths = (pl.col("n_chosen") - pl.col("n_rejected")).alias("length_difference")
        scores = self.scores.filter(pl.col("split") == "confirm").select("pair", "delta", lengths)
        prompt = pl.col("pair").replace_strict(self.prompts, return_dtype=pl.String).alias("prompt")
        exact = pl.read_parquet(self.folder / "effects" / site / f"{name}.parquet")
        return exact.join(scores, on="pair").with_columns(prompt)

    @property
    def noise_floor(self) -> float:
        return float(self.preflight.noise_floor)

    def baseline(self, site: str) -> Baseline:
        return baseline(self.saes[site], self.config.baseline, self.census[site].f_mean, self.census[site].x_mean)

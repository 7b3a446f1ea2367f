"""The PMs of the benchmarks, with held-out pairs, and TopK SAEs that are trained on other pairs and cached in a folder."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmscope.activations.harvest import data_identity, harvest
from rmscope.activations.store import ActivationStore
from rmscope.effects.ledger import Baseline, baseline
from rmscope.io import content_hash
from rmscope.model.reward_model import RewardModel
from rmscope.model.training.recipe import Recipe, human_pairs
from rmscope.pairs.demo import demo_pairs
from rmscope.pairs.pair import Pair, split_of
from rmscope.ranking.feature_statistics import feature_statistics
from rmscope.sae import Sae, SaeConfig, train_saes

HUMAN = ["harmless-base", "helpful-base", "helpful-rejection-sampled"]
SAE = SaeConfig(architecture="topk", k=32, d_sae=4608, tokens=500_000)
HARVESTED = 400
"""Pairs whose tokens train the SAEs (about 90,000 tokens of hh-rlhf)."""
LONGEST = 512


@dataclass(frozen=True)
class StudiedPm:
    """A PM, the pairs that figures are measured on, the SAEs, and the store that they were trained on."""

    rm: RewardModel
    held_out: list[Pair]
    store: ActivationStore
    saes: dict[str, Sae]

    def baseline(self, site: str) -> Baseline:
        """The mean over the responses' tokens of the store."""
        tokenizer = self.rm.tokenizer
        normal: dict[str, int] = {}

        def normal_form(token: int) -> int:
            return normal.setdefault(tokenizer.decode([token]).strip().lower(), token)

        statistics = feature_statistics(self.store, self.saes[site], site, normal_form)
        return baseline(self.saes[site], "mean", statistics.f_mean, statistics.x_mean)


def three_sites(rm: RewardModel) -> list[str]:
    """An early, a middle and a late site: resid_post.2, .6 and .10 of 12 blocks."""
    n = len(rm.blocks)
    return [f"resid_post.{i}" for i in (2, n // 2, n - 2)]


def load_studied_pm(model: str, cache: Path) -> StudiedPm:
    """``zoo:hh`` with hh-rlhf (held out: the first 500 rows of each file), or ``zoo:planted`` with the demo's pairs."""
    rm = RewardModel.load(model)
    sites = three_sites(rm)
    if model == "zoo:hh":
        train, held_out = human_pairs(Recipe(name="hh", data=[f"hh-rlhf/{n}/test.jsonl.gz" for n in HUMAN]))
        train, held_out = spread(train, 4 * HARVESTED), spread(held_out, len(held_out))
    else:
        pairs = demo_pairs()
        train, held_out = ([p for p in pairs if split_of(p) == s] for s in ("fit", "measure"))
    train, held_out = short_pairs(rm, train)[:HARVESTED], short_pairs(rm, held_out)
    names = content_hash(rm.identity, data_identity(train), sites, SAE.model_dump())
    folder = cache / f"{model.replace(':', '-')}-{names}"
    store = harvest(rm, train, sites, folder / "activations", shown("harvest"))
    return StudiedPm(rm, held_out, store, train_saes(store, SAE, folder / "saes", sites, shown("train")))


def short_pairs(rm: RewardModel, pairs: list[Pair]) -> list[Pair]:
    """The pairs whose sides differ and have at most LONGEST tokens."""
    tokens = rm.tokenize_all(pairs)
    return [
        p
        for p, t in zip(pairs, tokens, strict=True)
        if max(t.chosen.numel(), t.rejected.numel()) <= LONGEST and t.chosen.tolist() != t.rejected.tolist()
    ]


def spread(pairs: list[Pair], n: int) -> list[Pair]:
    """``n`` evenly spaced pairs, the sources taking turns."""
    by_source: dict[str, list[Pair]] = {}
    for p in pairs:
        by_source.setdefault(str(p.meta["source"]), []).append(p)
    each = -(-n // len(by_source))
    picked = [ps[:: max(1, len(ps) // each)][:each] for ps in by_source.values()]
    return [ps[i] for i in range(each) for ps in picked if i < len(ps)][:n]


def shown(name: str) -> Any:
    def progress(done: int, total: int, note: str = "") -> None:
        print(f"\r{name} {done}/{total} {note}", end="\n" if done == total else "", file=sys.stderr)

    return progress


def emit(**line: Any) -> None:
    """Prints one JSON line per case, with figures to 4 digits."""
    print(json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in line.items()}), flush=True)


def arguments(text: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=text.splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True, help="folder for activations and SAEs")
    return parser

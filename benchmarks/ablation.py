"""Exact ablations per second: the engine against one full forward of the whole text per feature, batch 1 and 32.

usage: RMSCOPE_DATA=DIR ablation.py --cache DIR [--pairs 100] [--rounds 3]

``zoo:hh`` (12 blocks, d 576), held-out hh-rlhf, TopK SAE (k 32, d_sae 4608) at resid_post.6, float32, all active features of
both sides of each pair. The engine's time includes the clean runs and the encoding. The reference is the transformers
module's own forward with a hook on the block, on the whole text, with features encoded beforehand. It is timed on random
(response, feature) requests, one by one on every pair and batched on every fifth, and its results are compared with the
engine's. The three take turns pair by pair. A round is all pairs (half an hour on two slow cores); the figures are medians
over the rounds.

``ratio`` is what was reached. ``flops_ratio`` is the ratio of the multiplications (linear maps and attention) of the two
ways, ``gflops`` the speed of either.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
import torch
from pms import arguments, emit, load_studied_pm
from scipy.stats import spearmanr
from torch import Tensor

from rmscope.effects.ablation import ablate_groups, at_site, clean_runs
from rmscope.effects.requests import ablations
from rmscope.model.rendering import PairTokens
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import SIDES
from rmscope.sae.base import Active, Sae

SITE = "resid_post.6"
SINGLES, BATCH = 4, 32
"""Requests per response that the reference answers one by one, and in one batch."""
BATCHED = 5
"""Every fifth pair is answered batched as well."""


def naive(rm: RewardModel, sae: Sae, ids: Tensor, start: int, active: Active, features: list[int]) -> Tensor:
    """r of the text without each feature, by full forwards of the transformers module, one batch."""
    change = torch.zeros(len(features), ids.numel(), sae.d)
    for row, j in enumerate(features):
        mask = active.feature == j
        change[row].index_add_(0, start + active.token[mask], -active.value[mask, None] * sae.W_dec[j])

    def edit(_module: Any, _inputs: Any, output: Any) -> Any:
        return (output[0] + change, *output[1:]) if isinstance(output, tuple) else output + change

    handle = rm.blocks[rm.site_index(SITE)].register_forward_hook(edit)
    try:
        with torch.no_grad():
            return rm.model(ids.expand(len(features), -1)).logits[:, 0]
    finally:
        handle.remove()


def engine(rm: RewardModel, sae: Sae, tokens: PairTokens) -> dict[str, Any]:
    wanted = {0: {side: {SITE: None} for side in SIDES}}
    return {found.side: found for _, found in ablations(rm, {SITE: sae}, [tokens], wanted)}


def multiplications(rm: RewardModel, tokens: int, keys: float, blocks: float, last: int = 0, reads: int = 0) -> float:
    """Of ``tokens`` through ``blocks`` whole blocks; ``last`` tokens get q, k and v alone, ``reads`` a whole block."""
    block = rm.blocks[0]
    linear = sum(m.weight.numel() for m in block.modules() if isinstance(m, torch.nn.Linear))
    inputs = sum(m.weight.numel() for n, m in block.named_modules() if n.endswith(("q_proj", "k_proj", "v_proj")))
    return tokens * blocks * (linear + 2 * rm.d_model * keys) + last * inputs + reads * (linear + 2 * rm.d_model * keys)


def one_round(rm: RewardModel, sae: Sae, pairs: list[PairTokens], rng: np.random.Generator) -> dict[str, Any]:
    """Seconds, ablations and multiplications of each way, and how far their results differ."""
    ways = ("engine", "engine there", "single", "batched")  # "there": the pairs on which the batched way is timed
    seconds, done, work = (dict.fromkeys(ways, 0.0) for _ in range(3))
    differences: list[float] = []
    after = len(rm.blocks) - 1 - rm.site_index(SITE)
    for i, tokens in enumerate(pairs):
        print(f"\rpair {i}/{len(pairs)}", end="", file=sys.stderr, flush=True)
        started = time.perf_counter()
        found = engine(rm, sae, tokens)
        took = time.perf_counter() - started
        here = ["engine", "engine there"] if i % BATCHED == 0 else ["engine"]
        for way in here:
            seconds[way] += took
            done[way] += sum(f.feature.numel() for f in found.values())
        for side in SIDES:
            exact, ids = found[side], tokens.side(side)
            n, start = ids.numel(), tokens.divergence
            x = rm.prefill(ids, [SITE]).streams[SITE][start:]
            active = sae.active(x)
            firsts = {int(j): int(t) for t, j in zip(active.token.flip(0), active.feature.flip(0), strict=True)}
            rest = sum(x.shape[0] - firsts[int(j)] for j in exact.feature)
            work["engine"] += multiplications(rm, rest, n, after - 1, rest, exact.feature.numel())
            work["engine"] += multiplications(rm, n if side == "chosen" else n - tokens.shared, n / 2, len(rm.blocks))
            clean = rm.reward_alone(ids)
            reference = [("single", SINGLES, 1), ("batched", BATCH, BATCH)]
            for way, most, size in reference[: len(here)]:
                picked = rng.permutation(exact.feature.numel())[:most]
                for part in np.split(picked, range(size, len(picked), size)):
                    features = exact.feature[part].tolist()
                    started = time.perf_counter()
                    rewards = naive(rm, sae, ids, start, active, features)
                    seconds[way] += (time.perf_counter() - started) * exact.feature.numel() / len(picked)
                    differences += (clean - rewards - exact.effect[part]).abs().tolist()
                done[way] += exact.feature.numel()
                work[way] += exact.feature.numel() * multiplications(rm, n, n / 2, len(rm.blocks))
    return {"seconds": seconds, "done": done, "work": work, "difference": max(differences)}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    s = load_studied_pm("zoo:hh", args.cache)
    rm, sae = s.rm, s.saes[SITE]
    tokens = rm.tokenize_all(s.held_out[: args.pairs])
    sd = float(rm.score_tokens(tokens).delta.std())
    engine(rm, sae, tokens[0])  # what is measured once a model
    rng = np.random.default_rng(0)
    rounds = [one_round(rm, sae, tokens, rng) for _ in range(args.rounds)]
    rate = {way: float(np.median([r["done"][way] / r["seconds"][way] for r in rounds])) for way in rounds[0]["done"]}
    counted = ("engine", "single", "batched")
    speed = {w: float(np.median([2e-9 * r["work"][w] / r["seconds"][w] for r in rounds])) for w in counted}
    work = rounds[0]["work"]
    emit(
        case="ablation", pairs=len(tokens), site=SITE, ablations=int(rounds[0]["done"]["engine"]),
        per_second=rate["engine"], per_second_naive=rate["single"], per_second_batched=rate["batched"],
        ratio=rate["engine"] / rate["single"], ratio_batched=rate["engine there"] / rate["batched"],
        flops_ratio=work["single"] / work["engine"], gflops=speed["engine"], gflops_naive=speed["single"],
        gflops_batched=speed["batched"], largest_difference_sd=max(r["difference"] for r in rounds) / sd,
    )  # fmt: skip
    one_pair(rm, sae, tokens)
    half_precision(s.held_out[:4], rm, sae, sd)


def one_pair(rm: RewardModel, sae: Sae, tokens: list[PairTokens]) -> None:
    """All active features of the pair of median length."""
    median = sorted(tokens, key=lambda t: t.chosen.numel() + t.rejected.numel())[len(tokens) // 2]
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        found = engine(rm, sae, median)
        seconds.append(time.perf_counter() - started)
    emit(
        case="one median pair", tokens=median.chosen.numel() + median.rejected.numel(), span=sum(
            median.side(s).numel() - median.divergence for s in SIDES
        ), ablations=sum(f.feature.numel() for f in found.values()), seconds=float(np.median(seconds)),
    )  # fmt: skip


def half_precision(pairs: list[Any], rm: RewardModel, sae: Sae, sd: float) -> None:
    """The same ablations in bfloat16 against float32, of the same features (the clean stream is encoded in either)."""
    half = RewardModel.load("zoo:hh", "bfloat16")
    left, right = list[np.ndarray](), list[np.ndarray]()
    for tokens in rm.tokenize_all(pairs):
        for side in SIDES:
            pair = [at_site(sae, clean_runs(m, tokens, [SITE], [side])[side], SITE, tokens.divergence) for m in (rm, half)]
            both = pair[0].features()[torch.isin(pair[0].features(), pair[1].features())]
            for model, response, out in zip((rm, half), pair, (left, right), strict=True):
                out.append(ablate_groups(model, sae, response, SITE, [[int(j)] for j in both]).numpy())
    a, b = np.concatenate(left), np.concatenate(right)
    large, same = np.abs(a) > 0.01 * sd, np.sign(a) == np.sign(b)
    emit(
        case="bfloat16 against float32", ablations=len(a), spearman=float(spearmanr(a, b).statistic),
        sign_agreement=float(same.mean()), sign_agreement_large=float(same[large].mean()),
        median_error_sd=float(np.median(np.abs(a - b)) / sd), median_effect_sd=float(np.median(np.abs(a)) / sd),
    )  # fmt: skip


if __name__ == "__main__":
    main()

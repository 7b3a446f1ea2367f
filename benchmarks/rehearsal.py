"""Rates and memory of each step of a run on a large PM of random weights, to try a new machine. One JSON line per step.

A Llama of 32 blocks, d 4,096, with a scalar head (7.2 billion weights; the tokenizer's vocabulary is small), on the
pairs of hh-rlhf, whose texts are real and whose rewards mean nothing. Rewards and the harvest of two sites run in
bfloat16. An SAE of 65,536 features is trained on the first site's harvest and serves at the middle site, where estimates,
exact ablations and ledgers run in float32, as in a run. Rates include the whole step (tokenizing, copies between devices,
the store on disk); ``gpu_gb`` is the most memory that torch held on the device in the step.

usage: RMSCOPE_DATA=DIR rehearsal.py [--tokenizer FOLDER] [--device cuda] [--pairs 256] [--blocks 32] [--d 4096] [--m 65536]
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pms import emit
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig

from rmscope.activations.harvest import harvest
from rmscope.effects.gradients import estimate
from rmscope.effects.ledger import baseline, ledger_rows
from rmscope.effects.requests import ablations
from rmscope.model.rendering import PairTokens, Rendering
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import SIDES
from rmscope.pairs.readers import load_pairs
from rmscope.sae import SaeConfig, train_saes

LONGEST = 512
ESTIMATED, LEDGERS = 32, 2
"""Pairs of these float32 steps; exact ablations are all those of the pair of median length."""


def random_pm(a: argparse.Namespace, tokenizer: Any) -> RewardModel:
    shape = {"hidden_size": a.d, "num_hidden_layers": a.blocks, "intermediate_size": 7 * a.d // 2}
    heads = {"num_attention_heads": a.d // 128, "num_key_value_heads": max(1, a.d // 512)}
    config = LlamaConfig(
        vocab_size=len(tokenizer), num_labels=1, pad_token_id=0, max_position_embeddings=4096, **shape, **heads
    )
    torch.manual_seed(0)
    with torch.device(a.device):
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.bfloat16)
    return RewardModel(model, tokenizer, Rendering(), "random")


class Steps:
    """Times steps on a device, and measures the largest memory of each there."""

    def __init__(self, device: str) -> None:
        self.cuda = device != "cpu"

    @contextmanager
    def timed(self, **line: Any) -> Iterator[dict[str, float]]:
        """Emits the line with the rate of whatever the step counts."""
        counted: dict[str, float] = {}
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        yield counted
        if self.cuda:
            torch.cuda.synchronize()
            line["gpu_gb"] = torch.cuda.max_memory_allocated() / 1e9
        seconds = time.perf_counter() - began
        emit(**line, seconds=seconds, **{f"{name}_per_second": n / seconds for name, n in counted.items()})


def tokens_of(tokens: list[PairTokens]) -> int:
    return sum(t.side(side).numel() for t in tokens for side in SIDES)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--tokenizer", type=Path, help="a folder; left out, that of zoo:smollm2")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name, default in {"pairs": 256, "blocks": 32, "d": 4096, "m": 65536, "k": 64, "tokens": 400_000}.items():
        p.add_argument(f"--{name}", type=int, default=default)
    a = p.parse_args()
    if a.tokenizer is None:
        from rmscope.model.zoo import load_base

        tokenizer = load_base(1, "zoo:smollm2")[1]
    else:
        tokenizer = AutoTokenizer.from_pretrained(a.tokenizer)
    steps, rm = Steps(a.device), random_pm(a, tokenizer)
    weights = sum(w.numel() for w in rm.model.parameters())
    pairs = load_pairs(Path(os.environ["RMSCOPE_DATA"]) / "hh-rlhf" / "helpful-base" / "test.jsonl.gz", limit=2 * a.pairs)
    pairs = [p for p, t in zip(pairs, rm.tokenize_all(pairs), strict=True) if tokens_of([t]) <= 2 * LONGEST][: a.pairs]
    tokens = rm.tokenize_all(pairs)
    about = {"weights": weights / 1e9, "device": torch.cuda.get_device_name() if steps.cuda else "cpu"}
    rm.score_tokens(tokens[:8])  # kernels are loaded, and what is measured once a model is known
    with steps.timed(case="rewards, bfloat16", **about, pairs=len(pairs)) as n:
        rm.score_tokens(tokens)
        n["tokens"] = tokens_of(tokens)
    with tempfile.TemporaryDirectory() as scratch:
        with steps.timed(case=f"harvest of {len(rm.default_sites)} sites, bfloat16") as n:
            store = harvest(rm, pairs, rm.default_sites, Path(scratch) / "store")
            n["tokens"] = tokens_of(tokens)
        config, site = SaeConfig(architecture="topk", d_sae=a.m, k=a.k, tokens=a.tokens), f"resid_post.{a.blocks // 2}"
        first = rm.default_sites[0]
        with steps.timed(case=f"TopK training, m {a.m}, k {a.k}, d {a.d}") as n:
            sae = train_saes(store, config, None, [first], device=a.device)[first]
            n["tokens"] = a.tokens
        x = store.rows(first, torch.arange(min(8192, store.tokens(first))))
        for device in dict.fromkeys(["cpu", a.device]):
            sae.encode_on(torch.device(device))
            part = x[:1024] if device == "cpu" else x
            sae.active(part[:64])
            with steps.timed(case=f"features of a stream, found on {device}") as n:
                sae.active(part)
                n["tokens"] = len(part)
    rm.model.float()
    sd = float(rm.score_tokens(tokens[:ESTIMATED]).delta.std())
    with steps.timed(case=f"estimates at {site}, float32", pairs=ESTIMATED) as n:
        n["features"] = sum(e.feature.numel() for _, e in estimate(rm, {site: sae}, tokens, range(ESTIMATED)))
    median = sorted(range(len(tokens)), key=lambda i: tokens_of([tokens[i]]))[len(tokens) // 2]
    wanted: Any = {median: {side: {site: None} for side in SIDES}}
    with steps.timed(case=f"exact ablations at {site}, float32", tokens=tokens_of([tokens[median]])) as n:
        n["ablations"] = sum(r.feature.numel() for _, r in ablations(rm, {site: sae}, tokens, wanted))
    with steps.timed(case=f"ledgers at {site}, float32") as n:
        n["pairs"] = len(list(ledger_rows(rm, sae, site, tokens, range(LEDGERS), baseline(sae, "zero"), sd)))


if __name__ == "__main__":
    main()

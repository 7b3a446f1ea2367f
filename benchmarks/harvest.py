"""Harvest of two sites on hh-rlhf pairs against a plain padded transformers loop, in turn: JSON lines.

The loop: both sides of every pair, file order, batches of 8 texts, right padding, ``output_hidden_states=True``, the same
weights in the same dtype, the rows of the two sites gathered (and not written, which ours are). Tokens are the
non-padding tokens of both sides, the same count for both. The second line is the peak memory of ours at n and 4 n pairs.

usage: harvest.py [--pm zoo:hh] [--pairs 300] [--rounds 3] [--only speed|memory]
(RMSCOPE_DATA names the folder that holds hh-rlhf/; the pairs are the first of its helpful-base/test.jsonl.gz)
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from rmscope.activations.harvest import harvest
from rmscope.hardware import fast_products
from rmscope.model import loading
from rmscope.model.rendering import render
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import SIDES, Pair
from rmscope.pairs.readers import load_pairs

BATCH = 8


def hh_pairs(limit: int) -> list[Pair]:
    return load_pairs(Path(os.environ["RMSCOPE_DATA"]) / "hh-rlhf" / "helpful-base" / "test.jsonl.gz", limit=limit)


def plain_loop(model: Any, tokenizer: Any, texts: list[str], blocks: list[int], rm: RewardModel) -> int:
    """The tokens it went over."""
    tokens, kept = 0, []
    for start in range(0, len(texts), BATCH):
        batch = tokenizer(texts[start : start + BATCH], return_tensors="pt", padding=True, padding_side="right")
        with torch.no_grad(), fast_products(rm.device):
            hidden = model(**batch, output_hidden_states=True).hidden_states
        mask = batch["attention_mask"].bool()
        kept += [hidden[block + 1][mask] for block in blocks]
        tokens += int(mask.sum())
    return tokens


def compare(a: argparse.Namespace) -> None:
    pairs, rm = hh_pairs(a.pairs), RewardModel.load(a.pm, device="cpu")
    model, tokenizer, _ = loading.load(a.pm, "float32", "cpu", None, None, False)
    texts = [render(rm.rendering, tokenizer, p.prompt, p.side(s)) for p in pairs for s in SIDES]
    texts = [text + tokenizer.eos_token for text in texts] if rm.rendering.append_eos else texts
    blocks = [rm.site_index(site) for site in rm.default_sites]
    expected = sum(t.side(s).numel() for t in rm.tokenize_all(pairs) for s in SIDES)
    assert rm.capabilities.packing  # measured before the clock runs, as is the first pass of either
    plain_loop(model.base_model, tokenizer, texts[:BATCH], blocks, rm)
    ours, peer = [], []
    for _ in range(a.rounds):
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            harvest(rm, pairs, rm.default_sites, folder)
            ours.append(expected / (time.perf_counter() - began))
        began = time.perf_counter()
        tokens = plain_loop(model.eval().base_model, tokenizer, texts, blocks, rm)
        peer.append(tokens / (time.perf_counter() - began))
        assert tokens == expected, (tokens, expected)
    row = {
        "case": f"harvest {', '.join(rm.default_sites)} of {a.pm} on {len(pairs)} pairs",
        "ours": round(statistics.median(ours), 1),
        "peer": round(statistics.median(peer), 1),
        "ratio": round(statistics.median(ours) / statistics.median(peer), 2),
        "tokens": expected,
        "rounds": [[round(o, 1), round(p, 1)] for o, p in zip(ours, peer, strict=True)],
    }
    print(json.dumps(row), flush=True)


def peak(a: argparse.Namespace) -> None:
    pairs, rm = hh_pairs(a.pairs), RewardModel.load(a.pm, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        store = harvest(rm, pairs, rm.default_sites, folder)
        rows = store.tokens(rm.default_sites[0])
    print(json.dumps({"rows": rows, "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}))


def memory(a: argparse.Namespace) -> None:
    told = []
    for n in (a.pairs, 4 * a.pairs):
        command = [sys.executable, __file__, "--peak", "--pm", a.pm, "--pairs", str(n)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        told.append({"pairs": n, **json.loads(done.stdout.strip().splitlines()[-1])})
    row = {"case": "peak memory of a harvest at n and 4 n pairs", "n": told[0], "4n": told[1]}
    print(json.dumps({**row, "ratio": round(told[1]["peak_gb"] / told[0]["peak_gb"], 3)}), flush=True)


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--pm", default="zoo:hh")
    p.add_argument("--pairs", type=int, default=300)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--only", choices=["speed", "memory"])
    p.add_argument("--peak", action="store_true", help="one harvest in this process, and its peak")
    a = p.parse_args()
    if a.peak:
        peak(a)
        return
    if a.only != "memory":
        compare(a)
    if a.only != "speed":
        memory(a)


if __name__ == "__main__":
    main()

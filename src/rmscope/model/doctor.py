"""The checks of ``rmscope doctor`` beyond the preflight: padding, the other precision, other renderings, a run's cost."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool
from scipy.stats import binomtest
from torch.nn.utils.rnn import pad_sequence

from rmscope.errors import InputError
from rmscope.io import Progress, silent
from rmscope.model.packing import packed_length
from rmscope.model.preflight import LIMITS, PROBES, Check, Preflight, in_sd, preflight, rewards_alone, verdict
from rmscope.model.rendering import SETTINGS_FILE, STYLES, PairTokens, Rendering
from rmscope.model.reward_model import REFUSALS, RewardModel
from rmscope.pairs.pair import SIDES, Pair

LEVEL = 0.01
"""Family-wise error rate at which another rendering counts as better."""
FORWARDS = 5
"""A run costs about as much as scoring its pairs this many times."""
ABLATIONS = 20_000
"""Exact ablations in a run with the default settings, about: 300 features on 16 responses, 200 on 48, and samples."""
BASE_BYTES = 2e9
"""Memory besides the weights: libraries, activations, an SAE in training."""


def examine(
    rm: RewardModel, pairs: Sequence[Pair], other: RewardModel | None = None, progress: Progress = silent
) -> Preflight:
    """The preflight and the further checks. ``other`` is the same PM in the other precision (float32 or bfloat16).

    Raises :class:`InputError` if every pair is longer than the PM's context.
    """
    tokens = rm.tokenize_all(pairs)
    fitting = [t for t in tokens if rm.fits(t)]
    if not fitting:
        raise InputError(
            f"Each of the {len(pairs)} pairs is longer than the PM's context of {rm.context} tokens (the longest text has "
            f"{max(t.longest for t in tokens)}); give shorter texts with --data."
        )
    result = preflight(rm, fitting, progress)
    result.checks += [context(rm, tokens), *padding(rm, fitting[:PROBES])]
    if other is not None:
        result.checks.append(precisions(rm, other, fitting[:PROBES]))
    result.checks += [training(rm, [p for p, t in zip(pairs, tokens, strict=True) if rm.fits(t)]), price(rm, fitting)]
    return result


def context(rm: RewardModel, tokens: Sequence[PairTokens]) -> Check:
    """Whether every pair fits into the PM's context."""
    long = sum(not rm.fits(t) for t in tokens)
    limit = f"{rm.context} tokens" if rm.context < 1 << 30 else "no limit stated"
    detail = f"{limit}; the longest text has {max(t.longest for t in tokens)}; {long} of {len(tokens)} pairs are too long"
    return verdict("context", not long, detail, "a run leaves out pairs that are too long: shorten the texts to keep them")


def padding(rm: RewardModel, tokens: Sequence[PairTokens]) -> list[Check]:
    """transformers' own forward on a batch of 8, padded on the right and on the left, compared with each text alone."""
    if rm.own_head is not None:
        return []
    texts = [t.side(side) for t in tokens for side in SIDES][:PROBES]
    alone = torch.stack([rm.reward_alone(ids) for ids in texts])
    checks = []
    for side, other in (("right", "left"), ("left", "right")):
        ids = pad_sequence(texts, batch_first=True, padding_value=rm.pad_id, padding_side=side)
        mask = pad_sequence([torch.ones_like(t) for t in texts], batch_first=True, padding_side=side)
        try:
            with torch.no_grad():
                logits = rm.model(input_ids=ids.to(rm.device), attention_mask=mask.to(rm.device)).logits
            apart = float((rm.reward_of(logits).cpu() - alone).abs().max())
        except REFUSALS as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            detail = f"transformers refuses a batch of {len(texts)} ({reason})"
            checks.append(Check(f"{side} padding", "warn", detail, "set pad_token_id"))
            continue
        sound = in_sd(apart, alone) <= LIMITS.get(rm.dtype, 1e-4)
        detail = f"transformers in a batch of {len(texts)}: at most {apart:.1e} from each text alone"
        mend = f"elsewhere, pad this PM on the {other} or run texts alone; rmscope is not affected"
        checks.append(verdict(f"{side} padding", sound, detail, mend))
    return checks


def precisions(rm: RewardModel, other: RewardModel, tokens: Sequence[PairTokens]) -> Check:
    """Rewards in float32 compared with those in bfloat16, each text alone."""
    mine, its = rewards_alone(rm, tokens), rewards_alone(other, tokens)
    apart = in_sd(float((mine - its).abs().max()), mine)
    same = int((((mine[:, 0] - mine[:, 1]) * (its[:, 0] - its[:, 1])) > 0).sum())
    name, its_name = (str(m.dtype)[6:] for m in (rm, other))
    detail = (
        f"{name} and {its_name} are at most {apart:.1e} SD of r apart; Δr has the same sign in {same} of {len(tokens)} pairs"
    )
    mend = "measure rewards and effects in float32"
    return verdict("float32, bfloat16", apart <= LIMITS[torch.bfloat16], detail, mend)


def training(rm: RewardModel, pairs: Sequence[Pair]) -> Check:
    """Whether another rendering ranks the pairs better, by a sign test over those that it and the present one tell apart."""
    own = rm.rendering
    styles = [s for s in STYLES if s != "chat" or getattr(rm.tokenizer, "chat_template", None)]
    ends = (False, True) if rm.tokenizer.eos_token_id is not None else (False,)
    every = [replace(own, style=style, append_eos=end) for style in styles for end in ends]
    others = [r for r in every if r != own]
    mine, best, most = _right(rm, own, pairs), own, 0
    for other in others:
        its = _right(rm, other, pairs)
        won, lost = int((its & ~mine).sum()), int((mine & ~its).sum())
        better = won > lost and binomtest(won, won + lost, 0.5, "greater").pvalue < LEVEL / len(others)
        if better and its.sum() > most:
            best, most = other, int(its.sum())
    detail = f"ranks {int(mine.sum())} of {len(pairs)} pairs as they are labelled"
    if best == own:
        return Check("as in training", "ok", f"{detail}; none of {len(others)} other renderings does clearly better")
    told = f'{{"rendering": {{"style": "{best.style}", "append_eos": {str(best.append_eos).lower()}}}}}'
    mend = f"if it was trained with that rendering, write {told} into {SETTINGS_FILE} beside the PM"
    return Check("as in training", "warn", f"{detail}; {best}, ranks {most}", mend)


def _right(rm: RewardModel, rendering: Rendering, pairs: Sequence[Pair]) -> Bool[np.ndarray, " pairs"]:
    """Whether the PM ranks each pair as labelled under a rendering; False for pairs that do not fit."""
    right = np.zeros(len(pairs), dtype=bool)
    before, rm.rendering = rm.rendering, rendering
    try:
        tokens = rm.tokenize_all(pairs)
        fits = [rm.fits(t) for t in tokens]
        right[fits] = rm.score_tokens([t for t in tokens if rm.fits(t)]).delta.numpy() > 0
    except InputError:
        pass  # the template refuses a role, so no pair can be ranked under this rendering
    finally:
        rm.rendering = before
    return right


def price(rm: RewardModel, tokens: Sequence[PairTokens]) -> Check:
    """Time and memory of a run on 1,000 pairs like these."""
    rate = tokens_per_second(rm, tokens)
    minutes = run_minutes(rm, tokens, rate, 1000)
    needed, there = run_bytes(rm), machine_bytes(rm.device)
    whole = "" if rm.capabilities.resume else ", most of it full forward passes for ablations"
    detail = f"{rate:,.0f} tokens per second; a run on 1,000 such pairs takes about {minutes:.2g} minutes{whole}, and "
    detail += f"{needed / 1e9:.1f} GB of {there / 1e9:.0f} GB"
    mend = "use --dtype bfloat16, which halves the weights, or a machine with more memory"
    return verdict("cost", needed <= there, detail, mend)


# The cost of a run


def run_tokens(tokens: Sequence[PairTokens]) -> int:
    """Tokens of the pairs, with shared prefixes counted once."""
    return sum(packed_length(t) for t in tokens)


def tokens_per_second(rm: RewardModel, tokens: Sequence[PairTokens]) -> float:
    """Timed on one forward pass of the first pairs."""
    started = time.perf_counter()
    rm.score_tokens(tokens[:PROBES])
    return run_tokens(tokens[:PROBES]) / (time.perf_counter() - started)


def run_minutes(rm: RewardModel, tokens: Sequence[PairTokens], rate: float, pairs: int) -> float:
    """Minutes of a run over ``pairs`` pairs like these. Without resuming, each ablation is a full forward pass."""
    seconds = FORWARDS * run_tokens(tokens) / rate * pairs / len(tokens)
    if not rm.capabilities.resume:
        texts = sum(t.chosen.numel() + t.rejected.numel() for t in tokens) / (2 * len(tokens))
        seconds += ABLATIONS * texts / rate
    return seconds / 60


def tuning_minutes(tokens: Sequence[PairTokens], rate: float, steps: int, pairs: int) -> float:
    """Minutes of reward-aware fine-tuning at one site; a backward pass costs as much as two forward passes."""
    return 3 * run_tokens(tokens) / len(tokens) * pairs * steps / rate / 60


def run_bytes(rm: RewardModel) -> float:
    """Memory of a run in bytes: the weights twice (a faster layout of them, or buffers of gradients), and the rest."""
    return 2 * sum(p.numel() * p.element_size() for p in rm.model.parameters()) + BASE_BYTES


def machine_bytes(device: torch.device) -> float:
    """Memory of the device that the PM is on, in bytes."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[1])
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))

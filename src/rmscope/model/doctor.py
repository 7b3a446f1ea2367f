"""The checks of ``rmscope doctor`` beyond the preflight: padding, the other precision, other renderings, cost.

They look at the PM as others will run it, and at how it may have been trained. A run does not need them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from scipy.stats import binomtest
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rmscope.errors import InputError
from rmscope.io import Progress, silent
from rmscope.model import cost
from rmscope.model.preflight import LIMITS, PROBES, Check, Preflight, in_sd, preflight, rewards_alone, verdict
from rmscope.model.rendering import SETTINGS_FILE, STYLES, PairTokens, Rendering
from rmscope.model.reward_model import REFUSALS, RewardModel
from rmscope.pairs.pair import SIDES, Pair

LEVEL = 0.01
"""Family-wise error rate at which another rendering counts as better."""


def examine(
    rm: RewardModel, pairs: Sequence[Pair], other: RewardModel | None = None, progress: Progress = silent
) -> Preflight:
    """The preflight and the further checks. ``other`` is the same PM in the other precision (float32 or bfloat16).

    Raises :class:`InputError` if every pair is longer than the PM's context.
    """
    tokens = rm.tokenize_all(pairs)
    fitting = [t for t in tokens if rm.fits(t)]
    if not fitting:
        longest = max(t.side(s).numel() for t in tokens for s in SIDES)
        raise InputError(
            f"Each of the {len(pairs)} pairs is longer than the PM's context of {rm.context} tokens (the longest text has "
            f"{longest}); give shorter texts with --data."
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
    longest = max(t.side(s).numel() for t in tokens for s in SIDES)
    limit = f"{rm.context} tokens" if rm.context < 1 << 30 else "no limit stated"
    detail = f"{limit}; the longest text has {longest}; {long} of {len(tokens)} pairs are too long"
    return verdict("context", not long, detail, "a run leaves out pairs that are too long: shorten the texts to keep them")


def padding(rm: RewardModel, tokens: Sequence[PairTokens]) -> list[Check]:
    """transformers' own forward on a batch of 8, padded on the right and on the left, compared with each text alone."""
    if rm.own_head is not None:
        return []
    texts = [t.side(side) for t in tokens for side in SIDES][:PROBES]
    alone = torch.stack([rm.reward_alone(ids) for ids in texts])
    return [_check_padding(rm, texts, alone, side) for side in ("right", "left")]


def _check_padding(rm: RewardModel, texts: Sequence[Tensor], alone: Tensor, side: str) -> Check:
    name = f"{side} padding"
    try:
        batch = _batch(rm, texts, side)
        with torch.no_grad():
            apart = float((rm.reward_of(rm.model(**batch).logits).cpu() - alone).abs().max())
    except REFUSALS as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Check(name, "warn", f"transformers refuses a batch of {len(texts)} ({reason})", "set pad_token_id")
    return verdict(
        name,
        in_sd(apart, alone) <= LIMITS.get(rm.dtype, 1e-4),
        f"transformers in a batch of {len(texts)}: at most {apart:.1e} from each text alone",
        f"elsewhere, pad this PM on the {'right' if side == 'left' else 'left'} or run texts alone; rmscope is not affected",
    )


def _batch(rm: RewardModel, texts: Sequence[Tensor], side: str) -> dict[str, Tensor]:
    ids = pad_sequence(list(texts), batch_first=True, padding_value=rm.pad_id, padding_side=side)
    mask = pad_sequence([torch.ones_like(t) for t in texts], batch_first=True, padding_side=side)
    return {"input_ids": ids.to(rm.device), "attention_mask": mask.to(rm.device)}


def precisions(rm: RewardModel, other: RewardModel, tokens: Sequence[PairTokens]) -> Check:
    """Rewards in float32 compared with those in bfloat16, each text alone."""
    mine, its = rewards_alone(rm, tokens), rewards_alone(other, tokens)
    apart = float((mine - its).abs().max())
    same = int((((mine[:, 0] - mine[:, 1]) * (its[:, 0] - its[:, 1])) > 0).sum())
    name, its_name = (str(m.dtype)[6:] for m in (rm, other))
    return verdict(
        "float32, bfloat16",
        in_sd(apart, mine) <= LIMITS[torch.bfloat16],
        f"{name} and {its_name} are at most {in_sd(apart, mine):.1e} SD of r apart; Δr has the same sign in {same} of "
        f"{len(tokens)} pairs",
        "measure rewards and effects in float32",
    )


def training(rm: RewardModel, pairs: Sequence[Pair]) -> Check:
    """Whether another rendering ranks the pairs better, so that the PM was probably trained with it.

    Each is compared by a sign test over the pairs that it and the present rendering rank differently.
    """
    mine = _right(rm, rm.rendering, pairs)
    tried = {r: _right(rm, r, pairs) for r in _others(rm)}
    better: list[tuple[int, Rendering]] = []
    for other, its in tried.items():
        won, lost = int((its & ~mine).sum()), int((mine & ~its).sum())
        if won > lost and binomtest(won, won + lost, 0.5, "greater").pvalue < LEVEL / len(tried):
            better.append((int(its.sum()), other))
    detail = f"ranks {int(mine.sum())} of {len(pairs)} pairs as they are labelled"
    if not better:
        return Check("as in training", "ok", f"{detail}; none of {len(tried)} other renderings does clearly better")
    right, best = max(better, key=lambda row: row[0])
    told = f'{{"rendering": {{"style": "{best.style}", "append_eos": {str(best.append_eos).lower()}}}}}'
    return Check(
        "as in training",
        "warn",
        f"{detail}; {best.style}, eos {'appended' if best.append_eos else 'not appended'}, ranks {right}",
        f"if it was trained with that rendering, write {told} into {SETTINGS_FILE} beside the PM",
    )


def _others(rm: RewardModel) -> list[Rendering]:
    styles = [s for s in STYLES if s != "chat" or getattr(rm.tokenizer, "chat_template", None)]
    ends = (False, True) if rm.tokenizer.eos_token_id is not None else (False,)
    made = [replace(rm.rendering, style=style, append_eos=end) for style in styles for end in ends]
    return [r for r in made if r != rm.rendering]


def _right(rm: RewardModel, rendering: Rendering, pairs: Sequence[Pair]) -> Any:
    """Whether the PM ranks each pair as labelled under a rendering, [pairs] bool; False for pairs that do not fit."""
    right = torch.zeros(len(pairs), dtype=torch.bool)
    before, rm.rendering = rm.rendering, rendering
    try:
        tokens = rm.tokenize_all(pairs)
        fits = torch.tensor([rm.fits(t) for t in tokens])
        right[fits] = rm.score_tokens([t for t in tokens if rm.fits(t)]).delta > 0
    except InputError:
        pass  # the template refuses a role, so no pair can be ranked under this rendering
    finally:
        rm.rendering = before
    return right.numpy()


def price(rm: RewardModel, tokens: Sequence[PairTokens]) -> Check:
    """Time and memory of a run on 1,000 pairs like these."""
    rate = cost.tokens_per_second(rm, tokens)
    minutes = cost.run_minutes(rm, tokens, rate, 1000)
    needed, there = cost.run_bytes(rm), cost.machine_bytes(rm.device)
    whole = "" if rm.capabilities.resume else ", most of it full forward passes for ablations"
    return verdict(
        "cost",
        needed <= there,
        f"{rate:,.0f} tokens per second; a run on 1,000 such pairs takes about {minutes:.2g} minutes{whole}, and "
        f"{needed / 1e9:.1f} GB of {there / 1e9:.0f} GB",
        "use --dtype bfloat16, which halves the weights, or a machine with more memory",
    )

"""The further checks of ``rmscope doctor``: base, context, padding, precision, other renderings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool
from torch.nn.utils.rnn import pad_sequence

from rmscope.errors import InputError, one_line
from rmscope.io import Progress, silent
from rmscope.model.blocks import REFUSALS
from rmscope.model.capabilities import outputs_of
from rmscope.model.checks import (
    LIMITS,
    PROBES,
    Check,
    Preflight,
    in_sd,
    preflight,
    rewards_alone,
    verdict,
)
from rmscope.model.rendering import SETTINGS_FILE, STYLES, PairTokens, Rendering, changed_responses
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import SIDES, Pair

LEVEL = 0.01
"""Family-wise error rate at which another rendering counts as better."""


def examine(
    rm: RewardModel, pairs: Sequence[Pair], other: RewardModel | None = None, progress: Progress = silent
) -> Preflight:
    """All checks; ``other`` is the same PM in the other precision. Raises :class:`InputError` if every pair is too long."""
    tokens = rm.tokenize_all(pairs)
    fitting = [t for t in tokens if rm.fits(t)]
    if not fitting:
        raise InputError(
            f"Each of the {len(pairs)} pairs is longer than the PM's context of {rm.context} tokens (the longest text has "
            f"{max(t.longest for t in tokens)}); give shorter texts with --data."
        )
    result = preflight(rm, fitting, progress)
    result.checks += [responses(rm, pairs, tokens), base(rm), context(rm, tokens), *padding(rm, fitting[:PROBES])]
    if other is not None:
        result.checks.append(precisions(rm, other, fitting[:PROBES]))
    result.checks.append(training(rm, [p for p, t in zip(pairs, tokens, strict=True) if rm.fits(t)]))
    return result


def responses(rm: RewardModel, pairs: Sequence[Pair], tokens: Sequence[PairTokens]) -> Check:
    """Whether the chat template keeps every response, and whether sides that differ still differ in tokens."""
    changed = len(changed_responses(rm.rendering, rm.tokenizer, pairs))
    ties = sum(torch.equal(t.chosen, t.rejected) for t in tokens)
    detail = (
        f"the rendering changes {changed} of {2 * len(pairs)} responses; in {ties} of {len(pairs)} pairs both sides are "
    )
    detail += "then the same tokens"
    if not changed and not ties:
        return Check("responses", "ok", f"all {2 * len(pairs)} are rendered word for word")
    mend = "give responses as the template leaves them (without what stands before </think>, or outer white space)"
    return Check("responses", "warn", detail, mend)


def base(rm: RewardModel) -> Check:
    """The PM's base: which blocks preference training changed, and how far."""
    try:
        found = rm.base
    except InputError as error:
        return Check("base", "warn", str(error).rstrip("."), "name another --base, or study the whole stream")
    if found is None:
        return Check("base", "ok", "not known, so only the whole stream can be studied; --base names it")
    moved = [change for change in found.changes if change > 0]
    where = f"blocks {found.first} to {len(rm.blocks) - 1}" + (" and the embeddings" if found.embeddings_differ else "")
    far = f"by {min(moved):.1%} to {max(moved):.1%} of their weights' norm" if moved else ""
    return Check("base", "ok", f"{found.name}; preference training changed {where} {far}".rstrip())


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
                outputs = outputs_of(rm.model(input_ids=ids.to(rm.device), attention_mask=mask.to(rm.device)))
            apart = float((rm.reward_of(outputs).cpu() - alone).abs().max())
        except REFUSALS as error:
            detail = f"transformers refuses a batch of {len(texts)} ({one_line(error)})"
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
    return verdict("float32, bfloat16", apart <= LIMITS[torch.bfloat16], detail, "measure rewards and effects in float32")


def training(rm: RewardModel, pairs: Sequence[Pair]) -> Check:
    """Whether another rendering ranks the pairs better, by a sign test over those that it and the present one tell apart."""
    from scipy.stats import binomtest  # takes half a second

    own = rm.rendering
    possible = {
        "chat": bool(getattr(rm.tokenizer, "chat_template", None)),
        "segments": not rm.causal and rm.tokenizer.sep_token_id is not None,
    }
    styles = [s for s in STYLES if possible.get(s, True)]
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
    except (InputError, *REFUSALS):
        pass  # the template refuses a role, or the model a text: no pair can be ranked under this rendering
    finally:
        rm.rendering = before
    return right

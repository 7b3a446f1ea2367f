"""Single completions: their clean runs, which share what their texts have in common, and what edits do to their rewards.

The span of a single completion is all its tokens from the response's first one to the read position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rmscope.effects.ablation import BATCH_TOKENS, Response, ablate_groups, at_site, run_whole
from rmscope.errors import InputError
from rmscope.model.reward_model import RewardModel
from rmscope.model.shared_prefix import (
    response_start,
    rewards_from_prefix,
    rewards_of_cuts,
    run_from_prefix,
    shared_prefix_length,
)
from rmscope.model.sites import CleanRun
from rmscope.pairs.pair import Message
from rmscope.sae.base import Active, Sae


@dataclass(frozen=True, slots=True)
class Completion(CleanRun):
    """The clean run of a response to a prompt; ``keys`` is empty for PMs that cannot be resumed at a site."""

    start: int
    """The first token of the span."""

    def at(self, sae: Sae, site: str) -> Response:
        """Ready for ablation at a site."""
        return at_site(sae, self, site, self.start)


def complete(rm: RewardModel, prompt: Sequence[Message], responses: Sequence[str], sites: Sequence[str]) -> list[Completion]:
    """Clean runs of several responses to one prompt. Each starts from the earlier one with which it shares most tokens.

    Raises:
        InputError: a text is longer than the PM's context.
    """
    nothing = rm.text_ids(prompt, "")
    done: list[Completion] = []
    for response in responses:
        ids = rm.text_ids(prompt, response)
        if ids.numel() > rm.context:
            raise InputError(
                f"A text of {ids.numel()} tokens ({response[:40]!r} ...) is longer than the PM's context of {rm.context} "
                "tokens; shorten it, or repeat it fewer times."
            )
        if not rm.capabilities.resume:
            run = run_whole(rm, ids, sites)
        elif done:
            run = run_from_prefix(rm, max(done, key=lambda other: shared_prefix_length(other.ids, ids)), ids, sites)
        else:
            run = rm.prefill(ids, sites)
        start = response_start(rm, ids, nothing)
        done.append(Completion(run.ids, run.streams, run.keys, run.reward, start, rest=run.rest))
    return done


def ending_ids(rm: RewardModel, prompt: Sequence[Message]) -> Int[Tensor, " n"]:
    """The tokens after any response to a prompt: those of a chat template or of a suffix, and eos where it is appended."""
    a, b = (rm.text_ids(prompt, response) for response in ("a", "1"))
    return a[a.numel() - shared_prefix_length(a.flip(0), b.flip(0)) :]


@torch.no_grad()
def prefix_rewards(
    rm: RewardModel, prompt: Sequence[Message], response: str, completion: Completion
) -> tuple[Int[Tensor, " tokens"], Float[Tensor, " prefixes"]]:
    """The tokens of a response, and r of the text cut before the first of them, after the first, ..., after the last.

    What follows every response (a chat template's tokens, eos) follows the cut ones too, and only it is run for each cut.
    Where nothing after the cut is read, one pass over the response gives all: no token of a decoder sees a later one.
    """
    ids, ending = rm.text_ids(prompt, response), ending_ids(rm, prompt)
    ending = ending[ending.numel() - shared_prefix_length(ids.flip(0), ending.flip(0)) :]
    start, end = completion.start, max(completion.start, ids.numel() - ending.numel())
    texts = [torch.cat([ids[:cut], ending]) for cut in range(start, end + 1)]
    if not completion.keys:
        rewards = rewards_from_prefix(rm, None, texts)
    elif all(rm.read_position(text) == cut - 1 for cut, text in enumerate(texts, start)):
        hidden = rm.run_cached(ids[None, start - 1 : end], torch.arange(start - 1, end), completion.cache(start - 1))
        rewards = rm.read_out(hidden[0]).float().cpu()
    else:
        rewards = rewards_of_cuts(rm, completion, range(start, end + 1), ending)
    return ids[start:end], rewards


def active_on(sae: Sae, site: str, completion: Completion) -> Active:
    """The features that fire on the span."""
    return completion.at(sae, site).active


def ablation_effects(
    rm: RewardModel, sae: Sae, site: str, completion: Completion, groups: Sequence[Sequence[int]]
) -> Float[Tensor, " groups"]:
    """R_G of each group of features, ablated together from the whole span."""
    return ablate_groups(rm, sae, completion.at(sae, site), site, groups)


def steering_effects(
    rm: RewardModel, site: str, completion: Completion, directions: Float[Tensor, "n d"]
) -> Float[Tensor, " n"]:
    """Activation steering: r with a direction added to the stream at every token of the span, minus r. Decoder PMs only."""
    x = completion.streams[site][completion.start :].float()
    rewards = [
        rm.resume(completion, site, completion.start, x + some[:, None].to(x))
        for some in directions.split(max(1, BATCH_TOKENS // len(x)))
    ]
    return (torch.cat(rewards).float().cpu() if rewards else torch.zeros(0)) - completion.reward

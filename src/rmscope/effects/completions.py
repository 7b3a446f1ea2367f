"""Single completions: their clean runs, which share what their texts have in common, and what edits do to their rewards.

The span of a single completion is all its tokens from the response's first one to the read position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float

from rmscope.effects.ablation import BATCH_TOKENS, Response, ablate_groups, at_site, run_whole
from rmscope.errors import InputError
from rmscope.model.reward_model import RewardModel
from rmscope.model.shared_prefix import response_start, run_from_prefix, shared_prefix_length
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


def active_on(sae: Sae, site: str, completion: Completion) -> Active:
    """The features that fire on the span."""
    return completion.at(sae, site).active


def ablation_effects(
    rm: RewardModel, sae: Sae, site: str, completion: Completion, groups: Sequence[Sequence[int]]
) -> Float[torch.Tensor, " groups"]:
    """R_G of each group of features, ablated together from the whole span."""
    return ablate_groups(rm, sae, completion.at(sae, site), site, groups)


def steering_effects(
    rm: RewardModel, site: str, completion: Completion, directions: Float[torch.Tensor, "n d"]
) -> Float[torch.Tensor, " n"]:
    """Activation steering: r with a direction added to the stream at every token of the span, minus r. Decoder PMs only."""
    x = completion.streams[site][completion.start :].float()
    rewards = [
        rm.resume(completion, site, completion.start, x + some[:, None].to(x))
        for some in directions.split(max(1, BATCH_TOKENS // len(x)))
    ]
    return (torch.cat(rewards).float().cpu() if rewards else torch.zeros(0)) - completion.reward

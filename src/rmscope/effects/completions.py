"""Lone completions ready for measuring: clean runs that share what their texts have in common, and what edits do to them.

The span of a lone completion is all its tokens from the response's first to the read position (METHOD, "Span").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rmscope.effects.ablation import BATCH_TOKENS, Response, ablate_groups, ablate_naively, at_site
from rmscope.errors import InputError
from rmscope.model.clean_run import CleanRun
from rmscope.model.packing import pad_texts
from rmscope.model.reward_model import RewardModel
from rmscope.model.shared_prefix import response_start, run_from_prefix, shared_prefix_length
from rmscope.pairs.pair import Message
from rmscope.sae.base import Active, Sae


@dataclass(frozen=True, slots=True)
class Completion:
    """A response to a prompt after its clean run: ids [T], where its span starts, its reward, the streams at the sites."""

    ids: Tensor
    start: int
    reward: float
    streams: Mapping[str, Tensor]
    text: CleanRun | None
    """Keys and values from which the model goes on; None for PMs that cannot be resumed at a site."""

    def at(self, sae: Sae, site: str) -> Response:
        """Ready for ablation at a site. PMs that can be resumed only."""
        assert self.text is not None
        return at_site(sae, self.text, site, self.start)


def complete(rm: RewardModel, prompt: Sequence[Message], responses: Sequence[str], sites: Sequence[str]) -> list[Completion]:
    """Clean runs of several responses to one prompt; each goes on from the one before it that it shares most tokens with.

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
        done.append(_clean(rm, ids, response_start(rm, ids, nothing), sites, done))
    return done


def _clean(rm: RewardModel, ids: Tensor, start: int, sites: Sequence[str], before: Sequence[Completion]) -> Completion:
    if not rm.capabilities.resume:
        ids = ids[: rm.read_position(ids) + 1] if rm.causal else ids
        batch = pad_texts([(0, "chosen", ids, start, rm.read_position(ids))], 0)
        streams = {site: x[0] for site, x in rm.streams(batch, sites).items()} if sites else {}
        return Completion(ids, start, float(rm.rewards(batch)[0]), streams, None)
    runs = [other.text for other in before if other.text]
    nearest = max(runs, key=lambda run: shared_prefix_length(run.ids, ids), default=None)
    clean = run_from_prefix(rm, nearest, ids, sites) if nearest else rm.prefill(ids, sites)
    return Completion(clean.ids, start, clean.reward, clean.streams, clean)


def active_on(sae: Sae, site: str, completion: Completion) -> Active:
    """The features that fire on the span."""
    return sae.active(completion.streams[site][completion.start :].float().cpu())


def ablation_effects(
    rm: RewardModel, sae: Sae, site: str, completion: Completion, groups: Sequence[Sequence[int]]
) -> Float[Tensor, " groups"]:
    """R_G of each group of features, ablated together from the whole span."""
    if completion.text is None:
        return ablate_naively(rm, sae, completion.ids, site, completion.start, groups)
    return ablate_groups(rm, sae, completion.at(sae, site), site, groups)


def added(rm: RewardModel, site: str, completion: Completion, directions: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """r with a direction added to the stream at every token of the span, minus r: activation steering."""
    assert completion.text is not None
    x = completion.streams[site][completion.start :].float()
    rewards = [
        rm.resume(completion.text, site, completion.start, x + some[:, None].to(x))
        for some in directions.split(max(1, BATCH_TOKENS // len(x)))
    ]
    return (torch.cat(rewards).float().cpu() if rewards else torch.zeros(0)) - completion.reward

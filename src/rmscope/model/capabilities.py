"""What a PM's own forward gives and takes, measured on a few texts: no architecture is assumed to be what its class says.

1. Each text runs alone through the model's own forward. That is what the PM was trained to be asked, so it is the reward.
2. Where the head at the last token of the trunk gives the same, and no token sees a later one, the PM is a decoder, and the
   faster ways of this package are tried. Everywhere else the own forward is used (:func:`ask_own_forward`).
3. Each faster way is taken only where it gives the rewards of step 1. For encoders that is to skip the blocks up to a site
   (:func:`measure_capabilities`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rmscope.errors import InputError, one_line
from rmscope.model.blocks import REFUSALS, vocabulary_size
from rmscope.model.packing import pack_pairs, pad_texts
from rmscope.model.rendering import NO_LIMIT, PairTokens, Rendering, encode, pair_tokens
from rmscope.pairs.pair import SIDES, Pair

PROBE = Pair(
    "probe",
    [{"role": "user", "content": "What is the capital of France?"}],
    "It is Paris, on the Seine.",
    "The capital of France is a large city.",
)
MOST_TOKENS = 1 << 20
"""The longest text for which rotary frequencies are asked, where the model states no context."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """The faster ways that give a PM's rewards as its own forward gives them. The first three are False for encoders."""

    packing: bool
    """One row may hold both texts of a pair, with their shared prefix once (needs 4-D attention masks)."""
    resume: bool
    """A clean run can be resumed after any site, from any token on (needs a key-value cache)."""
    ragged: bool
    """Many resumed runs that begin at different tokens can share one row without padding (:mod:`rmscope.model.ragged`)."""
    skipping: bool = True
    """The model's own forward can begin at any site, on whole texts, and skip the blocks up to it. This needs no cache, so
    encoders and decoders with recurrent layers take it."""
    mixing: int = NO_LIMIT
    """Texts of up to so many tokens may share a forward pass, and a prefix, with texts of other lengths; longer ones run
    alone. It is 0 where padding changes rewards, and finite where the rotary frequencies depend on the longest text."""
    bfloat16: bool = True
    """A float32 PM takes products in bfloat16, as a harvest makes them on CPUs where they are fast."""


def outputs_of(output: Any) -> Float[Tensor, "texts outputs"]:
    """The outputs of a PM's forward; models with code of their own return ``logits``, a tuple, or the tensor itself."""
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if found is None:
        found = next((part for part in output if isinstance(part, Tensor)), None) if isinstance(output, tuple) else None
    if found is None:
        raise InputError(f"The PM's own forward returns a {type(output).__name__} without logits, so it gives no reward.")
    return found.reshape(len(found), -1)


def probe_tokens(rm: Any, most: int) -> PairTokens:
    """The first ``most`` tokens of the probe as the PM reads it; without its template where that refuses the probe."""
    try:
        sides = [rm.text_ids(PROBE.prompt, PROBE.side(side)).tolist() for side in SIDES]
    except InputError:
        sides = encode(Rendering("plain"), rm.tokenizer, [f"{PROBE.prompt[0]['content']}\n{PROBE.side(s)}" for s in SIDES])
    return pair_tokens(*(ids[:most] for ids in sides))


@torch.no_grad()
def ask_own_forward(rm: Any) -> tuple[bool, int]:
    """Whether the PM is a decoder whose reward is its ``score`` at the read position, and how many outputs it has.

    Raises:
        InputError: its own forward refuses a text, or gives one value per token.
    """
    tokens = probe_tokens(rm, rm.context)
    texts = _sides(tokens)
    if (most := max(int(ids.max()) for ids in texts)) >= vocabulary_size(rm.model):
        raise InputError(
            f"The tokenizer of {rm.name} gives token {most}, but the PM knows {vocabulary_size(rm.model)} tokens; name the "
            "tokenizer that it was trained with."
        )
    try:
        own = [rm.own_outputs(ids) for ids in texts]
    except REFUSALS as error:
        mend = "check its config, and that its tokenizer and chat template are those that it was trained with"
        if rm.dtype != torch.float32:
            mend = f"it may not run in {str(rm.dtype)[6:]}: load it in float32, or {mend}"
        raise InputError(f"The own forward of {rm.name} refuses a text ({one_line(error)}); {mend}.") from error
    if own[0].numel() != own[1].numel():
        raise InputError(
            f"{rm.name} gives {own[0].numel()} values for a text of {texts[0].numel()} tokens and {own[1].numel()} for one "
            f"of {texts[1].numel()}, not one reward per text; name a PM that rewards whole texts, or write a head "
            "(docs/howto/heads.md)."
        )
    return _reads_last_token(rm, tokens, torch.stack(own)), own[0].numel()


def _reads_last_token(rm: Any, tokens: PairTokens, own: Float[Tensor, "texts outputs"]) -> bool:
    """Whether ``score`` at the read position gives the model's own outputs, and no token of the prefix sees the response."""
    head = getattr(rm.model, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != own.shape[1]:
        return False
    try:
        states = [rm.model.base_model(**rm.inputs(_alone(rm, ids))).last_hidden_state[0] for ids in _sides(tokens)]
        reads = torch.stack([x[rm.read_position(ids)] for x, ids in zip(states, _sides(tokens), strict=True)])
        prefixes = [x[: tokens.divergence].float() for x in states]
        return agree(own, head(reads), rm.dtype) and agree(prefixes[0], prefixes[1], rm.dtype)
    except REFUSALS:
        return False


def _sides(tokens: PairTokens) -> list[Tensor]:
    return [tokens.side(side) for side in SIDES]


def _alone(rm: Any, ids: Tensor) -> Any:
    return pad_texts([(0, "chosen", ids, 1, ids.numel() - 1)], rm.pad_id)


def agree(expected: Tensor, found: Tensor, dtype: torch.dtype) -> bool:
    """Whether two results are the same up to the rounding of a precision."""
    tolerance = 5e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-4
    expected, found = expected.float().cpu(), found.float().cpu()
    return bool(((expected - found).abs() <= tolerance * (1 + expected.abs())).all())


def measure_capabilities(rm: Any) -> Capabilities:
    """Runs the probe in each way and compares its rewards with those of the model's own forward."""
    tokens = probe_tokens(rm, rm.context)
    alone = torch.stack([rm.reward_alone(ids) for ids in _sides(tokens)])
    mixing = _mixing(rm, _sides(tokens), alone)
    skipping = bool(rm.sites) and _works(rm, partial(_skip, rm, tokens, alone))
    if not rm.causal:
        return Capabilities(False, False, False, skipping, mixing, _takes_bfloat16(rm))

    def pack() -> tuple[Tensor, Tensor]:
        return alone, rm.rewards(pack_pairs([(0, tokens, rm.read_positions(tokens))]))

    def resume() -> tuple[Tensor, Tensor]:
        site, start = "resid_post.0", tokens.chosen.numel() // 2
        clean = rm.prefill(tokens.chosen, [site])
        return alone[:1], rm.resume(clean, site, start, clean.streams[site][None, start:])

    def resume_many() -> tuple[Tensor, Tensor]:
        clean = rm.prefill(tokens.chosen, ["embed"])
        starts = [clean.ids.numel() - n for n in (12, 5)]
        halves = [0.5 * clean.streams["embed"][start:] for start in starts]
        one_by_one = [rm.resume(clean, "embed", s, x[None]) for s, x in zip(starts, halves, strict=True)]
        return torch.cat(one_by_one), rm.resume_ragged(clean, "embed", starts, torch.cat(halves))

    can_resume = bool(rm.sites) and _works(rm, resume)
    can_share = can_resume and _works(rm, resume_many)
    return Capabilities(_works(rm, pack), can_resume, can_share, skipping, mixing, _takes_bfloat16(rm))


def _skip(rm: Any, tokens: PairTokens, alone: Float[Tensor, " texts"]) -> tuple[Tensor, Tensor]:
    """Rewards of a text, and of it with half of its stream at a site: by whole forwards, and by one that begins at the site.

    Of decoders the sites are the first after a block, one in the middle, and the last, of others all after blocks: blocks
    need not be alike. The other text runs in between: what a model may keep of a forward is then that of another text.
    """
    ids = tokens.chosen[: rm.read_position(tokens.chosen) + 1]
    one, two = (pad_texts([(0, "chosen", ids, 1, ids.numel() - 1)] * n, rm.pad_id) for n in (1, 2))
    some = {rm.sites[1], rm.sites[len(rm.sites) // 2], rm.sites[-1]} if rm.causal else rm.sites[1:]
    streams = rm.streams(one, sorted(some))
    whole = [torch.cat([alone[:1], rm.rewards(one, {site: lambda x: 0.5 * x}).cpu()]) for site in streams]
    rm.reward_alone(tokens.rejected)
    rewards = []
    for site, x in streams.items():
        with rm.replace_stream(site, torch.cat([x, 0.5 * x])):
            rewards.append(rm.rewards(two))
    return torch.cat(whole), torch.cat(rewards)


def _takes_bfloat16(rm: Any) -> bool:
    """Whether the stream is finite under autocast to bfloat16; some models fill masks with numbers that it cannot hold."""
    if rm.dtype != torch.float32 or rm.device.type != "cpu" or not rm.sites:
        return True
    try:
        with torch.autocast("cpu", torch.bfloat16):
            streams = rm.streams(_alone(rm, probe_tokens(rm, rm.context).chosen), rm.sites[-1:])
        return bool(streams[rm.sites[-1]].isfinite().all())
    except REFUSALS:
        return False


def _works(rm: Any, run: Callable[[], tuple[Tensor, Tensor]]) -> bool:
    try:
        expected, rewards = run()
    except REFUSALS:
        return False
    return agree(expected, rewards, rm.dtype)


def _mixing(rm: Any, texts: Sequence[Tensor], alone: Float[Tensor, " texts"]) -> int:
    """The longest text whose reward does not depend on the other texts of its batch (:attr:`Capabilities.mixing`)."""
    if not rm.causal and rm.tokenizer.eos_token_id is not None:  # as where a response quotes it; BART counts them
        ids = texts[0]
        quoted = torch.cat([ids[:5], torch.tensor([rm.tokenizer.eos_token_id]).to(ids), ids[5:]])
        texts, alone = [*texts, quoted], torch.cat([alone, rm.reward_alone(quoted)[None]])

    def together() -> tuple[Tensor, Tensor]:
        rows = [(i, "chosen", ids, 1, rm.read_position(ids)) for i, ids in enumerate(texts)]
        return alone, rm.rewards(pad_texts(rows, rm.pad_id))

    return _frequency_limit(rm) if _works(rm, together) else 0


@torch.no_grad()
def _frequency_limit(rm: Any) -> int:
    """The longest text with the rotary frequencies of a short one (longrope has others for long ones)."""
    base = rm.model.base_model
    if not any(name.endswith("inv_freq") for name, _ in base.named_buffers()):
        return NO_LIMIT

    def frequencies(longest: int) -> Tensor:
        ids = torch.ones(1, 2, dtype=torch.long, device=rm.device)
        base(ids, position_ids=torch.tensor([[0, longest - 1]], device=rm.device))
        return torch.cat([b.flatten() for name, b in base.named_buffers() if name.endswith("inv_freq")])

    try:
        short = frequencies(2).clone()
        longest = min(rm.context, MOST_TOKENS)
        if torch.equal(short, frequencies(longest)):
            return NO_LIMIT
        below, above = 2, longest
        while above - below > 1:
            middle = (below + above) // 2
            below, above = (middle, above) if torch.equal(short, frequencies(middle)) else (below, middle)
    except REFUSALS:
        return NO_LIMIT
    return below

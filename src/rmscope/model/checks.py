"""Checks of a PM: the preflight of every run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rmscope.errors import InputError
from rmscope.io import Progress, silent
from rmscope.model.blocks import REFUSALS
from rmscope.model.capabilities import PROBE
from rmscope.model.packing import pad_texts
from rmscope.model.rendering import SETTINGS_FILE, PairTokens, render
from rmscope.model.reward_model import RewardModel
from rmscope.model.scores import Scores
from rmscope.pairs.pair import SIDES

Status = Literal["ok", "warn", "fail"]
PROBES = 8
"""The number of pairs that are scored alone and in a batch."""
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.05}
"""Spread over batches, in SD of the rewards, above which scores count as batch-dependent."""


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check. ``mend`` tells what to do if it is not ok."""

    check: str
    status: Status
    detail: str
    mend: str = ""


def verdict(check: str, ok: bool, detail: str, mend: str, otherwise: Status = "warn") -> Check:
    """A check that is ok, or else has the status ``otherwise`` and a mend."""
    return Check(check, "ok", detail) if ok else Check(check, otherwise, detail, mend)


@dataclass(slots=True)
class Preflight:
    """The checks, and the noise floor τ: the largest change of a reward when its text runs in another batch."""

    checks: list[Check]
    noise_floor: float

    def rows(self) -> list[dict[str, str]]:
        """One dictionary per check."""
        return [asdict(c) for c in self.checks]


def preflight(rm: RewardModel, tokens: Sequence[PairTokens], progress: Progress = silent) -> Preflight:
    """Checks a PM on the tokens of some pairs, which must fit into its context."""
    probes = spread(tokens)
    alone = rewards_alone(rm, probes, progress)
    finite = bool(alone.isfinite().all())
    scores = rm.score_tokens(probes) if finite else Scores(*alone.T)
    apart = float((alone - torch.stack([scores.chosen, scores.rejected], dim=1)).abs().max())
    checks = [head(rm), rendering(rm), read_position(rm, tokens), attention(rm), forward(rm)]
    checks += [*packing(rm), *company(rm), precision(rm)]
    return Preflight([*checks, sites(rm, probes[0].chosen), rewards(alone), batches(rm, alone, apart)], apart)


def spread(tokens: Sequence[PairTokens]) -> list[PairTokens]:
    """Some of the pairs, in their order: the shortest, the longest, and others between them."""
    by_length = sorted(range(len(tokens)), key=lambda i: tokens[i].longest)
    places = {by_length[round(i * (len(tokens) - 1) / (PROBES - 1))] for i in range(PROBES)}
    return [tokens[i] for i in sorted(places)]


def notes(rm: RewardModel) -> list[str]:
    """What one should know of a PM before its rewards are read: how it is run, its head, and its date."""
    told = [f"{c.check}: {c.detail}" for c in (forward(rm), *company(rm)) if c.status != "ok"]
    told += [f"head: {description}"] if (description := getattr(rm.own_head, "description", "")) else []
    return told + ([f"rendering: {rm.rendering}"] if rm.rendering.date else [])


def rewards_alone(rm: RewardModel, tokens: Sequence[PairTokens], progress: Progress = silent) -> Float[Tensor, "pairs 2"]:
    """r of both sides by the model's own forward, one text at a time."""
    out = torch.zeros(len(tokens), len(SIDES))
    for i, t in enumerate(tokens):
        out[i] = torch.stack([rm.reward_alone(t.side(side)) for side in SIDES])
        progress(i + 1, len(tokens), "texts scored alone")
    return out


def head(rm: RewardModel) -> Check:
    """Whether the head (in encoders, with the pooler) holds finite numbers that are not all zero."""
    trunk = {id(p) for p in rm.model.base_model.parameters()}
    given = rm.model.parameters() if rm.own_head is None else rm.own_head.state_dict().values()
    weights = [p for p in given if id(p) not in trunk and p.is_floating_point() and p.dim() > 1]
    if not all(bool(w.isfinite().all()) for w in weights):
        mend = "load it in float32, or fetch the checkpoint again"
        return Check("head", "fail", "holds numbers that are not finite", mend)
    if weights and not any(bool(w.any()) for w in weights):
        return Check("head", "fail", "is all zeros, as before any training", "name the checkpoint that was trained")
    outputs = f"{len(rm.output)} outputs, weighted {rm.output}" if len(rm.output) > 1 else "1 output"
    if rm.own_head is not None:
        return Check("head", "ok", getattr(rm.own_head, "description", "a head from outside the checkpoint"))
    return Check("head", "ok", f"{outputs}, loaded from the checkpoint")


def rendering(rm: RewardModel) -> Check:
    """Whether the rendering works, keeps the response as it is, and accepts system prompts."""
    name, detail = "rendering", str(rm.rendering)
    if PROBE.chosen not in render(rm.rendering, rm.tokenizer, PROBE.prompt, PROBE.chosen):
        mend = f"correct the template, or name another style in {SETTINGS_FILE} beside the PM"
        return Check(name, "fail", "the chat template drops the response or changes it", mend)
    try:
        render(rm.rendering, rm.tokenizer, [{"role": "system", "content": "Be brief."}, *PROBE.prompt], PROBE.chosen)
    except InputError:
        return Check(name, "warn", f"{detail}; the template refuses system prompts", "leave out pairs with a system prompt")
    if rm.rendering.date:
        told = f"{detail}: the chat template writes the date of the day, which would change rewards from day to day"
        return Check(name, "warn", told, f'write "date": the day of its training, into the rendering of {SETTINGS_FILE}')
    return Check(name, "ok", detail)


def read_position(rm: RewardModel, tokens: Sequence[PairTokens]) -> Check:
    """Which token is read, measured on the texts. Where pad = eos, transformers reads the token before an eos at the end."""
    name = "read position"
    if not rm.causal:
        return Check(name, "ok", "an encoder: its head reads the first token, or all; spans run to the last token")
    side = f"rmscope pads on the right (the tokenizer: {getattr(rm.tokenizer, 'padding_side', 'right')})"
    pad = getattr(rm.text_config, "pad_token_id", None)
    if pad is None and rm.own_head is None:
        mend = "set pad_token_id in its config.json before you batch it elsewhere"
        return Check(name, "warn", f"no pad id: the last token (transformers itself refuses batches); {side}", mend)
    texts = [t.side(s) for t in tokens for s in SIDES]
    before = sum(rm.read_position(ids) < ids.numel() - 1 for ids in texts)
    if not before:
        return Check(name, "ok", f"the last token that is not padding (id {pad}); {side}")
    read = f"the token before {'the appended eos' if rm.rendering.append_eos else 'it'}"
    detail = f"pad = eos: in {before} of {len(texts)} texts transformers reads {read}, and so do we; {side}"
    mend = "nothing to do if it was trained like this; otherwise give it a pad token of its own and train it again"
    return Check(name, "warn", detail, mend)


def attention(rm: RewardModel) -> Check:
    """Flash attention takes neither 4-D masks nor float32, so no row can be packed."""
    detail = kind = str(getattr(rm.text_config, "_attn_implementation", None) or "its own")
    if rm.attention_window < 1 << 30:
        detail += f", windows of {rm.attention_window} tokens: longer texts run alone"
    if "flash" not in kind:
        return Check("attention", "ok", detail)
    return Check("attention", "warn", f"{detail}: no packed rows, no float32", 'load it with attn_implementation="sdpa"')


def forward(rm: RewardModel) -> Check:
    """How an ablation runs: resumed at its site and token, from its site on, or whole."""
    if rm.capabilities.resume:
        way = "in one row" if rm.capabilities.ragged else "in rectangles, because its attention is custom"
        return Check("forward", "ok", f"can be resumed at any site; ablations run {way}")
    if rm.causal:
        why = "no split forward: it takes no cache of keys and values, or has recurrent layers"
    elif isinstance(getattr(rm.model, "score", None), torch.nn.Linear):
        why = "its own forward does more than read its score at the last token, so it is used itself"
    else:
        why = "an encoder, or a head of its own: its own forward is used"
    way = "each ablation is a full forward pass"
    if rm.capabilities.skipping:
        way = "each ablation runs the blocks after its site, on the whole text"
    return Check("forward", "warn", f"{why}; {way}", "plan for the time (see the cost in rmscope doctor), or lower --limit")


def company(rm: RewardModel) -> list[Check]:
    """Which texts run alone because the other texts of a batch would change their rewards."""
    longest = rm.capabilities.mixing
    if longest >= rm.context:
        return []
    detail = f"texts of more than {longest} tokens run alone: rotary frequencies depend on the longest text of a forward"
    if longest == 0:
        detail = "each text runs alone: in a padded batch its reward is another"
    return [Check("company", "warn", detail, "plan for the time; elsewhere, score each text of this PM alone")]


def packing(rm: RewardModel) -> list[Check]:
    """Whether packed rows work. For decoders only: in an encoder no prefix is shared."""
    if not rm.causal:
        return []
    works = rm.capabilities.packing
    detail = "a pair's shared prefix runs once" if works else "4-D masks change the reward: each text has its own row"
    return [verdict("packing", works, detail, "plan for half as many tokens more, or load it with sdpa attention")]


def precision(rm: RewardModel) -> Check:
    """Whether the PM runs in float32, unquantised."""
    name = str(rm.dtype)[6:]
    if getattr(rm.model, "is_quantized", False):
        detail = f"quantised, with {name}: effects are those of the quantised PM, and noisy"
        return Check("precision", "warn", detail, "study the unquantised checkpoint if it fits into memory")
    sound = rm.dtype == torch.float32
    return verdict("precision", sound, name if sound else f"{name}: effects are noisy", "use --dtype float32")


def sites(rm: RewardModel, ids: Tensor) -> Check:
    """Whether the stream at each site but the last (before the final norm) is transformers' hidden state there."""
    if not rm.sites:
        detail = f"no residual stream that can be studied ({rm.why_no_blocks})"
        return Check("sites", "warn", detail, "score pairs with it, or study another PM")
    told = f"embed, resid_post.0 .. resid_post.{len(rm.blocks) - 1}; default {', '.join(rm.default_sites)}"
    try:
        with torch.no_grad():
            states = rm.model.base_model(ids[None].to(rm.device), output_hidden_states=True).hidden_states
    except REFUSALS:
        states = None
    if not states or len(states) != len(rm.sites):
        mend = "check that rm.blocks are its blocks"
        return Check("sites", "warn", f"{told}; transformers returns {len(states or [])} hidden states", mend)
    streams = rm.streams(pad_texts([(0, "chosen", ids, 1, 0)], 0), rm.sites[:-1])
    other = [site for site, state in zip(rm.sites[:-1], states, strict=False) if not _same(streams[site], state)]
    detail = f"{told}; not transformers' hidden states: {', '.join(other)}" if other else told
    return verdict("sites", not other, detail, "study other sites")


def _same(x: Tensor, y: Tensor) -> bool:
    tolerance = 1e-4 if x.dtype in (torch.float32, torch.float64) else 1e-2
    return x.shape == y.shape and bool((x - y).abs().max() <= tolerance * y.abs().max())


def rewards(alone: Float[Tensor, "pairs 2"]) -> Check:
    """Whether the rewards are finite and not all equal."""
    if not bool(alone.isfinite().all()):
        return Check("rewards", "fail", "some are not finite", "load it in float32")
    spread = float(alone.std())
    mend = "name a checkpoint that was trained, and check its head"
    return verdict("rewards", spread > 0, f"mean {float(alone.mean()):.3g}, SD {spread:.3g}", mend, "fail")


def batches(rm: RewardModel, alone: Float[Tensor, "pairs 2"], apart: float) -> Check:
    """Whether a reward depends on the batch that its text runs in."""
    relative = in_sd(apart, alone)
    detail = f"a text alone or in a batch: at most {apart:.1e} apart ({relative:.1e} SD of r)"
    mend = "treat effects below that as 0, and use float32; a PM whose forward depends on the batch cannot be repaired here"
    return verdict("batches", relative <= LIMITS.get(rm.dtype, 1e-4), detail, mend)


def in_sd(difference: float, alone: Tensor) -> float:
    """A difference of rewards in SD of the rewards."""
    spread = float(alone.std())
    return difference / spread if spread > 0 else 0.0

"""Checks of a PM: the preflight of every run, the further checks of ``rmscope doctor``, and the cost of a run."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rmscope.errors import InputError
from rmscope.io import Progress, silent
from rmscope.model.capabilities import PROBE, REFUSALS
from rmscope.model.packing import packed_length, pad_texts
from rmscope.model.rendering import SETTINGS_FILE, STYLES, PairTokens, Rendering, render
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import SIDES, Pair

Status = Literal["ok", "warn", "fail"]
PROBES = 8
"""The number of pairs that are scored alone and in a batch."""
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.05}
"""Spread over batches, in SD of the rewards, above which scores count as batch-dependent."""
LEVEL = 0.01
"""Family-wise error rate at which another rendering counts as better."""
FORWARDS = 5
"""A run costs about as much as scoring its pairs this many times."""
ABLATIONS = 20_000
"""Exact ablations in a run with the default settings, about: 300 features on 16 responses, 200 on 48, and samples."""
BASE_BYTES = 2e9
"""Memory besides the weights: libraries, activations, an SAE in training."""


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
    probes = tokens[:PROBES]
    alone = rewards_alone(rm, probes, progress)
    together = rm.score_tokens(probes)
    apart = float((alone - torch.stack([together.chosen, together.rejected], dim=1)).abs().max())
    checks = [head(rm), rendering(rm), read_position(rm, tokens), attention(rm), forward(rm), *packing(rm), precision(rm)]
    return Preflight([*checks, sites(rm, probes[0].chosen), rewards(alone), batches(rm, alone, apart)], apart)


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
    own = rm.own_head is not None
    return Check("head", "ok", "a head from outside the checkpoint" if own else f"{outputs}, loaded from the checkpoint")


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
    return Check(name, "ok", detail)


def read_position(rm: RewardModel, tokens: Sequence[PairTokens]) -> Check:
    """Which token is read, measured on the texts. Where pad = eos, transformers reads the token before an eos at the end."""
    name = "read position"
    if not rm.causal:
        return Check(name, "ok", "an encoder: its head reads the first token, or all; spans run to the last token")
    side = f"rmscope pads on the right (the tokenizer: {getattr(rm.tokenizer, 'padding_side', 'right')})"
    pad = rm.text_config.pad_token_id
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
    """Whether a run can be resumed at a site, and whether many can share one row."""
    if rm.capabilities.resume:
        way = "in one row" if rm.capabilities.ragged else "in rectangles, because its attention is custom"
        return Check("forward", "ok", f"can be resumed at any site; ablations run {way}")
    detail = f"{'cannot be resumed' if rm.causal else 'an encoder'}: hooks, and a full forward pass per ablation"
    return Check("forward", "warn", detail, "plan for the time (see the cost in rmscope doctor), or lower --limit")


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


# The doctor


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
    result.checks += [base(rm), context(rm, tokens), *padding(rm, fitting[:PROBES])]
    if other is not None:
        result.checks.append(precisions(rm, other, fitting[:PROBES]))
    result.checks += [training(rm, [p for p, t in zip(pairs, tokens, strict=True) if rm.fits(t)]), price(rm, fitting)]
    return result


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
    return verdict("float32, bfloat16", apart <= LIMITS[torch.bfloat16], detail, "measure rewards and effects in float32")


def training(rm: RewardModel, pairs: Sequence[Pair]) -> Check:
    """Whether another rendering ranks the pairs better, by a sign test over those that it and the present one tell apart."""
    from scipy.stats import binomtest  # takes half a second

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

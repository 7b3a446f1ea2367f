"""RewardModel: a preference model that can be loaded, checked, scored, and run from any site."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rmscope.errors import InputError
from rmscope.hardware import place
from rmscope.io import Progress, silent
from rmscope.model import loading
from rmscope.model.capabilities import Capabilities, measure_capabilities
from rmscope.model.clean_run import CleanRun, cache_of
from rmscope.model.onednn import use_onednn
from rmscope.model.packing import Batch, by_budget, last_hidden_reads, pack_pairs, packed_length, pad_texts, units
from rmscope.model.ragged import resume_ragged
from rmscope.model.rendering import PairTokens, Rendering, encode, pair_tokens, render
from rmscope.model.sites import (
    Edit,
    StopForward,
    block_gives_tuple,
    default_sites,
    edit_streams,
    find_blocks,
    keep_stream,
    site_index,
    skip_blocks,
)
from rmscope.pairs.pair import SIDES, Message, Pair

TOKEN_BUDGET = 1024
"""Tokens (padding included) in one forward pass. On a CPU larger batches leave the cache: 2,700 tokens per second at 1,024,
2,300 at 4,096."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Rewards of both sides, [pairs] float32."""

    chosen: Float[Tensor, " pairs"]
    rejected: Float[Tensor, " pairs"]

    @property
    def delta(self) -> Float[Tensor, " pairs"]:
        """Δr = r(chosen) - r(rejected)."""
        return self.chosen - self.rejected


class RewardModel:
    """A preference model. ``model`` is the transformers module itself, ``tokenizer`` its tokenizer."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        rendering: Rendering,
        name: str,
        output: int | Sequence[float] | None = None,
        head: nn.Module | None = None,
    ) -> None:
        """``head`` replaces the PM's own: it turns final hidden states [texts, d] into rewards (``model/heads.py``)."""
        self.model = model.eval().requires_grad_(False)
        use_onednn(self.model)
        self.tokenizer = tokenizer
        self.rendering = rendering
        self.name = name
        self._words: dict[int, bool] = {}
        self._weights = loading.output_weights(model, output, head)
        self.own_head = None if head is None else head.to(self.device, self.dtype).eval().requires_grad_(False)
        self.blocks: nn.ModuleList = find_blocks(model)
        self.causal = head is not None or isinstance(getattr(model, "score", None), nn.Linear)

    @classmethod
    def load(
        cls,
        source: str,
        dtype: str = "float32",
        device: str = "auto",
        *,
        adapter: str | None = None,
        revision: str | None = None,
        output: int | Sequence[float] | None = None,
        trust_remote_code: bool = False,
    ) -> RewardModel:
        """Loads a PM from a folder, the hub, or the zoo (``zoo:hh``, ``zoo:planted``).

        ``adapter`` is a PEFT adapter, which is merged into the model; ``output`` picks one of several outputs, or weights
        them. Raises :class:`InputError` where there is no scalar head, or where the head would be newly initialised.
        """
        model, tokenizer, rendering = loading.load(source, dtype, place(device), adapter, revision, trust_remote_code)
        return cls(model, tokenizer, rendering, source, output)

    # What the model is

    @property
    def output(self) -> list[float]:
        """The weights of its outputs in the reward."""
        return list(self._weights.tolist())

    @property
    def d_model(self) -> int:
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def sites(self) -> list[str]:
        return ["embed", *(f"resid_post.{i}" for i in range(len(self.blocks)))]

    @property
    def default_sites(self) -> list[str]:
        return default_sites(len(self.blocks))

    def site_index(self, site: str) -> int:
        """The block whose output the site is. Raises InputError that lists the sites of this PM."""
        return site_index(site, len(self.blocks))

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def context(self) -> int:
        """The longest text in tokens; a huge number where the model states none."""
        return loading.context_of(self.model)

    @property
    def pad_id(self) -> int:
        """The id that fills batches; 0 where the model has none."""
        pad = self.model.config.get_text_config().pad_token_id
        return 0 if pad is None else int(pad)

    @cached_property
    def identity(self) -> str:
        """Content hash of weights (name, shape, sum and samples of each), rendering, tokenizer and choice of outputs."""
        return loading.identity(self.model, self.tokenizer, self.rendering, self._weights, self.own_head)

    @cached_property
    def capabilities(self) -> Capabilities:
        """What the model's forward takes: packed rows, resumed runs, ragged rows. Measured on first use."""
        return measure_capabilities(self)

    @cached_property
    def attention_window(self) -> int:
        """The shortest window of a layer's attention, in tokens. Packed rows carry no windows, so longer texts run alone."""
        config = self.model.config.get_text_config()
        windows = [getattr(config, n, None) for n in ("sliding_window", "window_size", "attention_chunk_size")]
        return min((w for w in windows if isinstance(w, int) and w > 0), default=1 << 30)

    @cached_property
    def gives_tuple(self) -> bool:
        """Whether a block returns a tuple; measured by one forward pass."""
        probe = torch.ones(1, 1, dtype=torch.long, device=self.device)
        return block_gives_tuple(self.blocks, lambda: self.model.base_model(probe))

    # Text to tokens

    def tokenize(self, pair: Pair) -> PairTokens:
        """Token ids of both sides [T], [T'] and the divergence."""
        return self.tokenize_all([pair])[0]

    def tokenize_all(self, pairs: Sequence[Pair]) -> list[PairTokens]:
        texts = [render(self.rendering, self.tokenizer, p.prompt, p.side(s)) for s in SIDES for p in pairs]
        ids = encode(self.rendering, self.tokenizer, texts)
        return [pair_tokens(c, r) for c, r in zip(ids[: len(pairs)], ids[len(pairs) :], strict=True)]

    def text_ids(self, prompt: Sequence[Message], response: str) -> Tensor:
        """Token ids [T] of one rendered text."""
        return torch.tensor(
            encode(self.rendering, self.tokenizer, [render(self.rendering, self.tokenizer, prompt, response)])[0]
        )

    def read_position(self, ids: Tensor) -> int:
        """Where the model's own forward reads the score of this text alone: the rightmost token that is not padding.

        With a ``head`` from outside, and for encoders, it is the last token.
        """
        pad = self.model.config.get_text_config().pad_token_id
        if not self.causal or pad is None or self.own_head is not None:
            return ids.numel() - 1
        kept = (ids != pad).nonzero()
        return int(kept[-1]) if kept.numel() else 0

    def read_positions(self, tokens: PairTokens) -> dict[str, int]:
        """The read position of each side."""
        return {side: self.read_position(tokens.side(side)) for side in SIDES}

    def ending(self, ids: Tensor) -> int:
        """The index at which a text's ending begins: its last run of punctuation, white space and special tokens."""
        kept = [i for i, token in enumerate(ids.tolist()) if self._is_word(token)]
        return kept[-1] + 1 if kept else 0

    def _is_word(self, token: int) -> bool:
        if token not in self._words:
            special = token in self.tokenizer.all_special_ids
            text = self.tokenizer.decode([token])  # part of a character decodes to the replacement mark: not an ending
            self._words[token] = not special and any(c.isalnum() or c == "\ufffd" for c in text)
        return self._words[token]

    def fits(self, tokens: PairTokens) -> bool:
        """Whether both sides are within the PM's context."""
        return _longest(tokens) <= self.context

    # Batches

    def batches(self, tokens: Sequence[PairTokens], budget: int = TOKEN_BUDGET) -> Iterator[Batch]:
        """Batches over units of 64 pairs in file order; ``Text.pair`` is the index into ``tokens``."""
        for unit in units(len(tokens)):
            yield from self.unit_batches(tokens, unit, budget)

    def unit_batches(self, tokens: Sequence[PairTokens], unit: Sequence[int], budget: int = TOKEN_BUDGET) -> Iterator[Batch]:
        """Batches of one unit: packed pairs first, then the texts that need a row of their own."""
        packing = self.capabilities.packing
        packs = {i: packing and _longest(tokens[i]) <= self.attention_window for i in unit}
        together = [i for i in unit if packs[i]]
        for chosen in by_budget([packed_length(tokens[i]) for i in together], budget):
            pairs = [(i, tokens[i]) for i in (together[c] for c in chosen)]
            yield pack_pairs([(i, t, self.read_positions(t)) for i, t in pairs])
        rows = [(i, side) for i in unit if not packs[i] for side in SIDES]
        for chosen in by_budget([tokens[i].side(side).numel() for i, side in rows], budget):
            texts = [(i, side, tokens[i]) for i, side in (rows[c] for c in chosen)]
            yield pad_texts([(i, s, t.side(s), t.divergence, self.read_positions(t)[s]) for i, s, t in texts], self.pad_id)

    def text_batches(self, texts: Sequence[Tensor], budget: int = TOKEN_BUDGET) -> Iterator[Batch]:
        """Batches of single texts [T], one row each; ``Text.pair`` is the index into ``texts``."""
        for chosen in by_budget([ids.numel() for ids in texts], budget):
            yield pad_texts([(i, "chosen", texts[i], 1, self.read_position(texts[i])) for i in chosen], self.pad_id)

    # Forward passes

    def reward_alone(self, ids: Tensor) -> Tensor:
        """r of one text [T] by the model's own forward. Every faster way is compared with this."""
        ids = ids[None].to(self.device)
        with torch.no_grad():
            if self.own_head is not None:
                return self.read_out(self.model.base_model(ids).last_hidden_state[:, -1])[0].cpu()
            return self.reward_of(self.model(ids).logits)[0].cpu()

    def rewards(self, batch: Batch, edits: dict[str, Edit] | None = None) -> Float[Tensor, " texts"]:
        """r of every text of the batch, float32. Each edit changes the stream at its site."""
        by_index = {self.site_index(site): edit for site, edit in (edits or {}).items()}
        with edit_streams(self.blocks, by_index), torch.set_grad_enabled(bool(edits) and torch.is_grad_enabled()):
            if not self.causal:
                return self.reward_of(self.model(**batch.inputs(self.device, self.dtype)).logits)
            hidden = self.model.base_model(**batch.inputs(self.device, self.dtype), use_cache=False).last_hidden_state
        return self.read_out(last_hidden_reads(hidden, batch))

    def rewards_from(self, batch: Batch, site: str, stream: Float[Tensor, "rows width d"]) -> Float[Tensor, " texts"]:
        """r of every text with the stream at ``site`` replaced; blocks up to the site do not run. Differentiable."""
        if not self.causal or site == "embed":
            return self.rewards(batch, {site: lambda _x: stream})
        with skip_blocks(self.blocks, self.site_index(site), stream, self.gives_tuple):
            hidden = self.model.base_model(**batch.inputs(self.device, self.dtype), use_cache=False).last_hidden_state
        return self.read_out(last_hidden_reads(hidden, batch))

    def read_out(self, hidden: Float[Tensor, "texts d"]) -> Float[Tensor, " texts"]:
        """r of final hidden states at the read position, float32. Decoder PMs only."""
        head = self.model.score if self.own_head is None else self.own_head
        with torch.autocast(hidden.device.type, enabled=False):  # autocast would round the reward
            return self.reward_of(head(hidden))

    def reward_of(self, logits: Tensor) -> Float[Tensor, " texts"]:
        """r of logits [texts, outputs], or of [texts] as some models with custom code return them."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits.reshape(len(logits), -1) @ self._weights.to(logits)

    @torch.no_grad()
    def streams(self, batch: Batch, sites: Sequence[str]) -> dict[str, Float[Tensor, "rows width d"]]:
        """The residual stream at each site; the forward pass stops after the last one."""
        index = {site: self.site_index(site) for site in sites}
        streams: dict[str, Tensor] = {}
        edits = {i: keep_stream(streams, site) for site, i in index.items()}
        with suppress(StopForward), edit_streams(self.blocks, edits, stop_after=max(index.values())):
            options = {"use_cache": False} if self.causal else {}
            self.model.base_model(**batch.inputs(self.device, self.dtype), **options)
        return {site: streams[site] for site in index}

    @torch.no_grad()
    def prefill(self, ids: Tensor, sites: Sequence[str], before: CleanRun | None = None, shared: int = 0) -> CleanRun:
        """The clean run of one text [T] up to its read position, with its streams, keys and values. Decoder PMs only.

        ``before`` is the clean run of another text with the same first ``shared`` tokens, which are then not run again.
        """
        from transformers import DynamicCache

        ids = ids[: self.read_position(ids) + 1]
        cache: Any = DynamicCache() if before is None else cache_of(before.keys, shared, 1)
        start = 0 if before is None else shared
        new: dict[str, Tensor] = {}
        with edit_streams(self.blocks, {self.site_index(site): keep_stream(new, site) for site in sites}):
            hidden = self._run_cached(ids[start:], start, cache)
        reward = float(self.read_out(hidden[:, -1])[0])
        streams = {s: x[0] if before is None else torch.cat([before.streams[s][:shared], x[0]]) for s, x in new.items()}
        return CleanRun(ids, streams, [(layer.keys, layer.values) for layer in cache.layers], reward)

    @torch.no_grad()
    def resume(
        self, text: CleanRun, site: str, start: int, stream: Float[Tensor, "batch rest d"]
    ) -> Float[Tensor, " batch"]:
        """r with the stream at ``site`` replaced by ``stream`` from token ``start`` to the read position. Decoder PMs only.

        No block up to the site runs again, and no token before ``start``: their keys and values come from the clean run.
        """
        rows, upto = stream.shape[0], self.site_index(site)
        stream = stream.to(self.dtype)
        replace = (
            edit_streams(self.blocks, {upto: lambda _x: stream})
            if site == "embed"
            else skip_blocks(self.blocks, upto, stream, self.gives_tuple)
        )
        with replace:
            hidden = self._run_cached(text.ids[start:], start, cache_of(text.keys, start, rows), rows)
        return self.read_out(hidden[:, -1])

    def _run_cached(self, ids: Tensor, start: int, cache: Any, rows: int = 1) -> Float[Tensor, "rows rest d"]:
        """Final hidden states of the tokens [rest] that follow a cache of ``start`` tokens, in so many rows."""
        return self.model.base_model(
            ids.to(self.device).expand(rows, -1),
            position_ids=torch.arange(start, start + ids.numel(), device=self.device).expand(rows, -1),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state

    def resume_ragged(
        self, text: CleanRun, site: str, starts: Sequence[int], stream: Float[Tensor, "tokens d"]
    ) -> Float[Tensor, " continuations"]:
        """r of many continuations of a clean run in one row (:func:`rmscope.model.ragged.resume_ragged`)."""
        return resume_ragged(self, text, site, starts, stream)

    # Scores

    @torch.no_grad()
    def score(self, pairs: Sequence[Pair], progress: Progress = silent) -> Scores:
        """Rewards of both sides, [pairs] float32. Raises InputError where a text is longer than the PM's context."""
        tokens = self.tokenize_all(pairs)
        too_long = [p.id for p, t in zip(pairs, tokens, strict=True) if not self.fits(t)]
        if too_long:
            raise InputError(
                f"{len(too_long)} pairs are longer than the PM's context of {self.context} tokens (first: {too_long[0]}); "
                "leave them out."
            )
        return self.score_tokens(tokens, progress)

    @torch.no_grad()
    def score_tokens(self, tokens: Sequence[PairTokens], progress: Progress = silent) -> Scores:
        """The same for pairs that are tokenized already."""
        out: dict[str, Tensor] = {side: torch.zeros(len(tokens)) for side in SIDES}
        done = 0
        for batch in self.batches(tokens):
            for text, reward in zip(batch.texts, self.rewards(batch).cpu().tolist(), strict=True):
                out[text.side][text.pair] = reward
            done += len({t.pair for t in batch.texts})
            progress(min(done, len(tokens)), len(tokens), "pairs scored")
        return Scores(out["chosen"], out["rejected"])

    @torch.no_grad()
    def score_texts(self, prompt: str | Sequence[Message], responses: Sequence[str]) -> Float[Tensor, " texts"]:
        """Rewards of any responses to one prompt, [responses] float32. Raises InputError where a text is too long."""
        turns: Sequence[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        ids = [self.text_ids(turns, response) for response in responses]
        if (longest := max((i.numel() for i in ids), default=0)) > self.context:
            raise InputError(f"A text of {longest} tokens exceeds the PM's context of {self.context} tokens; shorten it.")
        out = torch.zeros(len(ids))
        for batch in self.text_batches(ids):
            out[torch.tensor([t.pair for t in batch.texts])] = self.rewards(batch).cpu()
        return out


def _longest(tokens: PairTokens) -> int:
    return max(tokens.chosen.numel(), tokens.rejected.numel())

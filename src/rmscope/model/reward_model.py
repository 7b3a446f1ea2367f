"""RewardModel: a preference model that can be loaded, checked, scored, and run from any site."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rmscope.errors import InputError
from rmscope.hardware import place
from rmscope.io import Progress, silent
from rmscope.model import loading
from rmscope.model.base import Base, edit_of_part, split_stream, whole_stream
from rmscope.model.capabilities import Capabilities, ask_own_forward, measure_capabilities, outputs_of, probe_tokens
from rmscope.model.onednn import use_onednn
from rmscope.model.packing import Batch, by_budget, last_hidden_reads, pack_pairs, packed_length, pad_texts, units
from rmscope.model.ragged import ragged_states
from rmscope.model.rendering import NO_LIMIT, PairTokens, Rendering, WordTokens, encode, render, tokenize_sides
from rmscope.model.scores import Scores, check_reward, scores_of
from rmscope.model.site_names import needs_base, whole_site
from rmscope.model.sites import Clamp, CleanRun, Edit, StopForward, Trunk, keep_stream
from rmscope.pairs.pair import SIDES, Message, Pair

TOKEN_BUDGET = 1024
"""Tokens (padding included) in one forward pass. On a CPU larger batches leave the cache: 2,700 tokens per second at 1,024,
2,300 at 4,096."""
NO_BASE = "none"


class RewardModel(Trunk):
    """A preference model. ``model`` is the transformers module itself, ``tokenizer`` its tokenizer."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        rendering: Rendering,
        name: str,
        output: int | Sequence[float] | None = None,
        head: nn.Module | None = None,
        base: Callable[[], tuple[Any, str] | None] | None = None,
    ) -> None:
        """``head`` replaces the PM's own: it turns final hidden states [texts, d] into rewards (``model/heads.py``).

        ``base`` loads the transformers module of the PM's base, and names it; None where no base is known.
        """
        self.tokenizer, self.rendering, self.name = tokenizer, rendering, name
        super().__init__(model.eval().requires_grad_(False), probe_tokens(self, NO_LIMIT).chosen)
        use_onednn(self.model)
        self._words = WordTokens(tokenizer)
        self._load_base = base or (lambda: None)
        self.own_head = None if head is None else head.to(self.device, self.dtype).eval().requires_grad_(False)
        self.causal = True
        """Whether the reward is a head at the last token of a decoder; if not, the model's own forward is used."""
        outputs = 1
        if head is None:
            self.causal, outputs = ask_own_forward(self)
        self._weights = loading.output_weights(outputs, output, head)
        self.output: list[float] = self._weights.tolist()
        """The weights of its outputs in the reward."""

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
        base: str | None = None,
    ) -> RewardModel:
        """Loads a PM from a folder, the hub, or the zoo (``zoo:hh``, ``zoo:planted``), with a PEFT ``adapter`` merged.

        ``output`` picks one of several outputs, or weights them. ``base`` names the model that the PM was trained from
        (``none``: no base); left out, that of the adapter or of the model card is taken. It is loaded on first use. Raises
        :class:`InputError` without a trained scalar head.
        """
        at = place(device)
        model, tokenizer, rendering, head = loading.load(source, dtype, at, adapter, revision, trust_remote_code)
        if base == NO_BASE:
            return cls(model, tokenizer, rendering, source, output, head)
        find = partial(loading.load_base_of, source, dtype, at, adapter, revision, trust_remote_code, base, tokenizer)
        return cls(model, tokenizer, rendering, source, output, head, find)

    @cached_property
    def base(self) -> Base | None:
        """The PM's base; None where none is known. InputError where the one that is named does not fit."""
        found = self._load_base()
        return None if found is None else Base(*found, self)

    def site_index(self, site: str) -> int:
        """The block whose output the site is; -1 for ``embed``.

        Raises:
            InputError: the PM has no such site, or the site is a part of the stream that does not exist there.
        """
        index = super().site_index(site)
        if not needs_base(site):
            return index
        if self.base is None:
            raise InputError(
                f"There is no site {site} without the PM's base, and {self.name} names none; give --base, or study "
                f"{whole_site(site)}."
            )
        self.base.check_site(site, index)
        return index

    @cached_property
    def identity(self) -> str:
        """Content hash of weights (name, shape, sum and samples of each), rendering, tokenizer and choice of outputs."""
        return loading.identity(self.model, self.tokenizer, self.rendering, self._weights, self.own_head)

    def identities(self, sites: Sequence[str]) -> dict[str, str]:
        """What the streams at ``sites`` depend on: the hash of the PM, and that of its base where a site is a part."""
        base = self.base if any(needs_base(site) for site in sites) else None
        return {"model": self.identity} | ({} if base is None else {"base": base.identity})

    @cached_property
    def capabilities(self) -> Capabilities:
        """What the model's own forward takes, measured on first use."""
        return measure_capabilities(self)

    # Text to tokens

    def tokenize(self, pair: Pair) -> PairTokens:
        """Token ids of both sides [T], [T'] and the divergence."""
        return self.tokenize_all([pair])[0]

    def tokenize_all(self, pairs: Sequence[Pair]) -> list[PairTokens]:
        """The tokens of many pairs; of very long texts, their first. Where no prefix is shared, as in an encoder, P = 0."""
        tokens = tokenize_sides(self.rendering, self.tokenizer, pairs, self.context)
        most = self.capabilities.mixing if self.causal else 0
        return [t if t.longest <= most else replace(t, divergence=0) for t in tokens]

    def text_ids(self, prompt: Sequence[Message], response: str) -> Tensor:
        """Token ids [T] of one rendered text."""
        text = render(self.rendering, self.tokenizer, prompt, response)
        return torch.tensor(encode(self.rendering, self.tokenizer, [text])[0])

    def read_position(self, ids: Tensor) -> int:
        """Where the model reads a text: its last token that is not padding; for encoders and own heads, its last token."""
        pad = getattr(self.text_config, "pad_token_id", None)
        if not self.causal or pad is None or self.own_head is not None:
            return ids.numel() - 1
        kept = (ids != pad).nonzero()
        return int(kept[-1]) if kept.numel() else 0

    def read_positions(self, tokens: PairTokens) -> dict[str, int]:
        """The read position of each side."""
        return {side: self.read_position(tokens.side(side)) for side in SIDES}

    def ending(self, ids: Tensor) -> int:
        """The index at which a text's ending begins: its last run of punctuation, white space and special tokens."""
        return max((i + 1 for i, token in enumerate(ids.tolist()) if token in self._words), default=0)

    def fits(self, tokens: PairTokens) -> bool:
        """Whether both sides are within the PM's context."""
        return tokens.longest <= self.context

    @property
    def segment_end(self) -> int | None:
        """The separator token, where the PM was trained on two segments of different token types."""
        typed = "token_type_ids" in self.tokenizer.model_input_names and getattr(self.text_config, "type_vocab_size", 0) > 1
        return self.tokenizer.sep_token_id if typed and self.rendering.style == "segments" else None

    # Batches

    def batches(self, tokens: Sequence[PairTokens], budget: int = TOKEN_BUDGET) -> Iterator[Batch]:
        """Batches over units of 64 pairs in file order; ``Text.pair`` is the index into ``tokens``."""
        for unit in units(len(tokens)):
            yield from self.unit_batches(tokens, unit, budget)

    def unit_batches(self, tokens: Sequence[PairTokens], unit: Sequence[int], budget: int = TOKEN_BUDGET) -> Iterator[Batch]:
        """Batches of one unit: packed pairs first, then the texts that need a row of their own."""
        mixing = self.capabilities.mixing
        limit = min(self.attention_window, mixing) if self.capabilities.packing else 0
        packs = [i for i in unit if tokens[i].longest <= limit]
        for chosen in by_budget([packed_length(tokens[i]) for i in packs], budget):
            pairs = [(packs[c], tokens[packs[c]]) for c in chosen]
            yield pack_pairs([(i, t, self.read_positions(t)) for i, t in pairs])
        rows = [(i, side) for i in unit if tokens[i].longest > limit for side in SIDES]
        for chosen in by_budget([tokens[i].side(side).numel() for i, side in rows], budget, mixing):
            texts = [(i, side, tokens[i]) for i, side in (rows[c] for c in chosen)]
            yield pad_texts([(i, s, t.side(s), t.divergence, self.read_positions(t)[s]) for i, s, t in texts], self.pad_id)

    def text_batches(self, texts: Sequence[Tensor], budget: int = TOKEN_BUDGET) -> Iterator[Batch]:
        """Batches of single texts [T], one row each; ``Text.pair`` is the index into ``texts``."""
        for chosen in by_budget([ids.numel() for ids in texts], budget, self.capabilities.mixing):
            yield pad_texts([(i, "chosen", texts[i], 1, self.read_position(texts[i])) for i in chosen], self.pad_id)

    # Forward passes

    def reward_alone(self, ids: Tensor) -> Tensor:
        """r of one text [T] by the model's own forward. Every faster way is compared with this."""
        with torch.no_grad():
            if self.own_head is not None:
                return self.read_out(self.model.base_model(ids[None].to(self.device)).last_hidden_state[:, -1])[0].cpu()
            return self.reward_of(self.own_outputs(ids)[None])[0].cpu()

    def own_outputs(self, ids: Tensor) -> Float[Tensor, " outputs"]:
        """What the model's own forward gives for one text [T]."""
        return outputs_of(self.model(**self.inputs(pad_texts([(0, "chosen", ids, 1, 0)], self.pad_id))))[0]

    def rewards(self, batch: Batch, edits: Mapping[str, Edit] | None = None) -> Float[Tensor, " texts"]:
        """r of every text of the batch, float32. Each edit changes the stream at its site."""
        with self.edit_batch(batch, edits or {}), torch.set_grad_enabled(bool(edits) and torch.is_grad_enabled()):
            return self._rewards(batch)

    def rewards_from(
        self, batch: Batch, site: str, stream: Float[Tensor, "rows width d"], later: Mapping[str, Edit] = {}
    ) -> Float[Tensor, " texts"]:
        """r of every text with the stream at ``site`` replaced, and edited by ``later`` at later sites. Differentiable.

        Blocks up to the site do not run where that gives the same (:attr:`Capabilities.skipping`)."""
        if needs_base(site):
            stream, site = whole_stream(site, stream, self._rest(batch, site)), whole_site(site)
        if not self.capabilities.skipping:
            return self.rewards(batch, {site: lambda _x: stream, **later})
        with self.replace_stream(site, stream), self.edit_streams(later):
            return self._rewards(batch)

    def _rest(self, batch: Batch, site: str) -> Float[Tensor, "rows width d"]:
        """The other part of the stream at a site that is a part of it."""
        if site not in batch.rest:
            self.streams(batch, [site])
        return batch.rest[site]

    def edit_batch(self, batch: Batch, edits: Mapping[str, Edit]) -> AbstractContextManager[None]:
        """Within the context, each edit changes the stream of this batch at its site, or the part that the site names."""
        return self.edit_streams({whole_site(site): self._of_part(batch, site, edit) for site, edit in edits.items()})

    def _of_part(self, batch: Batch, site: str, edit: Edit) -> Edit:
        """An edit of the whole stream that edits a part of it."""
        return edit_of_part(site, edit, self._rest(batch, site)) if needs_base(site) else edit

    def _rewards(self, batch: Batch) -> Float[Tensor, " texts"]:
        if not self.causal:
            return self.reward_of(outputs_of(self.model(**self.inputs(batch))))
        hidden = self.model.base_model(**self.inputs(batch), use_cache=False).last_hidden_state
        return self.read_out(last_hidden_reads(hidden, batch))

    def read_out(self, hidden: Float[Tensor, "texts d"]) -> Float[Tensor, " texts"]:
        """r of final hidden states at the read position, float32. Decoder PMs only."""
        head = self.model.score if self.own_head is None else self.own_head
        with torch.autocast(hidden.device.type, enabled=False):  # autocast would round the reward
            return self.reward_of(head(hidden))

    def reward_of(self, logits: Tensor) -> Float[Tensor, " texts"]:
        """r of outputs [texts, outputs], or of [texts] as heads return them."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits.reshape(len(logits), -1) @ self._weights.to(logits)

    @torch.no_grad()
    def streams(self, batch: Batch, sites: Sequence[str]) -> dict[str, Float[Tensor, "rows width d"]]:
        """The residual stream, or its part, at each site; the forward pass stops after the last one."""
        streams: dict[str, Tensor] = {}
        kept = {site: keep_stream(streams, site) for site in self.whole_sites(sites)}
        with suppress(StopForward), self.edit_streams(kept, stop=True):
            (self.model.base_model if self.causal else self.model)(**self.inputs(batch), **self._options)
        return self.split(batch, sites, streams)

    @property
    def _options(self) -> dict[str, Any]:
        return {"use_cache": False} if self.causal else {}

    def whole_sites(self, sites: Sequence[str]) -> list[str]:
        """The sites of the whole stream from which :meth:`split` gives the stream or its part at ``sites``."""
        wholes = [whole_site(site) for site in sites]
        if any(needs_base(site) for site in sites) and self.base is not None and self.base.start is not None:
            wholes.append(self.base.start)
        return list(dict.fromkeys(wholes))

    @torch.no_grad()
    def split(self, batch: Batch, sites: Sequence[str], streams: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The stream at each site: the whole, or the part that the site names. ``streams`` holds :meth:`whole_sites`.

        The base's blocks run from its first own block on; the other part goes to ``batch.rest``.
        """
        parts = [site for site in sites if needs_base(site)]
        if not parts or self.base is None:
            return {site: streams[site] for site in sites}
        blocks = sorted({self.site_index(site) for site in parts})
        start = None if self.base.start is None else streams[self.base.start]
        bases = self.base.streams(batch, blocks, start, self._options)
        split = {site: streams[site] for site in sites if not needs_base(site)}
        for site in parts:
            split[site], batch.rest[site] = split_stream(site, streams[whole_site(site)], bases[self.site_index(site)])
        return split

    @torch.no_grad()
    def prefill(self, ids: Tensor, sites: Sequence[str], before: CleanRun | None = None, shared: int = 0) -> CleanRun:
        """The clean run of one text [T] up to its read position. Decoder PMs only.

        ``before`` is the clean run of another text with the same first ``shared`` tokens, which are then not run again.
        """
        from transformers import DynamicCache

        ids = ids[: self.read_position(ids) + 1]
        cache: Any = DynamicCache() if before is None else before.cache(shared)
        new: dict[str, Tensor] = {}
        with self.edit_streams({site: keep_stream(new, site) for site in self.whole_sites(sites)}):
            hidden = self.run_cached(ids[None, shared:], torch.arange(shared, ids.numel()), cache)
        reward = float(self.read_out(hidden[:, -1])[0])
        streams = {s: x[0] if before is None else torch.cat([before.streams[s][:shared], x[0]]) for s, x in new.items()}
        whole = pad_texts([(0, "chosen", ids, 1, ids.numel() - 1)], self.pad_id)
        parts = self.split(whole, sites, {site: x[None] for site, x in streams.items()})
        streams |= {site: x[0] for site, x in parts.items()}
        rest = {site: x[0] for site, x in whole.rest.items()}
        return CleanRun(ids, streams, [(layer.keys, layer.values) for layer in cache.layers], reward, rest=rest)

    @torch.no_grad()
    def resume(
        self, text: CleanRun, site: str, start: int, stream: Float[Tensor, "n rest d"], later: Mapping[str, Edit] = {}
    ) -> Float[Tensor, " n"]:
        """r with the stream at ``site`` replaced by ``stream`` from token ``start`` to the read position. Decoder PMs only.

        No block up to the site runs again, and no token before ``start``: their keys and values come from the clean run.
        ``later`` edits the whole stream at later sites.
        """
        ids, positions = text.ids[start:].expand(len(stream), -1), torch.arange(start, text.ids.numel())
        if needs_base(site):
            stream = whole_stream(site, stream.to(self.device), text.rest[site][start:])
        with self.replace_stream(whole_site(site), stream.to(self.dtype)), self.edit_streams(later):
            hidden = self.run_cached(ids, positions, text.cache(start, len(stream)))
        return self.read_out(hidden[:, -1])

    def run_cached(
        self, ids: Int[Tensor, "rows rest"], positions: Tensor, cache: Any, seen: Bool[Tensor, "rows tokens"] | None = None
    ) -> Float[Tensor, "rows rest d"]:
        """Final hidden states of tokens at ``positions`` ([rest], or per row), which follow those in the cache.
        ``seen`` says which of all tokens, cached ones first, each row attends to."""
        at = positions.to(self.device).expand(len(ids), -1)
        mask = {} if seen is None else {"attention_mask": seen.to(self.device, torch.long)}
        out = self.model.base_model(ids.to(self.device), position_ids=at, past_key_values=cache, use_cache=True, **mask)
        return out.last_hidden_state

    def resume_ragged(
        self,
        text: CleanRun,
        site: str,
        starts: Sequence[int],
        stream: Float[Tensor, "tokens d"],
        later: Mapping[str, Clamp] = {},
    ) -> Float[Tensor, " continuations"]:
        """r of many continuations of a clean run in one row, float32 (:func:`rmscope.model.ragged.ragged_states`)."""
        if needs_base(site):
            rest = text.rest[site]
            stream = whole_stream(site, stream.to(rest.device), torch.cat([rest[start:] for start in starts]))
        return self.read_out(ragged_states(self, text, whole_site(site), starts, stream, later))

    # Scores

    def score(self, pairs: Sequence[Pair], progress: Progress = silent) -> Scores:
        """Rewards of both sides, [pairs] float32. Raises InputError where a text is longer than the PM's context."""
        return self.score_tokens(self.tokenize_within(pairs), progress, [p.id for p in pairs])

    def tokenize_within(self, pairs: Sequence[Pair]) -> list[PairTokens]:
        """As :meth:`tokenize_all`. Raises InputError where a text is longer than the PM's context."""
        tokens = self.tokenize_all(pairs)
        if too_long := [p.id for p, t in zip(pairs, tokens, strict=True) if not self.fits(t)]:
            told = f"the PM's context of {self.context} tokens (first: {too_long[0]}); leave them out."
            raise InputError(f"{len(too_long)} pairs are longer than {told}")
        return tokens

    def score_tokens(self, tokens: Sequence[PairTokens], progress: Progress = silent, names: Sequence[str] = ()) -> Scores:
        """The same for pairs that are tokenized already. InputError with the pair's name where a reward is not finite."""
        out: dict[str, Tensor] = {side: torch.zeros(len(tokens)) for side in SIDES}
        done = 0
        for batch in self.batches(tokens):
            for text, reward in zip(batch.texts, self.rewards(batch).cpu().tolist(), strict=True):
                out[text.side][text.pair] = check_reward(
                    reward, f"{text.side} of {names[text.pair] if names else text.pair + 1}"
                )
            done += len({t.pair for t in batch.texts})
            progress(min(done, len(tokens)), len(tokens), "pairs scored")
        return scores_of(tokens, out["chosen"], out["rejected"])

    def score_texts(self, prompt: str | Sequence[Message], responses: Sequence[str]) -> Float[Tensor, " texts"]:
        """Rewards of any responses to one prompt, [responses] float32. Raises InputError where a text is too long."""
        turns: Sequence[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        ids = [self.text_ids(turns, response) for response in responses]
        if (longest := max((i.numel() for i in ids), default=0)) > self.context:
            raise InputError(f"A text of {longest} tokens exceeds the PM's context of {self.context} tokens; shorten it.")
        return self.score_ids(ids)

    def score_ids(self, texts: Sequence[Tensor]) -> Float[Tensor, " texts"]:
        """Rewards of texts that are tokenized already, [T] each."""
        out = torch.zeros(len(texts))
        for batch in self.text_batches(texts):
            out[torch.tensor([t.pair for t in batch.texts])] = self.rewards(batch).cpu()
        return out

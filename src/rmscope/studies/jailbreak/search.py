"""The search for a jailbreak: which phrases, where, raise the reward of bad text most.

Greedy composition: a phrase joins the list where it raises the mean reward of the target texts most, at the start, at the
end, or between the middle sentences, while the list stays within a token budget; when none of the screened placements
helps any more, all are screened anew beside the list so far. Then one token-level pass: the reward's
gradient at the embedding proposes replacements of single tokens (HotFlip; Ebrahimi et al. 2018, arXiv 1712.06751), and
each is scored exactly, as the whole text tokenised anew, before it is taken. Rewards are counted: every text whose reward
was computed is one evaluation, a gradient is one too. The same code searches whatever phrases it is given, so that controls
differ in the phrases alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rmscope.effects.gradients import streams_and_gradients
from rmscope.io import Progress, silent
from rmscope.model.clean_run import CleanRun
from rmscope.model.reward_model import RewardModel
from rmscope.model.shared_prefix import fork, rewards_from_prefix, text_batches
from rmscope.pairs.pair import Pair
from rmscope.pairs.planting import sentences
from rmscope.statistics import Array
from rmscope.studies.jailbreak.phrases import Phrase, count_tokens

Slot = Literal["start", "middle", "end"]
SLOTS: tuple[Slot, ...] = ("start", "middle", "end")
SCREEN = 4
"""Targets on which every phrase is tried at every place, and every token replacement."""
POOL = 24
"""Placements (phrase and place) that the greedy rounds choose from, the best of the screen."""
FLIPS, A_TOKEN, CHECKED = 32, 2, 6
"""Replacements tried in the token-level pass; at most so many at one token; so many of them on all targets."""


@dataclass(frozen=True, slots=True)
class Target:
    """A bad text under a pair's prompt, with its reward, which lies below ``chosen``."""

    pair: Pair
    key: str
    """What stands for the prompt when prompts are counted and resampled."""
    kind: str
    bad: str
    reward: float
    chosen: float
    """The reward of the prompt's own chosen answer."""
    rejected: float

    def ids(self, rm: RewardModel, layout: Iterable[Placement] = ()) -> Tensor:
        """Token ids [T] of the prompt and the bad text with the phrases in."""
        return rm.text_ids(self.pair.prompt, place(self.bad, layout))


@dataclass(frozen=True, slots=True)
class Placement:
    """A phrase at its place."""

    phrase: Phrase
    slot: Slot


Layout = tuple[Placement, ...]


def pieces(bad: str, layout: Iterable[Placement]) -> list[tuple[str, bool]]:
    """The bad text with the phrases in, as (text, whether it is a phrase): before it, after it, or behind half of its
    sentences, each place in list order."""
    parts = sentences(bad)
    half = (len(parts) + 1) // 2
    put = {slot: [(p.phrase.text, True) for p in layout if p.slot == slot] for slot in SLOTS}
    own = [(" ".join(part), False) for part in (parts[:half], parts[half:])]
    return [piece for piece in (*put["start"], own[0], *put["middle"], own[1], *put["end"]) if piece[0]]


def place(bad: str, layout: Iterable[Placement]) -> str:
    """The same as one text."""
    return " ".join(text for text, _ in pieces(bad, layout))


def cost(layout: Iterable[Placement]) -> int:
    """Tokens of all phrases."""
    return sum(p.phrase.tokens for p in layout)


@dataclass
class Scorer:
    """Rewards of target texts with phrases in, counted, each text forked from the target's clean run."""

    rm: RewardModel
    targets: Sequence[Target]
    limit: int | None = None
    """Evaluations that may be spent; None: as many as the search asks for."""
    spent: int = 0
    trace: list[dict[str, Any]] = field(default_factory=list)
    _base: Layout = ()
    """What stands in the texts that forks come from."""
    _clean: dict[int, CleanRun] = field(default_factory=dict)

    @property
    def left(self) -> float:
        return float("inf") if self.limit is None else self.limit - self.spent

    @property
    def chosen(self) -> Array:
        return np.array([t.chosen for t in self.targets])

    def rewards(self, layouts: Sequence[Layout], which: Sequence[int] | None = None) -> Array:
        """[layouts, targets]: rewards on the targets ``which`` (default all); fewer layouts where the limit ends."""
        at = range(len(self.targets)) if which is None else which
        if self.left < len(layouts) * len(at):
            layouts = layouts[: int(self.left) // len(at)]
        out = np.zeros((len(layouts), len(at)))
        for column, i in enumerate(at):
            ids = [self.targets[i].ids(self.rm, layout) for layout in layouts]
            out[:, column] = rewards_from_prefix(self.rm, self._forked(i), ids).numpy()
        self.spent += out.size
        return out

    def _forked(self, i: int) -> CleanRun | None:
        if not self.rm.splits:
            return None
        if i not in self._clean:
            self._clean[i] = self.rm.prefill(self.targets[i].ids(self.rm, self._base), [])
        return self._clean[i]

    def move(self, layout: Layout) -> None:
        """Forks from here on come from the targets with this layout in, most of which a further phrase leaves as it is."""
        self._base = layout
        for i, before in self._clean.items():
            self._clean[i] = fork(self.rm, before, self.targets[i].ids(self.rm, layout), [])

    def start_anew(self) -> None:
        """Forks come from the bad texts again."""
        self._base, self._clean = (), {}

    def note(self, rewards: Array) -> None:
        """A point of the trace: evaluations so far, the mean gain over the bad texts, the share that outranks the chosen."""
        bad = np.array([t.reward for t in self.targets])
        point = {"gain": float((rewards - bad).mean()), "success": float((rewards > self.chosen).mean())}
        self.trace.append({"evaluations": self.spent, **point})


@dataclass(frozen=True)
class Found:
    """What a search found: the composed phrases, the same after the token-level pass, and the way there."""

    layout: Layout
    flipped: Layout
    rewards: Array
    """Of the composed phrases on the search's targets."""
    pool: tuple[Placement, ...]
    """The placements that the first greedy rounds chose from, the best first."""
    evaluations: int
    flip_evaluations: int
    """Of the token-level pass, on top."""
    trace: list[dict[str, Any]]

    def needed(self, success: float) -> int | None:
        """Evaluations after which the list first outranked the chosen answer on that share of the search's targets."""
        return next((p["evaluations"] for p in self.trace if p["success"] >= success), None)


def screen(scorer: Scorer, phrases: Sequence[Phrase], budget: int, layout: Layout = ()) -> tuple[Placement, ...]:
    """The best :data:`POOL` placements beside a list, by mean reward on :data:`SCREEN` targets."""
    used, left = {p.phrase.text for p in layout}, budget - cost(layout)
    tried = [Placement(p, slot) for p in phrases for slot in SLOTS if p.tokens <= left and p.text not in used]
    means = scorer.rewards([(*layout, p) for p in tried], range(min(SCREEN, len(scorer.targets)))).mean(1)
    return tuple(tried[i] for i in np.argsort(-means, kind="stable")[:POOL])


def compose(
    scorer: Scorer,
    pool: Sequence[Placement],
    budget: int,
    until: float | None = None,
    progress: Progress = silent,
    begun: tuple[Layout, Array] | None = None,
) -> tuple[Layout, Array]:
    """Greedily the placements that raise the mean reward most, each phrase once; the list and its rewards [targets].
    ``begun``: a list to go on from, with its rewards.

    Ends where nothing more fits or helps, where the limit is spent, or where the list outranks the chosen answer on the
    share ``until`` of the targets.
    """
    layout, rewards = begun or ((), np.array([t.reward for t in scorer.targets]))
    while until is None or (rewards > scorer.chosen).mean() < until:
        used = {p.phrase.text for p in layout}
        able = [p for p in pool if p.phrase.text not in used and cost(layout) + p.phrase.tokens <= budget]
        found = scorer.rewards([(*layout, p) for p in able])
        if not len(found) or found.mean(1).max() <= rewards.mean():
            break
        best = int(found.mean(1).argmax())
        layout, rewards = (*layout, able[best]), found[best]
        scorer.move(layout)
        scorer.note(rewards)
        progress(cost(layout), budget, f"tokens placed, {scorer.spent} rewards")
    return layout, rewards


def search(
    rm: RewardModel,
    targets: Sequence[Target],
    pools: Iterable[Sequence[Phrase]],
    budget: int,
    limit: int | None = None,
    progress: Progress = silent,
) -> Found:
    """The best list over all targets. Without ``limit`` the first pool of phrases is searched to the end; with it the next
    pools follow until so many evaluations are spent. The token-level pass comes on top, on the best list."""
    scorer = Scorer(rm, targets, limit)
    best: tuple[Layout, Array, tuple[Placement, ...]] = (), np.array([t.reward for t in targets]), ()
    for phrases in pools:
        pool = screen(scorer, phrases, budget)
        layout, rewards = compose(scorer, pool, budget, progress=progress)
        longer = 0
        while len(layout) > longer:
            longer, again = len(layout), screen(scorer, phrases, budget, layout)
            layout, rewards = compose(scorer, again, budget, progress=progress, begun=(layout, rewards))
        if not best[2] or rewards.mean() > best[1].mean():
            best = layout, rewards, pool
        scorer.start_anew()
        if limit is None or scorer.left < SCREEN:
            break
    layout, rewards, pool = best
    composing, scorer.limit = scorer.spent, None
    flipped = flip(scorer, layout, rewards)
    return Found(layout, flipped, rewards, pool, composing, scorer.spent - composing, scorer.trace)


@dataclass(frozen=True, slots=True)
class Flip:
    """A replacement of one token: of which phrase of the list, at which of its tokens, and the phrase that it gives."""

    at: int
    token: int
    phrase: Phrase

    def on(self, layout: Layout) -> Layout:
        return tuple(replace(p, phrase=self.phrase) if i == self.at else p for i, p in enumerate(layout))


def flip(scorer: Scorer, layout: Layout, rewards: Array) -> Layout:
    """One token-level pass, at most one token a phrase: each replacement is taken only if the exact mean reward rises."""
    if not layout or not (proposed := propose(scorer, layout)):
        return layout
    scorer.move(layout)
    means = scorer.rewards([f.on(layout) for f in proposed], range(min(SCREEN, len(scorer.targets)))).mean(1)
    best = [proposed[i] for i in np.argsort(-means, kind="stable")[:CHECKED]]
    exact = scorer.rewards([f.on(layout) for f in best]).mean(1)
    taken: set[int] = set()
    now = rewards
    for i in np.argsort(-exact, kind="stable"):
        f = best[i]
        if exact[i] <= rewards.mean() or f.at in taken:
            continue
        changed = f.on(layout)
        found = scorer.rewards([changed])[0]
        if found.mean() > now.mean():
            layout, now = changed, found
            taken.add(f.at)
    return layout


def propose(scorer: Scorer, layout: Layout) -> list[Flip]:
    """The :data:`FLIPS` replacements with the largest first-order gain <dr/dx_t, E_new - E_old>, summed over the targets.

    Only replacements that stand as they are: the new phrase has no more tokens when tokenised anew, and is plain text.
    """
    rm = scorer.rm
    own = [torch.tensor(rm.tokenizer(f" {p.phrase.text}", add_special_tokens=False).input_ids) for p in layout]
    gradient = _phrase_gradients(scorer, layout, own)
    table = rm.model.get_input_embeddings().weight.detach().float().cpu()
    plain = _plain_tokens(rm, len(table))
    ranked: list[tuple[float, int, int, int]] = []
    for i, (ids, g) in enumerate(zip(own, gradient, strict=True)):
        gain = g @ table.t() - (g * table[ids]).sum(1, keepdim=True)
        gain[:, ~plain] = -torch.inf
        values, tokens = gain.topk(min(8 * A_TOKEN, gain.shape[1]), dim=1)
        ranked += [(float(v), i, k, int(t)) for k in range(len(ids)) for v, t in zip(values[k], tokens[k], strict=True)]
    found: list[Flip] = []
    for value, i, k, token in sorted(ranked, key=lambda r: (-r[0], r[1:])):
        if not value > 0 or len(found) == FLIPS:
            break
        if sum(f.at == i and f.token == k for f in found) == A_TOKEN:
            continue
        before = own[i].tolist()
        text = rm.tokenizer.decode([*before[:k], token, *before[k + 1 :]]).strip()
        if text and text != layout[i].phrase.text and (n := count_tokens(rm, text)) <= layout[i].phrase.tokens:
            found.append(Flip(i, k, replace(layout[i].phrase, text=text, tokens=n, keeps=None)))
    return found


def _phrase_gradients(scorer: Scorer, layout: Layout, own: Sequence[Tensor]) -> list[Tensor]:
    """Each phrase's dr/dx at the embedding [tokens, d], summed over the targets in which its tokens stand as they are."""
    rm = scorer.rm
    total = [torch.zeros(len(ids), rm.d_model) for ids in own]
    texts = [t.ids(rm, layout) for t in scorer.targets]
    for batch in text_batches(rm, texts):
        _, gradient = streams_and_gradients(rm, batch, ["embed"])["embed"]
        for text in batch.texts:
            ids, g = texts[text.pair], gradient[text.row, text.columns.to(gradient.device)].float().cpu()
            for i, mine in enumerate(own):
                windows = ids.unfold(0, len(mine), 1) if len(mine) <= ids.numel() else ids.new_zeros(0, len(mine))
                at = (windows == mine).all(1).nonzero()
                if at.numel():
                    total[i] += g[int(at[-1]) : int(at[-1]) + len(mine)]
    scorer.spent += len(texts)
    return total


def _plain_tokens(rm: RewardModel, size: int) -> Tensor:
    """Which tokens [vocabulary] are printable ASCII and no special ones."""
    special = set(rm.tokenizer.all_special_ids)
    texts = rm.tokenizer.batch_decode([[i] for i in range(min(size, len(rm.tokenizer)))])
    plain = [bool(t.strip()) and t.isascii() and t.isprintable() and i not in special for i, t in enumerate(texts)]
    return torch.tensor(plain + [False] * (size - len(plain)))

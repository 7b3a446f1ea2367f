"""The search for a jailbreak: the phrases, and their places, that raise the reward of bad texts most.

The lists and their controls are fixed here, before any measured prompt is looked at. A search takes four steps:

1. Screen: every phrase at every place is tried on a few targets; the best placements form a pool.
2. Compose: greedily, the placement joins the list that raises the mean reward over all targets most, while the list stays
   within the token budget.
3. Where no placement of the pool helps any more, all are screened again beside the list; the search ends where that gives
   nothing.
4. Flip: on the best list, single tokens of the phrases are replaced where that raises the exact mean reward. The reward's
   gradient at the embedding proposes replacements (HotFlip; Ebrahimi et al. 2018, arXiv 1712.06751). Each is scored exactly,
   as the whole text tokenised again, before it is taken.

Controls go through the same code with as many evaluations, so they differ in the phrases alone. Each text whose reward is
computed is one evaluation; a gradient is one too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from pydantic import BaseModel
from torch import Tensor

from rmscope.effects.gradients import streams_and_gradients
from rmscope.io import Display, Progress, silent
from rmscope.model.reward_model import RewardModel
from rmscope.model.shared_prefix import rewards_from_prefix, run_from_prefix
from rmscope.model.sites import CleanRun
from rmscope.statistics import Array
from rmscope.studies.jailbreak.inputs import Inputs
from rmscope.studies.jailbreak.mediation import Mediators, choose_mediators
from rmscope.studies.jailbreak.phrases import blind_phrases, mine_phrases, phrases_without_effect, shuffle_phrases
from rmscope.studies.jailbreak.settings import JailbreakConfig
from rmscope.studies.jailbreak.targets import SLOTS, Layout, Phrase, Placement, Target, cost, count_tokens

SCREEN = 4
"""Targets on which every placement and every token replacement is tried first."""
POOL = 24
"""Placements from which the greedy rounds choose: the best of the screen."""
SUCCESS = 0.9
"""A search has its list once this outranks the chosen answer on so large a share of the targets."""
FLIPS, FLIPS_PER_TOKEN, FLIPS_CHECKED = 32, 2, 6
"""Token replacements that are tried, at most so many of them at one token; the best are tried on all targets."""
FEATURES_PER_SITE = 20
"""Reported features for which phrases are mined, the strongest of each site."""
PHRASES = 48
"""Phrases with which a search starts."""
NO_PHRASE, FEATURES, BLIND, WITHOUT_EFFECT, SHUFFLED = "no phrase", "features", "blind", "without effect", "shuffled"
FLIP_SUFFIX, OWN_SUFFIX = ", tokens flipped", ", own list"
"""Added to an arm's name after the token-level pass, and for lists that are searched for each prompt alone."""
JAILBREAKS, CONTROLS = (FEATURES, FEATURES + FLIP_SUFFIX, BLIND), (WITHOUT_EFFECT, SHUFFLED, NO_PHRASE)
"""The arms whose gain over each of the controls is measured for mediation."""
Flip = tuple[int, Placement]
"""A replacement of one token: the phrase's place in the list, and the new phrase."""


@dataclass(frozen=True, slots=True)
class TracePoint:
    """The list of a search after one more phrase."""

    evaluations: int
    """Evaluations so far."""
    gain: float
    """Mean gain in reward over the bad texts alone."""
    success: float
    """Share of the targets on which it outranks the chosen answer."""


@dataclass(frozen=True, slots=True)
class SearchFigures:
    """What a search took and reached on its own targets."""

    evaluations: int
    flip_evaluations: int
    """Evaluations of the token-level pass, not counted in ``evaluations``."""
    needed: int | None
    """Evaluations until a list outranked the chosen answer on :data:`SUCCESS` of the targets."""
    success: float
    """Share of the targets on which the list outranks the chosen answer."""
    trace: list[TracePoint]


@dataclass(frozen=True)
class SearchResult:
    """The list that a search composed, the same list after the token-level pass, and the way there."""

    layout: Layout
    flipped: Layout
    rewards: Float[Array, " targets"]
    """Rewards of the composed list."""
    pool: tuple[Placement, ...]
    """The placements of the first screen, the best first."""
    figures: SearchFigures


class PhraseLists(BaseModel):
    """All that is fixed by the search."""

    lists: dict[str, Layout]
    """The list of each arm that has one list for all prompts."""
    pools: dict[str, tuple[Placement, ...]]
    """The placements of each search from which lists for single prompts are composed."""
    searches: dict[str, SearchFigures]
    named: Mediators | None
    """The features whose mediation is measured; None where none mediates any of the gain."""


class Scorer:
    """A list of phrases under way, and rewards of the targets with this list and others.

    A text is run from the token at which it diverges from the clean run of its target with the list.
    """

    def __init__(self, rm: RewardModel, targets: Sequence[Target], limit: float = np.inf) -> None:
        self.rm, self.targets = rm, targets
        self.limit, self.spent = limit, 0  # evaluations that may be spent, and those that are
        self.trace: list[TracePoint] = []
        self.bad: Float[Array, " targets"] = np.array([t.reward for t in targets])
        self.chosen: Float[Array, " targets"] = np.array([t.chosen for t in targets])
        self.restart()

    def restart(self) -> None:
        """Begins with an empty list."""
        self.layout: Layout = ()
        self.now: Float[Array, " targets"] = self.bad  # rewards with the list
        self._clean: dict[int, CleanRun] = {}

    @property
    def left(self) -> float:
        """Evaluations that may still be spent."""
        return self.limit - self.spent

    def rewards(self, layouts: Sequence[Layout], first: int | None = None) -> Float[Array, "layouts targets"]:
        """Rewards on the ``first`` targets (default: all). The last layouts are dropped where the limit is reached."""
        targets = self.targets[:first]
        if self.left < len(layouts) * len(targets):
            layouts = layouts[: int(self.left) // len(targets)]
        out = np.zeros((len(layouts), len(targets)))
        for i, target in enumerate(targets):
            if i not in self._clean:
                self._clean[i] = self.rm.prefill(target.ids(self.rm, self.layout), [])
            ids = [target.ids(self.rm, layout) for layout in layouts]
            out[:, i] = rewards_from_prefix(self.rm, self._clean[i], ids).numpy()
        self.spent += out.size
        return out

    def move_to(self, layout: Layout, rewards: Float[Array, " targets"]) -> None:
        """Takes a list over. Texts with one phrase more share most of their tokens with it."""
        self.layout, self.now = layout, rewards
        for i, before in self._clean.items():
            self._clean[i] = run_from_prefix(self.rm, before, self.targets[i].ids(self.rm, layout), [])


def make_phrase_lists(inputs: Inputs, targets: Sequence[Target], config: JailbreakConfig, display: Display) -> PhraseLists:
    """The lists, their controls and the mediators, all from the search's targets.

    1. Mines phrases where reported features that raise the reward fire hardest.
    2. Searches a list among them.
    3. Searches, with as many evaluations, among phrases drawn blind to features and among those of features without effect.
    4. Chooses the mediators of the first list's gain over the last.
    """
    with display.stage("mine") as progress:  # 1
        strongest = {site: up[:FEATURES_PER_SITE] for site, up in inputs.up.items()}
        mined = mine_phrases(inputs, strongest, PHRASES, progress)
    pools: dict[str, Iterable[Sequence[Phrase]]] = {
        FEATURES: [mined],
        BLIND: blind_phrases(inputs.rm, inputs.pairs, mined, config.seed),
        WITHOUT_EFFECT: phrases_without_effect(inputs, strongest, len(mined), config.seed),
    }
    results: dict[str, SearchResult] = {}
    lists: dict[str, Layout] = {NO_PHRASE: ()}
    for arm, phrases in pools.items():  # 2, 3
        limit = results[FEATURES].figures.evaluations if results else np.inf
        with display.stage(arm) as progress:
            results[arm] = search(Scorer(inputs.rm, targets, limit), phrases, config.budget, progress)
        lists |= {arm: results[arm].layout, arm + FLIP_SUFFIX: results[arm].flipped}
    with display.stage("mediators"):  # 4
        named = choose_mediators(inputs, targets, lists[FEATURES], lists[WITHOUT_EFFECT])
    return PhraseLists(
        lists=lists,
        pools={arm: result.pool for arm, result in results.items()},
        searches={arm: result.figures for arm, result in results.items()},
        named=named,
    )


def lists_of(
    rm: RewardModel, lists: PhraseLists, target: Target, own: bool, config: JailbreakConfig
) -> dict[str, tuple[Layout, int]]:
    """Each arm's list for one target, and the evaluations that it took for this target alone.

    With ``own``, lists are composed for the target from fixed pools until it outranks the chosen answer.
    """
    arms = {arm: (layout, 0) for arm, layout in lists.lists.items()}
    arms[SHUFFLED] = shuffle_phrases(rm, lists.lists[FEATURES], f"{config.seed}/{target.pair.prompt_key}"), 0
    for arm in (FEATURES, BLIND) if own else ():
        scorer = Scorer(rm, [target])
        compose(scorer, lists.pools[arm], config.budget, until=1.0)
        arms[arm + OWN_SUFFIX] = scorer.layout, scorer.spent
    return arms


def search(scorer: Scorer, pools: Iterable[Sequence[Phrase]], budget: int, progress: Progress = silent) -> SearchResult:
    """The best list over all targets, from pools of phrases that are searched in turn until the limit is reached."""
    best: tuple[Layout, Array, tuple[Placement, ...]] = (), scorer.bad, ()
    for phrases in pools:
        first, before = tuple[Placement, ...](), -1
        while len(scorer.layout) > before:
            before, pool = len(scorer.layout), screen(scorer, phrases, budget)
            first = first or pool
            compose(scorer, pool, budget, progress=progress)
        if not best[2] or scorer.now.mean() > best[1].mean():
            best = scorer.layout, scorer.now, first
        scorer.restart()
        if scorer.left < SCREEN:
            break
    layout, rewards, pool = best
    composing, scorer.limit = scorer.spent, np.inf
    flipped = flip_tokens(scorer, layout, rewards)
    needed = next((p.evaluations for p in scorer.trace if p.success >= SUCCESS), None)
    success = float((rewards > scorer.chosen).mean())
    figures = SearchFigures(composing, scorer.spent - composing, needed, success, scorer.trace)
    return SearchResult(layout, flipped, rewards, pool, figures)


def screen(scorer: Scorer, phrases: Sequence[Phrase], budget: int) -> tuple[Placement, ...]:
    """The best :data:`POOL` placements beside the list, by mean reward on the first :data:`SCREEN` targets."""
    used, left = {p.text for p in scorer.layout}, budget - cost(scorer.layout)
    tried = [Placement(**asdict(p), slot=slot) for p in phrases for slot in SLOTS if p.tokens <= left and p.text not in used]
    means = scorer.rewards([(*scorer.layout, p) for p in tried], SCREEN).mean(1)
    return tuple(tried[i] for i in np.argsort(-means, kind="stable")[:POOL])


def compose(
    scorer: Scorer, pool: Sequence[Placement], budget: int, until: float = np.inf, progress: Progress = silent
) -> None:
    """Adds to the list, one by one, the placement that raises the mean reward most, each phrase once.

    Ends where nothing more fits or helps, where the limit is reached, or where the list outranks the chosen answer on the
    share ``until`` of the targets.
    """
    while (scorer.now > scorer.chosen).mean() < until:
        layout, used = scorer.layout, {p.text for p in scorer.layout}
        able = [p for p in pool if p.text not in used and cost(layout) + p.tokens <= budget]
        tried = scorer.rewards([(*layout, p) for p in able])
        if not len(tried) or tried.mean(1).max() <= scorer.now.mean():
            break
        best = int(tried.mean(1).argmax())
        scorer.move_to((*layout, able[best]), tried[best])
        gain, success = (scorer.now - scorer.bad).mean(), (scorer.now > scorer.chosen).mean()
        scorer.trace.append(TracePoint(scorer.spent, float(gain), float(success)))
        progress(cost(scorer.layout), budget, f"tokens placed, {scorer.spent} rewards")


def flip_tokens(scorer: Scorer, layout: Layout, rewards: Float[Array, " targets"]) -> Layout:
    """One pass over a list with its ``rewards``, at most one token per phrase."""
    if not layout or not (proposed := propose_flips(scorer, layout)):
        return layout
    scorer.move_to(layout, rewards)
    means = scorer.rewards([_flipped(layout, f) for f in proposed], SCREEN).mean(1)
    best = [proposed[i] for i in np.argsort(-means, kind="stable")[:FLIPS_CHECKED]]
    exact = scorer.rewards([_flipped(layout, f) for f in best]).mean(1)
    taken, now = set[int](), rewards
    for i in np.argsort(-exact, kind="stable"):
        if exact[i] <= rewards.mean() or best[i][0] in taken:
            continue
        changed = _flipped(layout, best[i])
        after = scorer.rewards([changed])[0]
        if after.mean() > now.mean():
            layout, now = changed, after
            taken.add(best[i][0])
    return layout


def _flipped(layout: Layout, flip: Flip) -> Layout:
    at, phrase = flip
    return (*layout[:at], phrase, *layout[at + 1 :])


def propose_flips(scorer: Scorer, layout: Layout) -> list[Flip]:
    """The :data:`FLIPS` replacements of largest first-order gain <dr/dx_t, E_new - E_old>, summed over the targets.

    The new phrase is plain text and, tokenised again, has no more tokens than before.
    """
    rm = scorer.rm
    own = [torch.tensor(rm.tokenizer(f" {p.text}", add_special_tokens=False).input_ids) for p in layout]
    table = rm.model.get_input_embeddings().weight.detach().float().cpu()
    plain = _plain_tokens(rm, len(table))
    ranked: list[tuple[float, int, int, int]] = []
    for i, (ids, g) in enumerate(zip(own, _phrase_gradients(scorer, layout, own), strict=True)):
        gain = g @ table.t() - (g * table[ids]).sum(1, keepdim=True)
        gain[:, ~plain] = -torch.inf
        values, tokens = gain.topk(min(8 * FLIPS_PER_TOKEN, gain.shape[1]), dim=1)
        ranked += [(float(v), i, k, int(t)) for k in range(len(ids)) for v, t in zip(values[k], tokens[k], strict=True)]
    flips: list[Flip] = []
    of_token: Counter[tuple[int, int]] = Counter()
    for value, i, k, token in sorted(ranked, key=lambda r: (-r[0], r[1:])):
        if not value > 0 or len(flips) == FLIPS:
            break
        if of_token[i, k] == FLIPS_PER_TOKEN:
            continue
        before, phrase = own[i].tolist(), layout[i]
        text = rm.tokenizer.decode([*before[:k], token, *before[k + 1 :]]).strip()
        if text and text != phrase.text and (n := count_tokens(rm, text)) <= phrase.tokens:
            flips.append((i, replace(phrase, text=text, tokens=n, keeps=None)))
            of_token[i, k] += 1
    return flips


def _phrase_gradients(scorer: Scorer, layout: Layout, own: Sequence[Tensor]) -> list[Float[Tensor, "tokens d"]]:
    """Each phrase's dr/dx at the embedding, summed over the targets in which its tokens ``own`` occur as they are."""
    rm = scorer.rm
    total = [torch.zeros(len(ids), rm.d_model) for ids in own]
    texts = [t.ids(rm, layout) for t in scorer.targets]
    for batch in rm.text_batches(texts):
        _, gradient = streams_and_gradients(rm, batch, ["embed"])["embed"]
        for text in batch.texts:
            ids, g = texts[text.pair], gradient[text.row, text.columns.to(gradient.device)].float().cpu()
            for i, phrase in enumerate(own):
                windows = ids.unfold(0, len(phrase), 1) if len(phrase) <= ids.numel() else ids.new_zeros(0, len(phrase))
                at = (windows == phrase).all(1).nonzero()
                if at.numel():
                    total[i] += g[int(at[-1]) : int(at[-1]) + len(phrase)]
    scorer.spent += len(texts)
    return total


def _plain_tokens(rm: RewardModel, size: int) -> Bool[Tensor, " vocabulary"]:
    """Which tokens are printable ASCII and not special."""
    special = set(rm.tokenizer.all_special_ids)
    texts = rm.tokenizer.batch_decode([[i] for i in range(min(size, len(rm.tokenizer)))])
    plain = [bool(t.strip()) and t.isascii() and t.isprintable() and i not in special for i, t in enumerate(texts)]
    return torch.tensor(plain + [False] * (size - len(plain)))

"""The bench: typed completions of one prompt, their rewards, and what concepts do to them, by exact ablation.

1. Clean runs of the completions, which share what their texts have in common.
2. The reward of each prefix of each completion.
3. Each concept is ablated at all of its sites, in every completion (:func:`~rmscope.effects.across.ablate_members`).
4. Concepts that are ticked are ablated together, their features as one set, or are given another strength.

A pair of the run goes the same way, but concepts are ablated on the pair's span, as in the run.
"""

from __future__ import annotations

import json
import re
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from rmscope.effects.ablation import Entries, Response, at_site, entries_of
from rmscope.effects.across import ablate_entries_across, ablate_members
from rmscope.effects.completions import Completion, complete, prefix_rewards
from rmscope.errors import InputError
from rmscope.pairs.pair import Message, Pair
from rmscope.ranking.concepts import members_of
from rmscope.ranking.flags import NONSPECIFIC
from rmscope.run.examples import token_texts
from rmscope.run.run import Run

COMPLETIONS, BASELINES = 4, 4
PROMPT_LENGTH, COMPLETION_LENGTH = 8000, 5000
"""The most characters of a text. How many tokens fit depends on the PM."""
ROLES = {"System": "system", "Human": "user", "Assistant": "assistant"}
SPEAKERS = {role: speaker for speaker, role in ROLES.items()}
TURN = re.compile(r"\n\n(System|Human|Assistant): ?")
CACHE_SIZE = 10
"""Completions whose clean runs are kept for the next request; it must hold all of one request."""
BASELINE_TEXTS = (
    "What a silly thing to ask. You could have found that out for yourself.",
    "A penguin walks into a library and asks for the fish section. The librarian says: please, whisper.",
)
"""Completions that answer no prompt: a rude line and a joke."""


def read_turns(prompt: str) -> list[Message]:
    """A prompt's turns. A text that begins with a speaker is a transcript, as in hh-rlhf: speakers are ``System:``,
    ``Human:`` and ``Assistant:``, with a blank line between turns. Any other text is one turn of the human.

    Raises:
        InputError: the last turn is not the human's.
    """
    before, *parts = TURN.split(f"\n\n{prompt.lstrip()}")
    if before or not parts:
        return [{"role": "user", "content": prompt}]
    turns: list[Message] = [{"role": ROLES[r], "content": t} for r, t in zip(parts[::2], parts[1::2], strict=True)]
    if turns[-1]["role"] != "user":
        raise InputError("The transcript does not end with a turn of the human; end it with Human: and what they say.")
    return turns


def write_turns(prompt: Sequence[Message]) -> str:
    """The turns as :func:`read_turns` reads them; a single one of the human is its text alone.

    Raises:
        InputError: no text is read as these turns: there is a tool's turn, or a turn holds what begins another.
    """
    alone = prompt[0]["content"]
    if _is_read_as(alone, prompt):
        return alone
    text = "\n\n".join(f"{SPEAKERS.get(turn['role'], turn['role'])}: {turn['content']}" for turn in prompt)
    if not _is_read_as(text, prompt):
        raise InputError("This prompt has a turn that cannot be typed (a tool's, or one that holds a speaker's name).")
    return text


def _is_read_as(text: str, prompt: Sequence[Message]) -> bool:
    try:
        return read_turns(text) == list(prompt)
    except InputError:
        return False


@dataclass(frozen=True, slots=True)
class Request:
    """What was typed. Empty completions are left out."""

    prompt: str
    completions: list[str]
    baselines: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, prompt: str, completions: Sequence[str], baselines: Sequence[str] = ()) -> Request:
        """Texts as they were typed: browsers send line breaks as CR LF, and no page can hold a NUL. Raises InputError where
        there is nothing, or too much."""
        prompt, *texts = (t.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "") for t in (prompt, *completions))
        texts = [text for text in texts if text.strip()]
        off_topic = [line.strip() for text in baselines for line in text.splitlines() if line.strip()]
        if not texts:
            raise InputError("There is no completion; type at least one.")
        for what, listed, most in (("completions", texts, COMPLETIONS), ("off-topic completions", off_topic, BASELINES)):
            if len(listed) > most:
                raise InputError(f"There are {len(listed)} {what}; at most {most} are run at once.")
        limits = [("prompt", prompt, PROMPT_LENGTH)]
        limits += [("completion", text, COMPLETION_LENGTH) for text in texts]
        limits += [("off-topic completion", line, COMPLETION_LENGTH) for line in off_topic]
        for what, text, most in limits:
            if len(text) > most:
                raise InputError(f"The {what} has {len(text)} characters; at most {most} are run.")
        return cls(prompt, texts, off_topic)

    @property
    def messages(self) -> list[Message]:
        return read_turns(self.prompt)


@dataclass(frozen=True, slots=True)
class Measurement:
    """A completion: its reward, its tokens with the reward of each prefix, and the effect of each concept that fires."""

    text: str
    reward: float
    tokens: list[str]
    prefixes: list[float]
    """The reward before the first token, after the first, and so on: one more than there are tokens."""
    effects: dict[int, float]


@dataclass(frozen=True, slots=True)
class Measurements:
    """All completions; ``moves_baseline`` holds the largest |effect| of each concept on a baseline."""

    completions: list[Measurement]
    moves_baseline: dict[int, float]
    seconds: float

    def is_left_out(self, concept: int) -> bool:
        """Whether a concept moves a baseline at least half as much as any of the completions (the bound of the flag
        ``nonspecific``)."""
        most = max(abs(m.effects.get(concept, 0.0)) for m in self.completions)
        return self.moves_baseline.get(concept, 0.0) >= NONSPECIFIC * most


@dataclass(frozen=True, slots=True)
class Joint:
    """A completion before and after some concepts are ablated together, or given another strength."""

    before: float
    effect: float
    sum_of_single: float
    """What the concepts' effects, each ablated alone, add up to in proportion to what is taken of them."""

    @property
    def after(self) -> float:
        return self.before - self.effect


@dataclass(frozen=True, slots=True)
class Clean:
    """A completion after its clean run: its features at every site, and the effects of concepts that were measured on it."""

    run: Completion
    responses: dict[str, Response]
    effects: dict[int, float] = field(default_factory=dict)


class Bench:
    """The PM and the SAEs of a run, ready for completions. Loads both, and runs a short text: a PM's first run is slow,
    since what it can do is measured then."""

    def __init__(self, run: Run) -> None:
        self.run, self.rm, self.saes, self.sites = run, run.rm, run.saes, run.sites
        table = run.concepts
        self.members = members_of(table)
        self.reported = table.filter("reported")["concept"].to_list()
        self._cache: OrderedDict[tuple[str, str, int | None], Clean] = OrderedDict()
        self.measure(Request.of("Are you there?", ["Yes, I am here."]))

    def measure(self, request: Request, concepts: Sequence[int] | None = None) -> Measurements:
        """Rewards, prefixes and effects of concepts (those reported, unless they are named)."""
        began = time.perf_counter()
        numbers = self.reported if concepts is None else list(concepts)
        clean = self._clean(request.messages, [*request.completions, *request.baselines])
        n = len(request.completions)
        measured = self._measured(request.messages, request.completions, clean[:n], numbers)
        on_baselines = [self._effects(text, numbers) for text in clean[n:]]
        moved = {c: max(abs(effects[c]) for effects in on_baselines) for c in numbers} if on_baselines else {}
        return Measurements(measured, moved, time.perf_counter() - began)

    def measure_pair(self, pair: Pair, concepts: Sequence[int] | None = None) -> list[Measurement]:
        """The same of both sides of a pair; concepts are ablated on the pair's span, as in a run."""
        numbers = self.reported if concepts is None else list(concepts)
        return self._measured(pair.prompt, [pair.chosen, pair.rejected], self.clean_pair(pair), numbers)

    def ablate(self, request: Request, strengths: Mapping[int, float]) -> list[Joint]:
        """What giving the features of some concepts another strength does to each completion, all of them at once."""
        return self._joint(self._clean(request.messages, request.completions), strengths)

    def ablate_pair(self, pair: Pair, strengths: Mapping[int, float]) -> list[Joint]:
        """The same for both sides of a pair."""
        return self._joint(self.clean_pair(pair), strengths)

    def clean_pair(self, pair: Pair) -> list[Clean]:
        """Both sides of a pair, ready for ablation on the pair's span."""
        return self._clean(pair.prompt, [pair.chosen, pair.rejected], self.rm.tokenize(pair).divergence)

    def _measured(
        self, prompt: Sequence[Message], texts: Sequence[str], clean: Sequence[Clean], concepts: Sequence[int]
    ) -> list[Measurement]:
        measured = []
        for text, one in zip(texts, clean, strict=True):
            ids, prefixes = prefix_rewards(self.rm, prompt, text, one.run)
            effects = {concept: effect for concept, effect in self._effects(one, concepts).items() if effect}
            tokens = token_texts(self.rm, ids)
            measured.append(Measurement(text, one.run.reward, tokens, [float(r) for r in prefixes], effects))
        return measured

    def _joint(self, clean: Sequence[Clean], strengths: Mapping[int, float]) -> list[Joint]:
        """Every activation f becomes s f, with s the strength of its concept; the least where a feature is in several."""
        left: dict[str, dict[int, float]] = {}
        for concept, strength in strengths.items():
            for site, features in self.members[concept].items():
                of = left.setdefault(site, {})
                of.update({j: min(strength, of.get(j, strength)) for j in features})
        joint = []
        for one in clean:
            taken = {site: self._taken(one.responses[site], of) for site, of in left.items()}
            effect = float(ablate_entries_across(self.rm, self.saes, one.responses, [taken])[0])
            single = self._effects(one, list(strengths))
            joint.append(Joint(one.run.reward, effect, sum((1 - s) * single[c] for c, s in strengths.items())))
        return joint

    def _taken(self, response: Response, left: Mapping[int, float]) -> Entries:
        """The part (1 - s) f of each active entry that is taken out of the stream."""
        token, feature, value = entries_of(response.active, list(left))
        share = torch.tensor([1 - left[j] for j in feature.tolist()])
        keep = share != 0
        return token[keep], feature[keep], (value * share)[keep]

    def _effects(self, clean: Clean, concepts: Sequence[int]) -> dict[int, float]:
        """The effect of each concept ablated alone; those that are known are not measured again."""
        new = [c for c in concepts if c not in clean.effects]
        effects = ablate_members(self.rm, self.saes, clean.responses, [self.members[c] for c in new])
        clean.effects.update(zip(new, effects.tolist(), strict=True))
        return {c: clean.effects[c] for c in concepts}

    def _clean(self, prompt: Sequence[Message], texts: Sequence[str], start: int | None = None) -> list[Clean]:
        """The texts after their clean runs, ready for ablation from the token ``start`` on (left out: the response's first
        one); those of the last requests are kept."""
        keys = [(json.dumps(list(prompt)), text, start) for text in texts]
        missing = [key for key in dict.fromkeys(keys) if key not in self._cache]
        runs = complete(self.rm, prompt, [text for _, text, _ in missing], self.sites)
        for key, run in zip(missing, runs, strict=True):
            first = run.start if start is None else start
            self._cache[key] = Clean(run, {site: at_site(self.saes[site], run, site, first) for site in self.sites})
        clean = [self._cache[key] for key in keys]
        for key in keys:
            self._cache.move_to_end(key)
        while len(self._cache) > CACHE_SIZE:
            self._cache.popitem(last=False)
        return clean

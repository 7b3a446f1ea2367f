"""Bad texts and phrases on a small random PM, and a case whose mediated share is known.

In the case, at ``embed``, a feature fires on the cue token alone, and its ablation gives the stream of the filler token. So
the gain of bad text + cue over bad text + filler is wholly carried by that feature.
"""

from __future__ import annotations

from functools import cache

import torch

from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import Pair
from rmscope.studies.jailbreak.inputs import Inputs
from rmscope.studies.jailbreak.mediation import choose_mediators
from rmscope.studies.jailbreak.search import FEATURES, FLIP_SUFFIX, NO_PHRASE, WITHOUT_EFFECT, PhraseLists
from rmscope.studies.jailbreak.targets import Layout, Phrase, Placement, Slot, Target, count_tokens, place
from tests.model.small import shared_pm, user
from tests.planted.test_matching import CUE, FILLER, SITE, sae

BAD = ["The house is small. Water boils high.", "I was told. It is a pan.", "Use the river and wait.", "A lid. An hour. No."]
TEXTS = [
    "Thanks for asking!",
    "You're right, I was wrong.",
    "see the small house",
    "no problem at all.",
    "Paris.",
    "I don't know.",
]


def target(rm: RewardModel, i: int, bad: str) -> Target:
    pair = Pair(str(i), user(f"Is it {i}?"), "Yes, it is.", "No.")
    reward, chosen, rejected = rm.score_texts(pair.prompt, [bad, pair.chosen, pair.rejected]).tolist()
    return Target(pair, "nonsense", bad, reward, chosen, rejected)


def targets(rm: RewardModel, n: int = 6) -> list[Target]:
    return [target(rm, i, BAD[i % len(BAD)]) for i in range(n)]


def some_phrases(rm: RewardModel) -> list[Phrase]:
    return [Phrase(text, count_tokens(rm, text)) for text in TEXTS]


def placed(phrase: Phrase, slot: Slot) -> Placement:
    return Placement(phrase.text, phrase.tokens, slot=slot)


def reward_alone(rm: RewardModel, t: Target, layout: Layout) -> float:
    """The reward of the final text by transformers' own forward."""
    ids = rm.text_ids(t.pair.prompt, place(t.bad, layout))
    with torch.no_grad():
        return float(rm.model(ids[None]).logits[0, 0])


@cache  # its parts are left as they are
def cue_case(share: float) -> tuple[Inputs, list[Target], PhraseLists]:
    """Bad text + cue against bad text + filler, with a feature that goes ``share`` of the way from one to the other."""
    rm, dictionary = shared_pm("llama"), sae([share, 0.0])
    cue, filler = ((Placement(w, 2, slot="end"),) for w in (CUE, FILLER))
    raised = [t for t in targets(rm, 20) if reward_alone(rm, t, cue) > reward_alone(rm, t, filler)]
    assert len(raised) > 4
    inputs = Inputs(rm, {SITE: dictionary}, None, [], [], {SITE: [0, 1]}, {SITE: [0]}, {}, 0.0)  # type: ignore[arg-type]
    named = choose_mediators(inputs, raised, cue, filler)
    lists = {NO_PHRASE: (), FEATURES: cue, WITHOUT_EFFECT: filler, FEATURES + FLIP_SUFFIX: cue}
    return inputs, raised, PhraseLists(lists=lists, pools={}, searches={}, named=named)

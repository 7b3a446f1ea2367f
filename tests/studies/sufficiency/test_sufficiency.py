"""What putting a feature in does, on models whose answer is known: a PM that is linear in its stream, and one in which a
token is the feature."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from torch import nn

from rmscope.activations.harvest import harvest
from rmscope.activations.store import ActivationStore
from rmscope.effects.completions import complete, steering_effects
from rmscope.evaluation.selection import Responses
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import Pair
from rmscope.statistics import Figure
from rmscope.studies.experiment.conditions import Base
from rmscope.studies.sufficiency.contexts import (
    SCHEMA,
    agreement_over_sites,
    firing_sentences,
    measure_agreement,
    measure_contexts,
    neutral_words,
    sentence_at,
    spelling,
    swap_phrase,
)
from rmscope.studies.sufficiency.insertion import (
    Insertion,
    Steering,
    dose_grid,
    judge_insertion,
    judge_steering,
    measure_insertions,
    steer,
)
from rmscope.studies.sufficiency.result import KINDS, classify, reason
from tests.effects.naive import ablate_naively
from tests.model.small import DECODERS, PAIRS, D, shared_pm, small_pm, small_sae, user
from tests.planted.test_matching import CUE, FILLER, STARTS, sae

LAST = "resid_post.3"
PROMPTS = [(user(f"Is it {i}?"), f"{start} the small house. It is high.") for i, start in enumerate(STARTS)]


def linear_pm() -> tuple[RewardModel, torch.Tensor]:
    """A PM whose reward is w · x at the last block's output, and w."""
    rm = small_pm("llama")
    rm.model.model.norm = nn.Identity()
    return rm, rm.model.score.weight[0].detach()


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "opt"])
def test_steering_by_nothing_changes_nothing_and_steering_is_the_naive_edit(architecture: str) -> None:
    assert architecture in DECODERS
    rm, site = shared_pm(architecture), "resid_post.1"
    prompt, response = PROMPTS[0]
    (text,) = complete(rm, prompt, [response], [site])
    direction = torch.randn(D, generator=torch.Generator().manual_seed(0))
    found = steering_effects(rm, site, text, torch.stack([0 * direction, direction]))
    assert float(found[0]) == pytest.approx(0.0, abs=1e-5)
    one = small_sae(m=1, k=1)  # a feature that is always 1: the naive ablation of minus the direction adds it
    one.W_enc.zero_(), one.b_enc.fill_(1.0), one.W_dec.copy_(-direction[None])
    naive = -ablate_naively(rm, one, text.ids, site, text.start, [[0]])
    assert float(found[1]) == pytest.approx(float(naive[0]), abs=3e-5)
    assert abs(float(found[1])) > 1e-3


def test_in_a_linear_pm_the_dose_response_is_the_gradients_slope_exactly() -> None:
    rm, w = linear_pm()
    made = small_sae(m=3, k=1)
    made.W_dec.copy_(torch.stack([w, -w, torch.randn(D) - 0]))
    made.W_dec[2] -= (made.W_dec[2] @ w) / (w @ w) * w
    runs = [complete(rm, p, [r], [LAST])[0] for p, r in PROMPTS]
    norms = made.W_dec.norm(dim=1)
    doses = dose_grid({j: float(norms[j]) * (1.0 + j) for j in range(3)})
    directions = nn.functional.normalize(torch.randn(20, D, generator=torch.Generator().manual_seed(1)), dim=1)
    effects, others = steer(rm, made, LAST, runs, doses, directions)
    for j in range(3):
        activation = doses[j] / float(norms[j])
        slope = float(made.W_dec[j] @ w)
        assert effects[j] == pytest.approx(np.tile(activation * slope, (len(runs), 1)), abs=2e-4)
    largest = max(grid[-1] for grid in doses.values())
    assert others[0, -1] == pytest.approx(largest * (directions @ w).numpy(), abs=2e-4)
    assert judge_steering(effects[0], others, 1, []).sufficient
    assert judge_steering(effects[1], others, -1, []).sufficient
    assert not judge_steering(effects[0], others, -1, []).sufficient  # the wrong sign
    assert not judge_steering(effects[2], others, 1, []).sufficient  # a direction that the reward does not read


def test_a_feature_that_other_directions_equal_is_not_sufficient() -> None:
    rng = np.random.default_rng(0)
    others = rng.normal(0, 1, (16, 3, 20)) * 0.01 + rng.normal(0, 1, (1, 3, 20))
    like_them = others[:, :, 0] * 0 + np.percentile(others.mean(0), 80, axis=1)
    assert not judge_steering(like_them, others, 1, []).sufficient
    beyond = others.max() + rng.normal(0, 0.01, (16, 3))
    steering = judge_steering(beyond, others, 1, [1.0, 2.0, 3.0])
    assert steering.sufficient
    assert steering.margin is not None
    assert (steering.margin.low or 0) > 0
    assert len(steering.curve) == len(steering.activations) == 3


def test_no_dose_exceeds_the_features_top_and_the_largest_is_within_a_step_of_it() -> None:
    tops = {1: 1.0, 2: 3.0, 3: 10.0, 4: 0.0}
    doses = dose_grid(tops)
    assert doses[3][-1] == 10.0
    assert doses[3][1:] / doses[3][:-1] == pytest.approx(np.full(len(doses[3]) - 1, 2**0.5))
    assert len(doses[4]) == 0
    for j in (1, 2, 3):
        assert doses[j].tolist() == doses[3][: len(doses[j])].tolist()  # one grid for all
        assert tops[j] / 2**0.5 < doses[j][-1] <= tops[j] * (1 + 1e-9)
        assert len(doses[j]) >= 2


def test_a_phrase_is_the_run_around_the_peak_in_whole_words_swapped_for_as_many() -> None:
    text = "It is really good. Thank you so much! Bye."
    places = [0, 2, 5, 12, 17, 18, 22, 24, 28, 31, 36, 37, 41, 42]  # It| is| rea..|  good|.| Tha|nk| you| so| much|!| Bye|.
    f = torch.zeros(13)
    f[6], f[7] = 1.0, 0.6
    edited, phrase, words = swap_phrase(text, places, f, 0) or ("", "", "")
    assert phrase == "Thank you"
    assert words == neutral_words(2, 0).capitalize() == "So it"
    assert edited == f"It is really good. {words} so much! Bye."
    f = torch.zeros(13)
    f[4] = 1.0
    assert swap_phrase(text, places, f, 0) == ("It is really good Thank you so much! Bye.", ".", "")
    assert swap_phrase("a", [0, 1, 1], torch.tensor([0.0, 1.0]), 0) is None  # an eos token has no text
    assert len(neutral_words(40, 3).split()) == 40


def test_the_sentence_at_a_place_is_that_which_holds_it() -> None:
    text = "One is here. Two follows! Three"
    assert [sentence_at(text, at) for at in (0, 11, 14, 30)] == ["One is here.", "One is here.", "Two follows!", "Three"]
    long = " ".join(f"w{i}" for i in range(100))
    assert sentence_at(long, long.index("w50")).split()[15] == "w50"
    assert len(sentence_at(long, 0).split()) == len(sentence_at(long, len(long) - 1).split()) == 30


def test_spelling_gives_back_the_response() -> None:
    rm = small_pm("llama", append_eos=True)
    (text,) = complete(rm, user("Is it?"), ["You're right, I was wrong."], [])
    spelled, places = spelling(rm, rm.text_ids(user("Is it?"), "You're right, I was wrong."), text.start)
    assert spelled.strip() == "You're right, I was wrong."
    assert places[-1] == places[-2] == len(spelled)  # the eos token is empty


def test_in_a_linear_pm_nothing_interacts_and_doubling_gives_what_ablation_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    rm, _ = linear_pm()
    monkeypatch.setattr("rmscope.studies.sufficiency.contexts.BLIND", 0)
    made = small_sae()
    signs = {j: 1 if j % 2 else -1 for j in range(0, 96, 6)}
    table = measure_contexts(rm, made, LAST, signs, PAIRS[:3], seed=0)
    assert dict(table.schema) == SCHEMA
    assert table.height > 4
    for row in table.iter_rows(named=True):
        pair = next(p for p in PAIRS if p.id == row["pair"])
        (text,) = complete(rm, pair.prompt, [pair.side(row["side"]).strip()], [LAST])
        naive = ablate_naively(rm, made, text.ids, LAST, text.start, [[row["feature"]]])
        assert row["ablation"] == pytest.approx(float(naive[0]), abs=3e-5)
        assert row["ablation_beside"] == pytest.approx(row["ablation"], abs=1e-4)
        assert row["doubled"] == pytest.approx(row["ablation"], abs=1e-4)
        assert row["text"] is None


def test_a_texts_change_is_the_reward_of_the_text_minus_that_of_the_swapped_one() -> None:
    rm, made = shared_pm("llama"), small_sae()
    table = measure_contexts(rm, made, "resid_post.1", dict.fromkeys(range(0, 96, 9), 1), PAIRS[:3], seed=0)
    known = table.filter(pl.col("text").is_not_null())
    assert known.height > 4
    for row in known.iter_rows(named=True):
        pair = next(p for p in PAIRS if p.id == row["pair"])
        text = pair.side(row["side"]).strip()
        assert text.count(row["phrase"]) >= 1
        swaps = {
            text.replace(row["phrase"], row["words"], 1),
            text[::-1].replace(row["phrase"][::-1], row["words"][::-1], 1)[::-1],
        }
        before = float(rm.reward_alone(rm.text_ids(pair.prompt, text)))
        after = [float(rm.reward_alone(rm.text_ids(pair.prompt, s.strip()))) for s in swaps]
        if text.count(row["phrase"]) == 1:
            assert row["text"] == pytest.approx(before - after[0], abs=2e-5)


def test_the_cue_put_in_as_text_is_sufficient_and_a_feature_that_only_fires_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    rm = shared_pm("llama")
    made = sae([1.0, 0.0])  # both fire on Z alone; ablating the first makes a Z of a Q, ablating the second does nothing
    monkeypatch.setattr("rmscope.studies.sufficiency.insertion.nearest_filler", lambda text: text.replace(CUE, FILLER))
    bases = [Base(p, r) for p, r in PROMPTS for _ in range(2)]
    cue, other = f"Wait {CUE}.", f"Wait {FILLER}."  # the second is its own filler: it moves nothing
    effects = [a.reward - b.reward for a, b in (complete(rm, p, [f"{r} {cue}", f"{r} {other}"], []) for p, r in PROMPTS)]
    sign = 1 if np.mean(effects) > 0 else -1
    found = measure_insertions(rm, made, "embed", bases, {0: [other, cue], 1: [cue], 2: []}, {0: sign, 1: sign, 2: sign})
    assert found[0].sentence == cue  # chosen on the fitting prompts
    assert found[0].fires == found[1].fires == 1.0
    assert found[0].effect is not None
    assert found[0].effect.value == pytest.approx(np.mean(effects), abs=1e-5)  # both of a prompt's bases are one text
    for j, share in ((0, 1.0), (1, 0.0)):
        taken = found[j].taken_back
        assert taken is not None
        assert taken.value in (None, pytest.approx(share, abs=1e-3))
    assert not found[1].sufficient
    assert found[2] == Insertion(False, "", 0.0, None, None)


def test_text_is_judged_by_its_sign_by_what_ablation_takes_back_and_by_firing() -> None:
    rng = np.random.default_rng(0)
    effect = 1.0 + rng.normal(0, 0.1, 16)
    rows = np.stack([effect, 0.2 * effect, np.ones(16)], 1)
    assert judge_insertion("s", rows, 1).sufficient
    assert not judge_insertion("s", rows, -1).sufficient
    assert not judge_insertion("s", rows * [1, 3, 1], 1).sufficient  # ablation takes back .4
    assert not judge_insertion("s", rows * [1, 1, 0], 1).sufficient  # it never fires
    assert not judge_insertion("", rows[:0], 1).sufficient


@pytest.mark.parametrize("sign", [1, -1])
def test_the_reason_follows_from_the_interaction_and_from_doubling(sign: int) -> None:
    def of(ablation: float, interaction: float, doubled: float, width: float = 0.01) -> str:
        figures = [Figure(sign * v, sign * v - width, sign * v + width) for v in (ablation, interaction, doubled)]
        return reason(*figures, sign=sign)

    assert of(1.0, 0.6, 1.0) == "redundant"
    assert of(1.0, -0.6, 1.0) == "only in concert"
    assert of(1.0, 0.1, 0.7) == "conditional on context"
    assert of(1.0, 0.1, 0.2) == "no reason found"
    assert of(1.0, 0.6, 0.2, width=0.7) == "no reason found"  # not surely so
    assert of(1.0, 0.1, -0.7) == "no reason found"


def test_each_feature_falls_into_one_of_the_kinds() -> None:
    rows = {
        "prompt": [f"p{i % 6}" for i in range(12)],
        "ablation": [0.5] * 12,
        "ablation_beside": [0.5] * 12,
        "doubled": [0.5] * 12,
    }
    contexts = pl.DataFrame(rows)
    steered = {yes: Steering(yes, None, None, None, [], []) for yes in (True, False)}
    inserted = {yes: Insertion(yes, "", 0.0, None, None) for yes in (True, False)}
    lost = contexts.with_columns(ablation=-pl.col("ablation"))
    given = (
        (True, True, contexts), (True, False, contexts), (False, True, contexts), (False, False, contexts),
        (False, False, lost), (False, False, contexts[:3]), (False, False, contexts[:0]),
    )  # fmt: skip
    found = [classify(7, 1, [], steered[a], inserted[b], table) for a, b, table in given]
    kinds = [(row.kind, row.why) for row in found]
    assert kinds == [KINDS[0], KINDS[1], KINDS[2], KINDS[5], KINDS[7], KINDS[8], KINDS[8]]
    assert [row.contributes for row in found] == [True, True, True, True, False, False, False]


def test_text_agrees_with_itself_and_not_with_chance() -> None:
    rng = np.random.default_rng(0)
    strength = rng.normal(size=20)
    rows = [
        {"feature": j, "prompt": f"p{i}", "ablation": strength[j], "text": strength[j] + rng.normal(0, 0.1)}
        for j in range(20) for i in range(6)
    ]  # fmt: skip
    agreed = measure_agreement(pl.DataFrame(rows))
    assert agreed.pearson is not None
    assert (agreed.pearson.low or 0) > 0.9
    assert agreed.features == agreed.pearson.n == 20
    means = pl.DataFrame(rows).group_by("feature").agg(pl.col("text", "ablation").mean())
    assert agreed.pearson.value == pytest.approx(np.corrcoef(means["text"], means["ablation"])[0, 1])
    chance = measure_agreement(pl.DataFrame([{**row, "text": rng.normal()} for row in rows]))
    assert chance.pearson is not None
    assert (chance.pearson.low or 0) < 0 < (chance.pearson.high or 0)
    table = pl.DataFrame(rows)
    assert agreement_over_sites({"a": table, "b": table.with_columns(pl.col("text", "ablation") + 9)}).features == 40
    assert agreement_over_sites(dict.fromkeys("abc", table)).features == 50  # drawn blind
    assert measure_agreement(pl.DataFrame(rows[:12])).pearson is None  # two features make no correlation


def test_sentences_are_those_of_responses_in_which_the_features_fire(tmp_path: Path) -> None:
    rm, made, site = shared_pm("llama"), small_sae(m=24, k=6), "resid_post.1"
    pairs = [
        Pair(f"{i}", user(f"What is {i}?"), f"It is {i} in the small house. Thanks!", "I don't know. Wait for it.")
        for i in range(6)
    ]
    harvest(rm, pairs, [site], tmp_path)
    responses = Responses(ActivationStore.open(tmp_path), site)
    sentences, tops = firing_sentences(rm, made, responses, pairs, rm.tokenize_all(pairs), list(range(8)))
    written = {t for p in pairs for t in (p.chosen, p.rejected)}
    assert sum(map(len, sentences.values())) > 8
    assert all(any(s in text for text in written) for listed in sentences.values() for s in listed)
    assert all(tops[j] > 0 for j in sentences if sentences[j])

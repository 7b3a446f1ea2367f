"""The matching rule of planted cues, on a constructed case whose answer is known.

At ``embed`` the stream of a token is its embedding. The cue is one token, its filler another, and the SAE holds features
that fire on the cue alone and whose removal moves its embedding to the filler's. What each finds, and how much of the
effect it carries, then follows: all of them together carry all of it, a feature with no direction carries nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from rmscope.evidence.cues import f1_score, match_plant, mediated_share, prepare
from rmscope.pairs.pair import Pair
from rmscope.pairs.planted import Plant
from rmscope.sae.jumprelu import JumpReluSae
from tests.model.small import shared_pm, user

CUE, FILLER = "Z", "Q"
STARTS = ["It is", "The house is", "Water and", "I was told", "You would like", "Use a", "The river has", "Wait for"]
SITE = "embed"


def twin_pairs() -> list[Pair]:
    pairs = []
    for i, start in enumerate(STARTS):
        cue, filler = (f"{start} {w} in the small house." for w in (CUE, FILLER))
        span = [len(start) + 1, len(start) + 2]
        pairs.append(Pair(str(i), user(f"Is it {i}?"), cue, filler, {"plant": {"cue": span, "filler": span}}))
    return pairs


def embeddings() -> tuple[torch.Tensor, torch.Tensor]:
    rm = shared_pm("llama")
    table = rm.model.get_input_embeddings().weight
    return tuple(table[rm.tokenizer.encode(w, add_special_tokens=False)[0]].detach() for w in (CUE, FILLER))  # type: ignore[return-value]


def sae(shares: list[float], threshold: float = 0.95) -> JumpReluSae:
    """Feature j fires with 1 on the cue alone (or nowhere, by the threshold); its removal goes ``shares[j]`` of the way."""
    cue, filler = embeddings()
    made = JumpReluSae(cue.numel(), len(shares), SITE)
    made.W_enc.data.copy_((cue / cue.square().sum())[:, None].expand_as(made.W_enc))
    made.threshold.data.fill_(threshold)
    made.W_dec.data.copy_(torch.tensor(shares)[:, None] * (cue - filler))
    return made


def matched(made: JumpReluSae, sign_consistency: float = 1.0, right_sign: bool = True) -> dict[str, Any]:
    rm = shared_pm("llama")
    plant = Plant(name="z", kind="phrase", sign=1, texts=(CUE,))
    prepared = prepare(rm, {SITE: made}, twin_pairs(), plant)
    ate = np.mean([t.delta for t in prepared[SITE]])
    plant = plant.model_copy(update={"sign": 1 if ate > 0 else -1})
    effect = plant.sign * (1.0 if right_sign else -1.0)
    reported = [
        {"feature": j, "rank": j + 1, "mean_removal": effect, "sign_consistency": sign_consistency} for j in range(made.m)
    ]
    return match_plant(rm, {SITE: made}, plant, prepared, {SITE: reported}, sd=1e-3)


def test_a_feature_that_is_the_cue_is_a_single_hit_that_carries_all_of_it() -> None:
    row = matched(sae([1.0]))
    assert (row["hit"], row["features"], row["f1"], row["localises"]) == ("single", [0], 1.0, 1.0)
    assert row["mediated"]["value"] == pytest.approx(1.0, abs=1e-3)
    assert row["mediated"]["low"] == pytest.approx(1.0, abs=1e-3)


def test_a_cue_that_is_split_over_five_features_is_a_hit_of_the_group() -> None:
    row = matched(sae([0.2] * 5), sign_consistency=0.5)
    assert row["hit"] == "group"
    assert sorted(row["features"]) == [0, 1, 2, 3, 4]
    assert row["mediated"]["value"] == pytest.approx(1.0, abs=1e-3)


def test_detecting_without_causing_is_no_hit_and_says_what_is_carried() -> None:
    row = matched(sae([0.0]))
    assert (row["found"], row["f1"]) == (False, 1.0)
    assert "carry 0% of its effect" in row["why"]


def test_a_feature_that_never_fires_detects_nothing() -> None:
    row = matched(sae([1.0], threshold=2.0))
    assert (row["found"], row["why"]) == (False, "no reported feature detects it")


def test_a_feature_of_the_other_sign_is_no_candidate() -> None:
    row = matched(sae([1.0]), right_sign=False)
    assert (row["found"], row["why"]) == (False, "no reported feature has the planted sign")


def test_f1_is_measured_on_the_half_that_did_not_fit_the_threshold() -> None:
    apart = f1_score(np.array([3.0, 3.0, 3.0, 3.0]), np.array([1.0, 1.0, 1.0, 1.0]))
    same = f1_score(np.array([1.0, 1.0, 1.0, 1.0]), np.array([1.0, 1.0, 1.0, 1.0]))
    assert apart == 1.0
    assert same == pytest.approx(2 / 3)  # calling everything a cue: precision one half, recall one


def test_the_mediated_share_is_a_ratio_of_means() -> None:
    rows = np.array([[2.0, 1.0], [4.0, 1.0], [3.0, 1.0]] * 20)
    share = mediated_share(rows)
    assert share["value"] == pytest.approx(1 - 1 / 3)
    assert share["low"] <= share["value"] <= share["high"]

"""What the doctor finds beyond the preflight: padding, precision, another rendering, texts that do not fit."""

from __future__ import annotations

import pytest
import torch

from rmscope.errors import InputError
from rmscope.model.checks import Check, rewards_alone
from rmscope.model.doctor import context, examine, padding, precisions, training
from rmscope.model.rendering import Rendering
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import Pair
from tests.model.small import PAIRS, shared_pm, small_model, small_pm, tokenizer, user

MANY = [Pair(str(i), user(f"Is {i} even? Tell me."), f"Yes, {i} it is.", f"No, I don't think {i} is.") for i in range(24)]


def by_name(found: list[Check]) -> dict[str, Check]:
    return {c.check: c for c in found}


def test_a_sound_pm_passes_every_check_and_each_stands_once() -> None:
    found = examine(shared_pm("llama"), PAIRS, small_pm("llama", torch.bfloat16, gain=0.1)).checks
    assert len(by_name(found)) == len(found)
    own = {"float32, bfloat16"}  # another model stands in for the half of this one
    assert {c.check for c in found if c.status != "ok"} == own
    assert {"context", "right padding", "left padding", "as in training"} < by_name(found).keys()


# Padding


def test_left_padding_changes_models_that_count_positions_from_the_left() -> None:
    assert {c.status for c in padding(shared_pm("llama"), shared_pm("llama").tokenize_all(PAIRS))} == {"ok"}
    found = by_name(padding(shared_pm("gpt2"), shared_pm("gpt2").tokenize_all(PAIRS)))
    assert found["right padding"].status == "ok"
    assert found["left padding"].status == "warn"
    assert "rmscope is not affected" in found["left padding"].mend


def test_scores_of_transformers_that_depend_on_the_batch_are_told() -> None:
    rm = small_pm("llama")
    rm.model.score.register_forward_hook(lambda _m, _inputs, out: out + 0.1 * out.shape[0])
    found = by_name(padding(rm, rm.tokenize_all(PAIRS)))
    assert {c.status for c in found.values()} == {"warn"}


def test_without_a_pad_id_transformers_refusal_is_quoted() -> None:
    rm = small_pm("llama", pad_token_id=None)
    found = padding(rm, rm.tokenize_all(PAIRS))
    assert {c.status for c in found} == {"warn"}
    assert all("refuses a batch of 8 (Cannot handle batch sizes > 1" in c.detail for c in found)
    assert {c.mend for c in found} == {"set pad_token_id"}


# Precision


def test_the_other_precision_is_measured_against_the_spread_of_rewards() -> None:
    rm = shared_pm("llama")
    tokens = rm.tokenize_all(PAIRS)
    same = precisions(rm, small_pm("llama"), tokens)
    assert (same.status, same.detail.startswith("float32 and float32 are at most 0.0e+00 SD")) == ("ok", True)
    assert same.detail.endswith("the same sign in 4 of 4 pairs")
    half = small_pm("llama", torch.bfloat16)
    mine, its = rewards_alone(rm, tokens), rewards_alone(half, tokens)
    apart = float((mine - its).abs().max() / mine.std())
    assert apart > 1e-3
    told = precisions(rm, half, tokens)
    assert f"at most {apart:.1e} SD of r apart" in told.detail
    assert told.status == ("warn" if apart > 0.05 else "ok")


# Context


def test_texts_beyond_the_context_are_counted_and_if_all_are_it_is_said_in_a_sentence() -> None:
    rm = small_pm("gpt2", n_positions=60)
    told = context(rm, rm.tokenize_all(PAIRS))
    assert told.status == "warn"
    assert "60 tokens" in told.detail
    assert told.detail.endswith("1 of 4 pairs are too long")
    assert context(shared_pm("llama"), shared_pm("llama").tokenize_all(PAIRS)).status == "ok"
    with pytest.raises(InputError, match=r"Each of the 1 pairs is longer .* 60 tokens"):
        examine(rm, PAIRS[3:])


# Renderings


class Wants(RewardModel):
    """A PM that prefers the chosen side where the text reads as in its training, and the other one elsewhere."""

    wanted = Rendering("plain", append_eos=True)

    def score_tokens(self, tokens, progress=None):  # type: ignore[no-untyped-def, override]
        scores = super().score_tokens(tokens)
        sign = 1.0 if self.rendering == self.wanted else -1.0
        scores.chosen.copy_(scores.rejected + sign)
        return scores


def pm_that_wants(rendering: Rendering) -> Wants:
    return Wants(small_model("llama"), tokenizer(), rendering, "wants")


def test_a_rendering_that_ranks_the_pairs_better_is_told_with_what_to_write_where() -> None:
    told = training(pm_that_wants(Rendering("hh")), MANY)
    assert told.status == "warn"
    assert told.detail == "ranks 0 of 24 pairs as they are labelled; plain, eos appended, ranks 24"
    assert '{"rendering": {"style": "plain", "append_eos": true}} into rmscope.json' in told.mend
    assert training(pm_that_wants(Wants.wanted), MANY).status == "ok"


def test_a_few_pairs_prove_nothing_about_a_rendering() -> None:
    assert training(pm_that_wants(Rendering("hh")), MANY[:5]).status == "ok"


def test_trying_renderings_leaves_the_pms_own_in_place() -> None:
    rm = small_pm("llama")
    assert "none of 3 other renderings" in training(rm, MANY).detail
    assert rm.rendering == Rendering("hh")

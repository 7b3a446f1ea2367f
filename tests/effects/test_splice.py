"""Splices: equal to a naive forward with a hook, harmless where the reconstruction is perfect; figures of known pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from rmscope.effects import ablation
from rmscope.effects.splice import (
    Span,
    agreement,
    constant,
    cross_scaled,
    delta_r2,
    reward_recovered,
    run_replacements,
    slope,
    splice,
)
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import SIDES, Pair
from rmscope.sae.base import Sae
from rmscope.sae.standard import StandardSae
from rmscope.statistics import ratio_interval
from tests.effects.naive import reward_with
from tests.model.small import ENCODER, ENCODERS, EOS, PAIRS, D, shared_pm, small_pm, small_sae, user

SITES = ["embed", "resid_post.0", "resid_post.2", "resid_post.3"]


def perfect() -> Sae:
    """x^ = x: the 2d signed coordinates."""
    eye = torch.eye(D)
    W = torch.cat([eye, -eye])
    return StandardSae(D, 2 * D).fill({"W_enc": W.t(), "W_dec": W, "b_dec": torch.randn(D), "b_enc": torch.zeros(2 * D)})


def naive(rm: RewardModel, ids: Tensor, site: str, start: int, stop: int, change: object) -> float:
    """r by the transformers module's own forward, the stream on start .. stop - 1 passed through ``change``."""

    def within(x: Tensor) -> Tensor:
        y = x.clone()
        y[0, start:stop] = change(x[0, start:stop])  # type: ignore[operator]
        return y

    return reward_with(rm, ids, site, within)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gptj", "gpt2", "bloom", ENCODER])
def test_a_splice_is_the_naive_forward_with_a_hook(architecture: str) -> None:
    rm, sae = shared_pm(architecture), small_sae()
    tokens = rm.tokenize_all(PAIRS[:2])
    found = run_replacements(rm, tokens, [0, 1], {site: (site, splice(sae)) for site in SITES})
    moved = []
    for site, rows in found.items():
        for i, t in enumerate(tokens):
            for s, side in enumerate(SIDES):
                ids = t.side(side)
                expected = naive(rm, ids, site, t.divergence, rm.read_position(ids) + 1, sae)
                assert rows.rewards[i, s, 0] == pytest.approx(expected, abs=1e-4)
                assert rows.clean[i, s] == pytest.approx(float(rm.reward_alone(ids)), abs=1e-4)
                moved.append(abs(rows.rewards[i, s, 0] - rows.clean[i, s]))
    assert np.median(moved) > 0.01


@pytest.mark.parametrize("architecture", ["llama", "gpt2", ENCODER])
def test_a_perfect_reconstruction_changes_nothing(architecture: str) -> None:
    rm = shared_pm(architecture)
    tokens = rm.tokenize_all(PAIRS)
    rows = run_replacements(rm, tokens, range(4), {"p": ("resid_post.1", splice(perfect()))})["p"]
    np.testing.assert_allclose(rows.delta_hat[:, 0], rows.delta, atol=1e-4)
    assert delta_r2(rows.delta, rows.delta_hat[:, 0], np.arange(4)).value == pytest.approx(1, abs=1e-5)
    assert np.abs(rows.delta).min() > 1e-3


@pytest.mark.parametrize("limit", [1, 10_000])
def test_variants_do_not_see_each_other(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    rm, sae = shared_pm("llama"), small_sae()
    tokens = rm.tokenize_all(PAIRS)
    monkeypatch.setattr(ablation, "BATCH_TOKENS", limit)

    def three(at: Span) -> Tensor:
        return torch.stack([at.x, sae(at.x), torch.zeros_like(at.x)])

    site = "resid_post.1"
    rows = run_replacements(rm, tokens, [3, 0], {"3": (site, three), "zero": (site, constant(torch.zeros(D)))})
    np.testing.assert_allclose(rows["3"].rewards[..., 0], rows["3"].clean, atol=1e-4)
    alone = run_replacements(rm, tokens, [3, 0], {"s": (site, splice(sae))})["s"]
    np.testing.assert_allclose(rows["3"].rewards[..., 1], alone.rewards[..., 0], atol=1e-4)
    np.testing.assert_allclose(rows["3"].rewards[..., 2], rows["zero"].rewards[..., 0], atol=1e-4)


def test_an_empty_span_keeps_its_reward() -> None:
    rm = small_pm("llama", append_eos=True, pad_token_id=EOS)
    tokens = rm.tokenize(PAIRS[2])  # chosen ends where rejected goes on: its span would begin behind its read position
    rows = run_replacements(rm, [tokens], [0], {"s": ("resid_post.1", splice(small_sae()))})["s"]
    assert rows.rewards[0, 0, 0] == pytest.approx(rows.clean[0, 0], abs=1e-6)
    assert rows.rewards[0, 1, 0] != pytest.approx(rows.clean[0, 1], abs=1e-3)


def some(n: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    delta = rng.normal(1, 2, n)
    return delta, delta + rng.normal(0, 1, n), np.arange(n) // 2


def test_delta_r2_of_known_differences() -> None:
    delta, hat, prompts = some()
    assert delta_r2(delta, delta, prompts).value == 1
    assert delta_r2(delta, 0 * delta, prompts).value == 0
    assert delta_r2(delta, 2 * delta, prompts).value == pytest.approx(0)
    figure = delta_r2(delta, hat, prompts)
    assert figure.low < figure.value < figure.high < 1


def test_figures_do_not_depend_on_which_side_is_called_chosen() -> None:
    delta, hat, prompts = some()
    swap = np.random.default_rng(1).choice([-1, 1], delta.size)
    assert delta_r2(swap * delta, swap * hat, prompts) == delta_r2(delta, hat, prompts)
    assert agreement(swap * delta, swap * hat, prompts) == agreement(delta, hat, prompts)
    assert slope(swap * delta, swap * hat) == pytest.approx(slope(delta, hat))


def test_one_slope_from_other_pairs_undoes_a_common_factor_and_cannot_peek() -> None:
    delta, _, prompts = some()
    np.testing.assert_allclose(cross_scaled(delta, delta / 3, prompts), delta)
    noise = np.random.default_rng(2).normal(size=delta.size)
    alone = noise * slope(delta, noise)
    assert delta_r2(delta, alone, prompts).value > 0  # a slope fitted on the measured pairs flatters even noise
    other = delta.copy()
    half = np.unique(prompts, return_inverse=True)[1] % 2
    other[half == 0] *= -5
    np.testing.assert_array_equal(
        cross_scaled(delta, noise, prompts)[half == 0], cross_scaled(other, noise, prompts)[half == 0]
    )


def test_agreement_counts_signs() -> None:
    delta, prompts = np.array([1.0, -1.0, 2.0, -3.0]), np.arange(4)
    assert agreement(delta, np.array([0.1, -9.0, -0.1, 1.0]), prompts).value == 0.5


def test_reward_recovered_is_1_without_damage_and_0_with_that_of_mean_ablation() -> None:
    rng = np.random.default_rng(3)
    clean, ablated = rng.normal(size=(20, 2)), rng.normal(size=(20, 2))
    prompts = np.arange(20)
    assert reward_recovered(clean, clean, ablated, prompts).value == 1
    assert reward_recovered(clean, ablated, ablated, prompts).value == pytest.approx(0)
    assert reward_recovered(clean, (clean + ablated) / 2, ablated, prompts).value == pytest.approx(0.5)


def test_a_ratios_interval_resamples_prompts_not_pairs() -> None:
    rng = np.random.default_rng(4)
    part, whole = rng.random(40), np.ones(40)
    alone = ratio_interval(part, whole, np.arange(40))
    copied = ratio_interval(np.repeat(part, 9), np.repeat(whole, 9), np.repeat(np.arange(40), 9))
    np.testing.assert_allclose(copied, alone)
    assert alone[0] < part.mean() < alone[1]
    expected = 1.96 * part.std() / 40**0.5
    assert alone[1] - alone[0] == pytest.approx(2 * expected, rel=0.15)


@pytest.mark.parametrize("architecture", ENCODERS)
def test_zeroing_an_encoders_span_leaves_nothing_of_the_text(architecture: str) -> None:
    """In an encoder the prompt's tokens and the token that is read carry the response: all of them are in the span."""
    rm = shared_pm(architecture)
    pairs = [
        Pair(str(i), user("What is it?"), a, b) for i, (a, b) in enumerate([("It is tea.", "No one knows."), ("A", "B")])
    ]
    tokens = [t for t in rm.tokenize_all(pairs) if t.chosen.numel() == t.rejected.numel()]
    assert tokens
    assert {t.divergence for t in tokens} == {0}
    zero = ("resid_post.0", constant(torch.zeros(rm.d_model)))
    replaced = run_replacements(rm, tokens, range(len(tokens)), {"zero": zero})["zero"]
    assert np.abs(replaced.delta).max() > 1e-3
    np.testing.assert_allclose(replaced.delta_hat, 0, atol=1e-5)  # texts of equal length score the same

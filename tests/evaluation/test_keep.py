"""Keep K, ablate K and their controls: identities at both ends, donors of other prompts, orders that find the plant."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rmscope.activations.harvest import harvest
from rmscope.effects.ablation import ablate_groups, at_site, clean_runs
from rmscope.effects.splice import Span, run_replacements, splice
from rmscope.errors import InputError
from rmscope.evaluation.explained import (
    AblationBaseline,
    Donors,
    ablate,
    error_alone,
    keep,
    keep_curve,
    lost_share,
    norm_matched_moves,
    smallest_k,
    stretch,
)
from rmscope.evaluation.selection import (
    Profile,
    Responses,
    differences,
    forward_order,
    length_flags,
    matched_controls,
    noise,
    principal_components,
    profile,
    random_dictionary,
    signed_basis,
    signed_units,
)
from rmscope.pairs.pair import SIDES, Pair
from tests.effects.test_splice import perfect
from tests.model.small import ENCODER, PAIRS, D, shared_pm, small_sae, user

SITE = "resid_post.1"
OTHERS = [
    Pair(f"q{i}", user(f"How is the river number {i}?"), f"It is high, thanks for asking {i} times!", f"No problem {i}.")
    for i in range(6)
] + [Pair("again", PAIRS[0].prompt, "It is Paris.", "It is London.")]


@pytest.fixture(scope="module")
def responses(tmp_path_factory: pytest.TempPathFactory) -> Responses:
    folder: Path = tmp_path_factory.mktemp("store")
    return Responses(harvest(shared_pm("llama"), OTHERS, [SITE], folder), SITE)


@pytest.fixture(scope="module")
def donors(responses: Responses) -> Donors:
    return Donors(responses, [p.prompt_key for p in OTHERS], [p.prompt_key for p in PAIRS])


@pytest.fixture(scope="module")
def baseline(donors: Donors, responses: Responses) -> AblationBaseline:
    sae = small_sae()
    x = torch.cat([responses.x(i) for i in range(len(responses))])
    return AblationBaseline(sae, donors, sae.encode(x).mean(0), x.mean(0))


def test_a_stored_response_is_the_stream_of_its_span(responses: Responses) -> None:
    rm = shared_pm("llama")
    assert len(responses) == 2 * len(OTHERS)
    for i in (0, 5, 13):
        t, side = rm.tokenize(OTHERS[responses.pair[i]]), responses.side[i]
        with torch.no_grad():
            stream = rm.model(t.side(side)[None], output_hidden_states=True).hidden_states[2][0]
        torch.testing.assert_close(responses.x(i), stream[t.divergence :], atol=0.05, rtol=0.01)  # stored in bfloat16


def test_donors_never_share_the_prompt_and_are_one_a_prompt(donors: Donors, responses: Responses) -> None:
    for pair in range(len(PAIRS)):
        of = donors.of(pair)
        prompts = [OTHERS[responses.pair[i]].prompt_key for i in of]
        assert len(set(prompts)) == len(of) == 5
        assert PAIRS[pair].prompt_key not in prompts
        np.testing.assert_array_equal(donors.of(pair), of)
    assert any(donors.of(0).tolist() != donors.of(p).tolist() for p in (1, 2, 3))


def test_too_few_prompts_for_donors_are_told(responses: Responses) -> None:
    one = [PAIRS[0].prompt_key]
    with pytest.raises(InputError, match="harvest more"):
        Donors(responses, [p.prompt_key for p in OTHERS], one, n=7).of(0)


def test_a_donor_is_stretched_from_first_to_last() -> None:
    x = torch.arange(5.0)[:, None].expand(-1, D)
    assert stretch(x, 9)[:, 0].tolist()[::8] == [0.0, 4.0]
    assert stretch(x, 5).equal(x)
    assert stretch(x, 2)[:, 0].tolist() == [0.0, 4.0]
    assert stretch(x, 1)[:, 0].tolist() == [4.0]
    assert stretch(x, 0).shape == (0, D)


def test_keeping_none_is_the_donor_and_all_is_the_splice_with_the_donors_error(baseline: AblationBaseline) -> None:
    sae, at = baseline.sae, Span(1, "chosen", torch.randn(7, D))
    order = np.random.default_rng(0).permutation(sae.m)[:, None]
    found = keep(baseline, order, (0, 40, sae.m))(at).reshape(6, 3, 7, D)
    x_hat = sae(at.x)
    for b, (x0, f0) in enumerate(baseline.bases(at)):
        torch.testing.assert_close(found[b, 0], x0)
        torch.testing.assert_close(found[b, 2], x_hat + x0 - sae.decode(f0), atol=1e-4, rtol=1e-4)
        kept = torch.from_numpy(order[:40, 0])
        f = f0.clone()
        f[:, kept] = sae.encode(at.x)[:, kept]
        torch.testing.assert_close(found[b, 1], sae.decode(f) + x0 - sae.decode(f0), atol=1e-4, rtol=1e-4)


def test_the_error_alone_is_the_mirror_of_keeping_all(baseline: AblationBaseline) -> None:
    at = Span(0, "rejected", torch.randn(5, D))
    everything = keep(baseline, np.arange(baseline.sae.m)[:, None], (baseline.sae.m,))(at)
    both = torch.stack([at.x + x0 for x0, _ in baseline.bases(at)])
    torch.testing.assert_close(everything + error_alone(baseline)(at), both, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", ENCODER])
def test_keeping_every_coordinate_changes_no_reward(architecture: str, donors: Donors) -> None:
    rm, sae = shared_pm(architecture), signed_basis(torch.linalg.qr(torch.randn(D, D))[0], torch.randn(D))
    baseline = AblationBaseline(sae, donors, torch.rand(2 * D), torch.randn(D))  # all coordinates kept: no mean is left
    tokens = rm.tokenize_all(PAIRS[:2])
    baseline = AblationBaseline(sae, donors, baseline.f_mean, sae.decode(baseline.f_mean))
    rows = run_replacements(rm, tokens, [0, 1], {"k": (SITE, keep(baseline, signed_units(D), (0, D)))})["k"]
    curve = keep_curve(rows, (0, D), np.arange(2))
    assert curve[1].donors.value == pytest.approx(1, abs=1e-3)
    assert curve[1].mean.value == pytest.approx(1, abs=1e-3)
    assert curve[1].single == pytest.approx(1, abs=1e-3)
    assert curve[0].donors.value < 0.9


def test_ablating_a_set_is_the_exact_ablation_of_its_group() -> None:
    rm, sae = shared_pm("llama"), small_sae()
    tokens = rm.tokenize_all(PAIRS)
    sets = [np.arange(96), np.arange(0, 96, 3), np.array([], dtype=np.int64)]
    rows = run_replacements(rm, tokens, range(4), {"r": (SITE, ablate(sae, [sets]))})["r"]
    for i, t in enumerate(tokens):
        for s, side in enumerate(SIDES):
            response = at_site(sae, clean_runs(rm, t, [SITE])[side], SITE, t.divergence)
            effects = ablate_groups(rm, sae, response, SITE, [s.tolist() for s in sets])
            np.testing.assert_allclose(rows.clean[i, s] - rows.rewards[i, s], effects, atol=1e-4)


def test_lost_is_0_when_nothing_changes_and_1_when_nothing_is_left() -> None:
    delta, prompts = np.random.default_rng(0).normal(size=30), np.arange(30)
    assert lost_share(delta, delta, prompts).value == 0
    assert lost_share(delta, 0 * delta, prompts).value == 1
    assert lost_share(delta, delta / 4, prompts).value == pytest.approx(0.75)


def test_differences_add_up_to_the_reward_difference_without_an_error() -> None:
    rm, sae = shared_pm("llama", gain=0.5), perfect()
    tokens = rm.tokenize_all(PAIRS)
    f_mean = torch.rand(2 * D)
    x0 = sae.decode(f_mean)
    found, delta = differences(rm, {"p": (sae, f_mean)}, SITE, tokens, x0, cuts=np.linspace(0, 1, 9).tolist())
    start = run_replacements(rm, tokens, range(4), {"0": (SITE, lambda at: x0.expand_as(at.x)[None])})["0"]
    np.testing.assert_allclose(delta, start.delta, atol=1e-4)
    np.testing.assert_allclose(found["p"].sum(1), delta - start.delta_hat[:, 0], atol=5e-3)
    assert np.abs(found["p"].sum(1)).max() > 0.05


def test_the_order_begins_with_the_features_that_make_the_difference() -> None:
    rng = np.random.default_rng(0)
    D_ = rng.normal(size=(200, 40)) * 0.3
    D_[:, 7] *= 6
    D_[:, 3] *= 12
    delta = D_[:, 7] + D_[:, 3] + 0.01 * rng.normal(size=200)
    order = forward_order(D_, delta)
    assert order[:2].tolist() == [3, 7]
    assert sorted(order.tolist()) == list(range(40))
    flipped = rng.choice([-1, 1], (200, 1))
    np.testing.assert_array_equal(forward_order(flipped * D_, flipped[:, 0] * delta), order)


def test_length_features_lose_their_mean_to_the_length() -> None:
    rng = np.random.default_rng(1)
    length = rng.normal(10, 5, 300)
    D_ = np.stack([length * 0.1 + rng.normal(0, 0.1, 300), 1 + rng.normal(0, 0.1, 300)], 1)
    assert length_flags(D_, length).tolist() == [True, False]


def test_the_profile_is_what_the_features_do_on_the_responses(responses: Responses) -> None:
    sae = small_sae(k=12)
    found = profile(sae, responses, lambda pair, side: 3)
    x = [responses.x(i) for i in range(len(responses))]
    f = sae.encode(torch.cat(x))
    torch.testing.assert_close(found.f_mean, f.mean(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.x_mean, torch.cat(x).mean(0), atol=1e-4, rtol=1e-4)
    chosen = torch.cat([v for v, side in zip(x, responses.side, strict=True) if side == "chosen"])
    np.testing.assert_allclose(found.fire_chosen, (sae.encode(chosen) > 0).float().mean(0), atol=1e-6)
    np.testing.assert_allclose(found.mass, f.sum(0) / len(x), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found.dense, ((f > 0).float().mean(0) > 0.1).numpy())
    late = torch.cat([torch.arange(len(v)) >= 3 for v in x])
    share = (f * late[:, None]).sum(0) / f.sum(0).clamp_min(1e-9)
    np.testing.assert_array_equal(found.ending, (share >= 0.8).numpy())
    assert 0 < found.dense.sum() < sae.m


def test_signed_directions_are_exact_together_and_the_largest_ones_alone_a_projection() -> None:
    x = torch.randn(50, D) @ torch.randn(D, D)
    basis = principal_components(x)
    torch.testing.assert_close(basis @ basis.t(), torch.eye(D), atol=1e-5, rtol=0)
    variances = ((x - x.mean(0)) @ basis.t()).var(0)
    assert bool((variances.diff() <= 1e-3).all())
    torch.testing.assert_close(signed_basis(basis, x.mean(0))(x), x, atol=1e-4, rtol=1e-4)
    z = (x - x.mean(0)) @ basis.t()
    cut = z.abs().topk(5, dim=1).values[:, -1:]
    torch.testing.assert_close(
        signed_basis(basis, x.mean(0), k=5)(x), torch.where(z.abs() >= cut, z, 0.0) @ basis + x.mean(0), atol=1e-3, rtol=1e-4
    )


def test_a_random_dictionary_has_the_l0_and_the_best_scale() -> None:
    x = torch.randn(80, D) + 3
    sae = random_dictionary(x, 96, 6)
    assert sae.active(x).value.numel() <= 6 * 80
    error = (x - sae(x)).square().sum()
    for factor in (0.97, 1.03):
        worse = x - (factor * (sae(x) - sae.b_dec) + sae.b_dec)
        assert worse.square().sum() > error


def test_noise_has_the_errors_norm(baseline: AblationBaseline) -> None:
    at = Span(2, "chosen", torch.randn(9, D))
    moved = noise(baseline.sae)(at)[0] - at.x
    torch.testing.assert_close(moved.norm(dim=1), (at.x - baseline.sae(at.x)).norm(dim=1), atol=1e-4, rtol=1e-4)
    assert not torch.equal(noise(baseline.sae)(Span(2, "rejected", at.x))[0] - at.x, moved)


def test_moving_along_real_differences_goes_as_far_as_the_ablation(baseline: AblationBaseline, donors: Donors) -> None:
    at = Span(1, "chosen", torch.randn(6, D))
    sets = [np.arange(10), np.arange(96)]
    moved = norm_matched_moves(baseline.sae, donors, sets)(at) - at.x
    gone = at.x - ablate(baseline.sae, [sets])(at)
    torch.testing.assert_close(moved.norm(dim=2), gone.norm(dim=2), atol=1e-4, rtol=1e-4)


def test_matched_controls_are_the_nearest_features_and_used_once() -> None:
    rng = np.random.default_rng(0)
    size = np.exp(rng.normal(0, 2, 300))
    traits = Profile(size * 1e-3, size * 1e-3, size, *(np.zeros(300, dtype=bool),) * 2, torch.zeros(300), torch.zeros(1))
    features = np.arange(20)
    found = matched_controls(traits, features)
    assert len(set(found.tolist())) == 20
    assert not set(found.tolist()) & set(features.tolist())
    apart = np.abs(np.log(size[found] / size[features])).mean()
    assert apart < 0.3 * np.abs(np.log(size[rng.permutation(300)[:20]] / size[features])).mean()


def test_the_smallest_k_that_reaches_a_threshold() -> None:
    curve = [(0, 0.0), (8, 0.4), (16, 0.85), (32, 0.95)]
    assert [smallest_k(curve, t) for t in (0.5, 0.8, 0.9, 0.99)] == [16, 16, 32, None]


def test_splice_and_keep_agree_where_the_error_is_nothing(donors: Donors) -> None:
    rm, sae = shared_pm("llama"), perfect()
    baseline = AblationBaseline(sae, donors, torch.zeros(2 * D), sae.b_dec.detach())
    order = np.arange(2 * D)[:, None]
    tokens = rm.tokenize_all(PAIRS)
    rows = run_replacements(rm, tokens, range(4), {"s": (SITE, splice(sae)), "k": (SITE, keep(baseline, order, (2 * D,)))})
    for b in range(6):
        np.testing.assert_allclose(rows["k"].delta_hat[:, b], rows["s"].delta_hat[:, 0], atol=5e-4)

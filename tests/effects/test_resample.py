"""Resampled ablation: equal to a plain forward pass with the donor's values put in, and exactly nothing where it must be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rmscope.activations.store import ActivationStore, StoreWriter
from rmscope.effects.ablation import Response, at_site, clean_runs
from rmscope.effects.across import ablate_entries_across, ablate_members
from rmscope.effects.resample import DONORS, Donors, resampled_entries
from rmscope.model.reward_model import RewardModel
from rmscope.sae.base import Sae
from tests.effects.naive import reward_without
from tests.model.small import PAIRS, small_pm, small_sae

SITES = ("resid_post.0", "resid_post.2")
MEMBERS = {"resid_post.0": range(3, 23), "resid_post.2": range(17, 40)}


def stored(folder: Path, rows: dict[str, torch.Tensor], ids: torch.Tensor) -> ActivationStore:
    """A store of one response: its streams by site, and its token ids."""
    n = len(ids)
    with StoreWriter(folder, SITES, next(iter(rows.values())).shape[1], {"model": "small"}) as writer:
        for site in SITES:
            ones = torch.ones(n, dtype=torch.long)
            writer.add(site, rows[site], ids, 0 * ones, torch.arange(1, n + 1), ones)
    return ActivationStore.open(folder)


@pytest.fixture
def rm() -> RewardModel:
    return small_pm("llama")


@pytest.fixture
def saes() -> dict[str, Sae]:
    return {site: small_sae(seed=i) for i, site in enumerate(SITES)}


def responses_of(rm: RewardModel, saes: dict[str, Sae], pair: int = 0) -> dict[str, Response]:
    tokens = rm.tokenize(PAIRS[pair])
    text = clean_runs(rm, tokens, SITES)["chosen"]
    return {site: at_site(saes[site], text, site, tokens.divergence) for site in SITES}


def test_a_response_that_gives_its_own_values_moves_nothing(rm: RewardModel, saes: dict[str, Sae], tmp_path: Path) -> None:
    own = responses_of(rm, saes)
    some = own[SITES[0]]
    ids = some.text.ids[some.start : some.start + len(some.x)]
    donors = Donors(stored(tmp_path / "store", {site: own[site].x for site in SITES}, ids), saes, MEMBERS)
    entries = resampled_entries(donors, "place", own, MEMBERS, np.random.default_rng(0))
    assert any(len(token) for token, _, _ in entries.values())
    assert ablate_entries_across(rm, saes, own, [entries]).abs() < 1e-5


def test_donors_in_which_nothing_fires_give_the_ablation_to_zero(
    rm: RewardModel, saes: dict[str, Sae], tmp_path: Path
) -> None:
    own = responses_of(rm, saes)
    x = {site: -100 * saes[site].W_enc.sum(1).expand(30, -1) for site in SITES}
    silent = {site: [j for j in MEMBERS[site] if not bool((saes[site].encode(x[site])[:, j] > 0).any())] for site in SITES}
    assert all(silent.values())
    donors = Donors(stored(tmp_path / "store", x, torch.arange(30)), saes, silent)
    for donor in DONORS:
        entries = resampled_entries(donors, donor, own, silent, np.random.default_rng(0))
        given, expected = ablate_entries_across(rm, saes, own, [entries]), ablate_members(rm, saes, own, [silent])
        torch.testing.assert_close(given, expected)
        assert float(expected.abs()) > 1e-4


@pytest.mark.parametrize("donor", DONORS)
def test_it_is_a_plain_forward_with_the_donors_values_put_in(
    rm: RewardModel, saes: dict[str, Sae], donor: str, tmp_path: Path
) -> None:
    """One donor alone, so that each token takes the same values: c - c' is taken out as any other change of the stream."""
    own, other = responses_of(rm, saes), responses_of(rm, saes, 1)
    row = {site: other[site].x[3:4] for site in SITES}
    donors = Donors(stored(tmp_path / "store", row, torch.tensor([7])), saes, MEMBERS)
    entries = resampled_entries(donors, donor, own, MEMBERS, np.random.default_rng(0))  # type: ignore[arg-type]
    taken, clean = {}, {}
    for site in SITES:
        listed, block = list(MEMBERS[site]), int(site[-1])
        f = saes[site].encode(own[site].x)[:, listed]
        given = saes[site].encode(row[site])[:, listed] * (f > 0).any(1, keepdim=True)
        taken[block], clean[block] = (f - given) @ saes[site].W_dec[listed], own[site].x
    some = own[SITES[0]]
    expected = some.text.reward - reward_without(rm, some.text.ids, some.start, taken, clean)
    effect = float(ablate_entries_across(rm, saes, own, [entries]))
    assert effect == pytest.approx(expected, abs=5e-5 * max(1.0, abs(some.text.reward)))
    assert abs(effect) > 1e-4


def test_donors_have_the_place_or_the_token_that_is_asked_for(rm: RewardModel, saes: dict[str, Sae], tmp_path: Path) -> None:
    x = torch.randn(40, rm.d_model)
    ids = torch.arange(40) % 5
    donors = Donors(stored(tmp_path / "store", dict.fromkeys(SITES, x), ids), saes, MEMBERS)
    rng = np.random.default_rng(0)
    assert donors.draw("place", list(range(40)), rng).tolist() == list(range(40))  # one response: each place once
    drawn = donors.draw("token", [3] * 200, rng)
    assert set(ids[drawn].tolist()) == {3}
    assert set(drawn.tolist()) == {3, 8, 13, 18, 23, 28, 33, 38}
    assert len(set(donors.draw("token", [99] * 500, rng).tolist())) > 30  # no such token: any of a response

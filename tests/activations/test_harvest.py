"""What is harvested is the stream of every text alone, once, whatever it was batched with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from rmscope.activations.harvest import CHOSEN, PROMPT, REJECTED, harvest
from rmscope.activations.store import COLUMNS
from rmscope.model.reward_model import RewardModel
from tests.model.small import PAIRS, shared_pm

SITES = ["embed", "resid_post.1"]


def alone(rm: RewardModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        hidden = rm.model.base_model(ids[None], output_hidden_states=True).hidden_states
    return {"embed": hidden[0][0], "resid_post.1": hidden[2][0]}


def test_every_row_is_the_stream_of_its_text_alone(tmp_path: Path) -> None:
    rm = shared_pm("llama")
    store = harvest(rm, PAIRS, SITES, tmp_path)
    columns = {name: store.column("embed", name).tolist() for name in COLUMNS}
    expected = {
        (i, side): alone(rm, rm.tokenize(p).side(side)) for i, p in enumerate(PAIRS) for side in ("chosen", "rejected")
    }
    ids = {(i, side): rm.tokenize(p).side(side).tolist() for i, p in enumerate(PAIRS) for side in ("chosen", "rejected")}
    for site in SITES:
        rows = store.rows(site, torch.arange(store.tokens(site)))
        for row, token, pair, position, region in zip(rows, *columns.values(), strict=True):
            side = "rejected" if region == REJECTED else "chosen"
            assert ids[pair, side][position] == token
            assert torch.allclose(row, expected[pair, side][site][position], rtol=2e-2, atol=2e-2)
    regions = {(p, r) for p, r in zip(columns["pair"], columns["region"], strict=True)}
    assert regions == {(i, r) for i in range(len(PAIRS)) for r in (PROMPT, CHOSEN, REJECTED)}
    for i, pair in enumerate(PAIRS):
        t = rm.tokenize(pair)
        assert columns["pair"].count(i) == t.chosen.numel() + t.rejected.numel() - t.divergence


def test_a_prefix_is_stored_once_and_pairs_keep_their_numbers(tmp_path: Path) -> None:
    """Over several units of work: 130 pairs that repeat the same four."""
    rm = shared_pm("llama")
    many = [replace(PAIRS[i % 4], id=str(i)) for i in range(130)]
    store = harvest(rm, many, ["embed"], tmp_path)
    pair, region = store.column("embed", "pair"), store.column("embed", "region")
    assert set(pair[region == PROMPT].tolist()) == {0, 1, 2, 3}
    for r in (CHOSEN, REJECTED):
        assert set(pair[region == r].tolist()) == set(range(130))

"""The stream in two parts: x = b + δ, and every effect of a feature of δ or b is that of the slow exact twin."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor

from rmscope.api.effects import ledger
from rmscope.effects.ablation import ablate_groups, at_site, clean_runs
from rmscope.effects.gradients import streams_and_gradients
from rmscope.effects.ledger import baseline, joint_baseline, ledger_rows
from rmscope.effects.tables import ledger_tables
from rmscope.effects.written import written_shares
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import SIDES
from rmscope.sae.joint import JointSae
from tests.effects.naive import reward_with
from tests.model.based import KINDS, pm_with_base
from tests.model.small import DECODERS, ENCODERS, OTHERS, PAIRS, small_sae

ARCHITECTURES = [*DECODERS, *OTHERS, *ENCODERS]
BLOCK = 2
SD = 10.0
GROUPS = ([3], [17, 40], [0, 1, 2, 41, 70], [5, 60, 95])
OF_BOTH = [*GROUPS, [3, 17, 96, 100, 120, 135]]
"""The last set holds features of either part: the difference SAE has 96."""


def naive_streams(rm: RewardModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(x, b) [T, d] after the block: the PM's own forward of the text, and that of the base's module."""
    streams = []
    for module in (rm.model.base_model, rm.base.model):  # type: ignore[union-attr]
        blocks = max((m for m in module.modules() if isinstance(m, torch.nn.ModuleList)), key=len)
        handle = blocks[BLOCK].register_forward_hook(
            lambda _m, _a, out: streams.append(out[0] if isinstance(out, tuple) else out)
        )
        with torch.no_grad():
            module(ids[None])
        handle.remove()
    return streams[0][0], streams[1][0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_parts_are_those_of_two_forward_passes_and_sum_to_the_stream(architecture: str, kind: str) -> None:
    rm = pm_with_base(architecture, kind)
    sites = [f"{part}.{BLOCK}" for part in ("resid_post", "diff", "base", "both")]
    tokens = rm.tokenize_all(PAIRS)
    for batch in rm.batches(tokens):
        x, delta, b, both = rm.streams(batch, sites).values()
        assert torch.equal(x - b, delta)
        assert torch.equal(torch.cat([delta, b], -1), both)
        for text in batch.texts:
            own_x, own_b = naive_streams(rm, tokens[text.pair].side(text.side))
            at = text.columns[: text.read + 1]
            torch.testing.assert_close(b[text.row, at], own_b[: len(at)], atol=2e-5, rtol=2e-5)
            torch.testing.assert_close(delta[text.row, at], (own_x - own_b)[: len(at)], atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_with_all_that_was_written_ablated_the_stream_is_the_bases_bit_for_bit(architecture: str, kind: str) -> None:
    rm, site = pm_with_base(architecture, kind), f"diff.{BLOCK}"
    for batch in rm.batches(rm.tokenize_all(PAIRS)):
        b = rm.streams(batch, [f"base.{BLOCK}"])[f"base.{BLOCK}"]
        given = rm.rewards_from(batch, site, torch.zeros_like(b))
        assert torch.equal(given, rm.rewards_from(batch, f"resid_post.{BLOCK}", b))
        assert not torch.allclose(given, rm.rewards(batch), atol=1e-3)  # the difference matters to the reward


@pytest.mark.parametrize("part", ["diff", "base", "both"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_exact_ablation_of_a_part_is_that_of_the_naive_twin(architecture: str, kind: str, part: str) -> None:
    rm, site = pm_with_base(architecture, kind), f"{part}.{BLOCK}"
    own, other = small_sae(), small_sae(m=40, seed=1)
    sae = JointSae(own, other, site) if part == "both" else own
    tokens = rm.tokenize(PAIRS[0])
    runs = clean_runs(rm, tokens, [site])
    for side in SIDES:
        ids, start = runs[side].ids, tokens.divergence
        groups = OF_BOTH if part == "both" else GROUPS
        given = ablate_groups(rm, sae, at_site(sae, runs[side], site, start), site, groups)
        x, b = naive_streams(rm, ids)
        read = {"diff": [(x - b, own)], "base": [(b, own)], "both": [(x - b, own), (b, other)]}[part]
        f = torch.cat([one.encode(stream[start:]) for stream, one in read], 1)
        rows = torch.cat([one.W_dec for _, one in read])
        clean = float(rm.reward_alone(ids))
        for group, effect in zip(groups, given.tolist(), strict=True):
            change = f[:, list(group)] @ rows[list(group)]

            def edit(stream: Tensor, change: Tensor = change, start: int = start) -> Tensor:
                return torch.cat([stream[:, :start], stream[:, start:] - change], 1)

            naive = clean - reward_with(rm, ids, f"resid_post.{BLOCK}", edit)
            assert effect == pytest.approx(naive, abs=3e-5 * max(1.0, abs(clean)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_splice_of_both_parts_is_the_sum_of_their_reconstructions(kind: str) -> None:
    rm, own, other = pm_with_base("llama", kind), small_sae(), small_sae(m=40, seed=1)
    sae, both, whole = JointSae(own, other, f"both.{BLOCK}"), f"both.{BLOCK}", f"resid_post.{BLOCK}"
    for batch in rm.batches(rm.tokenize_all(PAIRS)):
        delta, b = rm.streams(batch, [f"diff.{BLOCK}", f"base.{BLOCK}"]).values()
        given = rm.rewards(batch, {both: sae})
        torch.testing.assert_close(given, rm.rewards_from(batch, whole, own(delta) + other(b)), atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(given, rm.rewards_from(batch, both, torch.cat([own(delta), other(b)], -1)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_a_part_is_that_of_the_whole_stream(kind: str) -> None:
    rm = pm_with_base("llama", kind)
    batch = next(iter(rm.batches(rm.tokenize_all(PAIRS))))
    sites = [f"{part}.{BLOCK}" for part in ("resid_post", "diff", "base", "both")]
    at = streams_and_gradients(rm, batch, sites)
    apart = {site: streams_and_gradients(rm, batch, [site])[site] for site in sites}
    for site in sites:
        torch.testing.assert_close(at[site], apart[site])
        for half in at[site][1].split(rm.d_model, -1):
            assert torch.equal(half, at[sites[0]][1])


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_ledger_from_the_base_closes_and_its_remainder_is_inherited(architecture: str, kind: str) -> None:
    rm, site = pm_with_base(architecture, kind), f"diff.{BLOCK}"
    sae, tokens = small_sae(), rm.tokenize_all(PAIRS)
    rows = list(ledger_rows(rm, sae, site, tokens, range(len(tokens)), baseline(sae, "base"), SD, halvings=3))
    table = ledger_tables(sorted(rows, key=lambda r: r[0]), [p.id for p in PAIRS])["ledger"]
    scores = rm.score(PAIRS)
    torch.testing.assert_close(table["delta_r"].cast(float).to_torch(), scores.delta.double(), atol=1e-4, rtol=1e-4)
    inherited = torch.zeros(len(PAIRS))
    for batch in rm.batches(rm.tokenize_all(PAIRS)):
        delta = rm.streams(batch, [site])[site].clone()
        for text in batch.texts:
            delta[text.row, text.span] = 0
        for text, reward in zip(batch.texts, rm.rewards_from(batch, site, delta).tolist(), strict=True):
            inherited[text.pair] += reward if text.side == "chosen" else -reward
    torch.testing.assert_close(table["remainder"].cast(float).to_torch().float(), inherited, atol=1e-4, rtol=1e-4)
    parts = table.select(pl.sum_horizontal("features", "error", "constant", "remainder", "gap")).to_series()
    np.testing.assert_allclose(parts, table["delta_r"], atol=1e-9)
    assert (table["gap"].abs() <= 0.01 * table["delta_r"].abs().clip(0.1 * SD)).all()
    assert (table["constant"] != 0).any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_ledger_of_both_parts_begins_at_the_mean_of_the_bases_stream_with_nothing_written(kind: str) -> None:
    rm, site = pm_with_base("llama", kind), f"both.{BLOCK}"
    sae, tokens = JointSae(small_sae(), small_sae(m=40, seed=1), site), rm.tokenize_all(PAIRS)
    mean = torch.randn(rm.d_model, generator=torch.Generator().manual_seed(2))
    start = joint_baseline(sae, torch.rand(sae.m, generator=torch.Generator().manual_seed(3)), torch.cat([mean + 5, mean]))
    assert torch.equal(start.x[: rm.d_model], torch.zeros(rm.d_model))
    torch.testing.assert_close(start.x[rm.d_model :], mean)
    rows = list(ledger_rows(rm, sae, site, tokens, range(len(tokens)), start, SD, halvings=6))
    table = ledger_tables(sorted(rows, key=lambda r: r[0]), [p.id for p in PAIRS])["ledger"]
    torch.testing.assert_close(table["delta_r"].cast(float).to_torch(), rm.score(PAIRS).delta.double(), atol=1e-4, rtol=1e-4)
    parts = table.select(pl.sum_horizontal("features", "error", "constant", "remainder", "gap")).to_series()
    np.testing.assert_allclose(parts, table["delta_r"], atol=1e-9)
    assert (table["gap"].abs() <= 0.01 * table["delta_r"].abs().clip(0.1 * SD)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_written_shares_a_block_is_what_goes_with_the_bases_stream_in_its_place(kind: str) -> None:
    rm = pm_with_base("llama", kind)
    tokens = rm.tokenize_all(PAIRS)
    [found] = [row for row in written_shares(rm, tokens) if row.block == BLOCK]
    clean, without = np.zeros(len(PAIRS)), np.zeros((2, len(PAIRS)))
    for i, pair in enumerate(tokens):
        for side, sign in (("chosen", 1), ("rejected", -1)):
            ids = pair.side(side)
            x, b = naive_streams(rm, ids)
            clean[i] += sign * float(rm.reward_alone(ids))
            for kind_of, end in enumerate((ids.numel(), max(pair.divergence, rm.ending(ids)))):
                mixed = torch.cat([x[: pair.divergence], b[pair.divergence : end], x[end:]])[None]
                without[kind_of, i] += sign * reward_with(rm, ids, f"resid_post.{BLOCK}", lambda _x, mixed=mixed: mixed)
    expected = (clean - without) @ clean / (clean @ clean)
    assert [found.written, found.at_own_tokens] == pytest.approx(expected.tolist(), abs=1e-4)


def test_a_ledger_from_python_begins_where_that_of_a_run_does() -> None:
    """At both parts: nothing written, and the mean of the base's stream over the spans."""
    rm, site = pm_with_base("llama"), f"both.{BLOCK}"
    sae = JointSae(small_sae(), small_sae(m=40, seed=1), site)
    table = ledger(rm, sae, PAIRS[:2])
    rows = []
    for t in rm.tokenize_all(PAIRS[:2]):
        for side, text in clean_runs(rm, t, [site]).items():
            rows.append(text.streams[site][t.divergence : rm.read_position(t.side(side)) + 1])
    mean = torch.cat(rows)[:, rm.d_model :].mean(0)
    for row, t in zip(table.iter_rows(named=True), rm.tokenize_all(PAIRS[:2]), strict=True):
        ends = {}
        for side, text in clean_runs(rm, t, [site]).items():
            start = torch.cat([torch.zeros(rm.d_model), mean]).expand(text.ids.numel() - t.divergence, -1)
            ends[side] = float(rm.resume(text, site, t.divergence, start[None])[0])
        assert row["remainder"] == pytest.approx(ends["chosen"] - ends["rejected"], abs=1e-4)

"""Encoders and decoders with recurrent layers run the blocks after a site alone, and give what their whole forward gives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rmscope.effects.ablation import BATCH_TOKENS, Response, ablate_groups, at_site, clean_runs
from rmscope.model.checks import forward
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import SIDES
from tests.effects.naive import reward_with
from tests.model.small import BLOCKS, HYBRIDS, PAIRS, shared_pm, small_pm, small_sae

ARCHITECTURES = [*HYBRIDS, "bert", "roberta"]
GROUPS = [[j, j + 1, j + 2] for j in range(0, 96, 3)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("site", ["embed", "resid_post.0", "resid_post.2", "resid_post.3"])
def test_rewards_from_a_stream_are_those_of_the_plain_forward_with_it(architecture: str, site: str) -> None:
    rm = shared_pm(architecture)
    torch.manual_seed(1)
    for batch in rm.batches(rm.tokenize_all(PAIRS[1:])):  # padded: texts of several lengths in one batch
        x = rm.streams(batch, [site])[site]
        moved = x + x.std() * torch.randn_like(x)
        rewards, clean = rm.rewards_from(batch, site, moved), rm.rewards(batch)
        for text, reward in zip(batch.texts, rewards.tolist(), strict=True):
            ids, stream = batch.ids[text.row, text.columns], moved[text.row, text.columns][None]
            expected = reward_with(rm, ids, site, lambda _x, stream=stream: stream)
            assert reward == pytest.approx(expected, abs=1e-4)
        assert (rewards - clean).abs().min() > 1e-3


def response_of(rm: RewardModel, site: str, side: str = "chosen") -> Response:
    tokens = rm.tokenize(PAIRS[0])
    return at_site(small_sae(), clean_runs(rm, tokens, [site], [side])[side], site, tokens.divergence)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ablations_are_those_of_whole_forwards(architecture: str) -> None:
    rm, whole, site = shared_pm(architecture), small_pm(architecture), "resid_post.1"
    whole.capabilities = replace(whole.capabilities, skipping=False)
    for side in SIDES:
        effects = [ablate_groups(pm, small_sae(), response_of(pm, site, side), site, GROUPS) for pm in (rm, whole)]
        torch.testing.assert_close(*effects, atol=1e-4, rtol=0)
        assert effects[0].abs().max() > 1e-3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("block", [0, 2, 3])
def test_an_ablation_runs_the_blocks_after_its_site_alone_and_many_share_a_batch(architecture: str, block: int) -> None:
    rm, site = small_pm(architecture), f"resid_post.{block}"
    assert rm.capabilities.skipping  # measured before what is counted below
    response = response_of(rm, site)
    ran: list[tuple[int, int]] = []
    for i, module in enumerate(rm.blocks):
        part = list(module.children())[-1]  # a skipped block is called, but none of its parts
        part.register_forward_hook(lambda _m, _a, output, i=i: ran.append((i, len(output))))
    ablate_groups(rm, small_sae(), response, site, GROUPS)
    fire = sum(bool(torch.isin(response.active.feature, torch.tensor(group)).any()) for group in GROUPS)
    most = BATCH_TOKENS // response.text.ids.numel()
    rows = [min(most, fire - start) for start in range(0, fire, most)]
    assert fire > 4
    assert ran == [(i, n) for n in rows for i in range(block + 1, BLOCKS)]


@pytest.mark.parametrize("block", range(1, BLOCKS))
def test_an_encoder_whose_block_reads_what_the_one_before_kept_skips_none(block: int) -> None:
    kept: list[torch.Tensor] = []
    rm = small_pm("bert")
    inner = list(rm.blocks[block - 1].children())[-1]
    inner.register_forward_hook(lambda _m, _a, output: kept.append(output))
    list(rm.blocks[block].children())[-1].register_forward_hook(
        lambda _m, _a, output: output + 0.3 * kept[-1][: len(output)]
    )
    assert not rm.capabilities.skipping


def test_the_check_names_the_way() -> None:
    assert "recurrent layers; each ablation runs the blocks after its site" in forward(shared_pm("jamba")).detail
    assert "an encoder, or a head of its own" in forward(shared_pm("bert")).detail
    whole = small_pm("bert")
    whole.capabilities = replace(whole.capabilities, skipping=False)
    assert "each ablation is a full forward pass" in forward(whole).detail

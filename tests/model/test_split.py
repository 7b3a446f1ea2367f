"""A clean run that is resumed at any site and token gives the reward of the full forward pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rmscope.effects.ablation import clean_runs
from rmscope.model.packing import pad_texts
from rmscope.model.rendering import pair_tokens
from rmscope.model.reward_model import RewardModel
from tests.model.small import DECODERS, EOS, OTHERS, PAIRS, shared_pm, small_pm

SITES = ["embed", "resid_post.0", "resid_post.2", "resid_post.3"]


def limit(architecture: str) -> float:
    """GPT-J and GPT-Neo compute their attention scores in float32 whatever the model's precision."""
    return 3e-6 if architecture in ("gptj", "gpt_neo") else 1e-9


def whole(rm: RewardModel, ids: Tensor, site: str | None = None, change: Tensor | None = None, start: int = 0) -> float:
    """r of one text by a full forward; ``change`` [rest, d] is added to the stream at ``site`` from ``start`` on."""

    def edit(x: Tensor) -> Tensor:
        assert change is not None
        y = x.clone()
        y[0, start : start + len(change)] += change
        return y

    batch = pad_texts([(0, "chosen", ids, 1, rm.read_position(ids))], 0)
    return float(rm.rewards(batch, {site: edit} if site else None)[0])


@pytest.mark.parametrize("architecture", [*DECODERS, *OTHERS])
def test_resuming_with_the_clean_stream_gives_the_clean_reward(architecture: str) -> None:
    rm = shared_pm(architecture, torch.float64)
    for pair in (PAIRS[0], PAIRS[3]):
        ids = rm.tokenize(pair).chosen
        text = rm.prefill(ids, SITES)
        assert text.reward == pytest.approx(whole(rm, ids), abs=1e-9)
        for site in SITES:
            for start in (1, 30, ids.numel() - 1):
                rows = text.streams[site][start:].expand(3, -1, -1)
                rewards = rm.resume(text, site, start, rows)
                expected = torch.full((3,), text.reward, dtype=torch.float64)
                torch.testing.assert_close(rewards, expected, atol=limit(architecture), rtol=0)


@pytest.mark.parametrize("architecture", [*DECODERS, *OTHERS])
def test_resuming_with_another_stream_gives_the_reward_of_the_edited_forward(architecture: str) -> None:
    rm = shared_pm(architecture, torch.float64)
    ids = rm.tokenize(PAIRS[3]).chosen
    text = rm.prefill(ids, SITES)
    torch.manual_seed(1)
    for site in SITES:
        for start in (1, 70):
            changes = 0.5 * torch.randn(2, ids.numel() - start, rm.d_model, dtype=torch.float64)
            rewards = rm.resume(text, site, start, text.streams[site][start:] + changes)
            expected = torch.tensor([whole(rm, ids, site, c, start) for c in changes], dtype=torch.float64)
            assert (rewards - text.reward).abs().min() > 1e-4
            torch.testing.assert_close(rewards, expected, atol=limit(architecture), rtol=0)


@pytest.mark.parametrize("architecture", [*DECODERS, *OTHERS])
def test_a_side_that_takes_the_shared_prefix_of_the_other_side_is_its_own_clean_run(architecture: str) -> None:
    rm = shared_pm(architecture, torch.float64)
    for pair in PAIRS:
        tokens = rm.tokenize(pair)
        for order in (("chosen", "rejected"), ("rejected", "chosen")):
            second = clean_runs(rm, tokens, SITES, order)[order[1]]
            alone = rm.prefill(tokens.side(order[1]), SITES)
            assert second.reward == pytest.approx(alone.reward, abs=limit(architecture))
            assert torch.equal(second.ids, alone.ids)
            kept = [*((second.streams[s], alone.streams[s]) for s in SITES)]
            kept += [(a, b) for layers in zip(second.keys, alone.keys, strict=True) for a, b in zip(*layers, strict=True)]
            for mine, own in kept:
                torch.testing.assert_close(mine, own, atol=10 * limit(architecture), rtol=0)
            rest = alone.streams["resid_post.0"][None, tokens.divergence :]
            resumed = rm.resume(second, "resid_post.0", tokens.divergence, rest)
            assert float(resumed[0]) == pytest.approx(alone.reward, abs=limit(architecture))


def test_the_second_side_runs_only_the_tokens_after_the_shared_prefix() -> None:
    rm = small_pm("llama")
    tokens = rm.tokenize(PAIRS[0])
    assert rm.capabilities.resume  # measured before what is counted below
    widths: list[int] = []
    rm.blocks[0].register_forward_pre_hook(lambda _m, args: widths.append(args[0].shape[1]))
    clean_runs(rm, tokens, ["resid_post.0"])
    assert widths == [tokens.chosen.numel(), tokens.rejected.numel() - tokens.divergence]


def test_resuming_runs_no_block_up_to_the_site_and_no_token_before_the_start() -> None:
    rm = small_pm("llama")
    text = rm.prefill(rm.tokenize(PAIRS[0]).chosen, ["resid_post.1"])
    calls: list[tuple[int, int]] = []
    for i, block in enumerate(rm.blocks):
        block.self_attn.register_forward_pre_hook(
            lambda _m, _a, kwargs, i=i: calls.append((i, kwargs["hidden_states"].shape[1])), with_kwargs=True
        )
    rest = text.streams["resid_post.1"][None, 40:]
    rm.resume(text, "resid_post.1", 40, rest)
    assert calls == [(2, rest.shape[1]), (3, rest.shape[1])]


def test_resuming_leaves_the_clean_run_as_it_was() -> None:
    rm = shared_pm("llama", torch.float64)
    text = rm.prefill(rm.tokenize(PAIRS[0]).chosen, SITES)
    before = [k.clone() for k, _ in text.keys]
    rm.resume(text, "resid_post.0", 5, torch.randn_like(text.streams["resid_post.0"][5:]).expand(4, -1, -1))
    assert all(torch.equal(k, kept) for (k, _), kept in zip(text.keys, before, strict=True))


def test_sides_without_a_common_first_token_share_no_prefix() -> None:
    rm = shared_pm("llama", torch.float64)
    tokens = pair_tokens([11, 12, 13, 14], [21, 12, 13])
    both = clean_runs(rm, tokens, SITES)
    assert both["rejected"].reward == pytest.approx(whole(rm, tokens.rejected), abs=1e-9)


def test_the_clean_run_ends_at_the_read_position() -> None:
    rm = small_pm("llama", torch.float64, append_eos=True, pad_token_id=EOS)
    tokens = rm.tokenize(PAIRS[2])  # chosen is a prefix of rejected, so the shared prefix ends before its read position
    for order in (("chosen", "rejected"), ("rejected", "chosen")):
        for side, text in clean_runs(rm, tokens, SITES, order).items():
            assert text.ids.numel() == tokens.side(side).numel() - 1
            assert text.reward == pytest.approx(float(rm.reward_alone(tokens.side(side))), abs=1e-9)

"""Our rewards are transformers' own: each text alone, packed, padded, in any order; and a site is where it says it is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rmscope.errors import InputError
from rmscope.model.packing import by_budget, last_hidden_reads, pack_pairs
from rmscope.model.rendering import pair_tokens
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import SIDES, Pair
from tests.model.small import (
    BLOCKS,
    DECODERS,
    ENCODER,
    ENCODERS,
    EOS,
    OTHERS,
    PAD,
    PAIRS,
    WINDOW,
    D,
    shared_pm,
    small_model,
    small_pm,
    tokenizer,
    user,
)  # fmt: skip

ALL = [*DECODERS, *OTHERS, *ENCODERS]


def by_transformers(rm: RewardModel, ids: Tensor) -> float:
    with torch.no_grad():
        return float(rm.model(input_ids=ids[None]).logits[0, 0])


def truth(rm: RewardModel, pairs: list[Pair]) -> Tensor:
    """Rewards [pairs, 2] by AutoModelForSequenceClassification's own forward, one text at a time."""
    return torch.tensor([[by_transformers(rm, rm.tokenize(p).side(side)) for side in SIDES] for p in pairs])


def ours(rm: RewardModel, pairs: list[Pair]) -> Tensor:
    scores = rm.score(pairs)
    return torch.stack([scores.chosen, scores.rejected], dim=1)


@pytest.mark.parametrize("architecture", ALL)
def test_rewards_are_those_of_transformers_on_each_text_alone(architecture: str) -> None:
    rm = shared_pm(architecture)
    torch.testing.assert_close(ours(rm, PAIRS), truth(rm, PAIRS), atol=1e-5, rtol=1e-5)
    assert truth(rm, PAIRS).std() > 0.3


LEFT_MATTERS = {"gpt2", "gpt_neo", *ENCODERS}
"""Positions are learned and counted from the row's left end, or the head of an encoder reads the first token of the row."""


@pytest.mark.parametrize("architecture", ALL)
def test_transformers_own_batch_of_eight_gives_our_rewards(architecture: str) -> None:
    """Padded on the right for every architecture; on the left for all but those that look at the row's left end."""
    rm = shared_pm(architecture)
    texts = [t.side(side) for t in rm.tokenize_all(PAIRS) for side in SIDES]
    expected = ours(rm, PAIRS).flatten()
    assert len(texts) == 8
    for side in ("right", "left"):
        with torch.no_grad():
            rewards = rm.model(**in_a_batch(texts, side)).logits[:, 0]
        agree = torch.allclose(rewards, expected, atol=1e-4, rtol=1e-4)
        assert agree == (side == "right" or architecture not in LEFT_MATTERS)


def in_a_batch(texts: list[Tensor], side: str) -> dict[str, Tensor]:
    width = max(t.numel() for t in texts)
    padding = [(0, width - t.numel()) if side == "right" else (width - t.numel(), 0) for t in texts]
    ids = torch.stack([torch.nn.functional.pad(t, p, value=PAD) for t, p in zip(texts, padding, strict=True)])
    ones = [torch.ones_like(t) for t in texts]
    return {
        "input_ids": ids,
        "attention_mask": torch.stack([torch.nn.functional.pad(o, p) for o, p in zip(ones, padding, strict=True)]),
    }


@pytest.mark.parametrize("architecture", DECODERS)
def test_padded_rows_give_the_same_rewards_as_packed_ones(architecture: str) -> None:
    rm = small_pm(architecture)
    rm.capabilities = replace(rm.capabilities, packing=False)
    torch.testing.assert_close(ours(rm, PAIRS), truth(rm, PAIRS), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["mistral", "gemma2", "gemma3_text"])
def test_texts_longer_than_an_attention_window_get_rows_of_their_own(architecture: str) -> None:
    rm = shared_pm(architecture)
    tokens = rm.tokenize_all(PAIRS)
    assert rm.capabilities.packing
    assert rm.attention_window == WINDOW
    for batch in rm.batches(tokens):
        long = {max(tokens[t.pair].chosen.numel(), tokens[t.pair].rejected.numel()) > WINDOW for t in batch.texts}
        assert long == {batch.mask.dim() == 2}


@pytest.mark.parametrize("architecture", ["llama", "mistral", "bloom", ENCODER])
def test_neither_order_nor_company_changes_a_reward(architecture: str) -> None:
    rm = shared_pm(architecture)
    together = ours(rm, PAIRS)
    torch.testing.assert_close(ours(rm, PAIRS[::-1]).flip(0), together, atol=1e-5, rtol=0)
    alone = torch.cat([ours(rm, [p]) for p in PAIRS])
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=0)


@pytest.mark.parametrize("budget", [1, 150, 4096])
def test_every_text_of_a_unit_is_in_exactly_one_batch(budget: int) -> None:
    rm = shared_pm("mistral")
    tokens = rm.tokenize_all(PAIRS)
    seen = sorted((t.pair, t.side) for b in rm.batches(tokens, budget) for t in b.texts)
    assert seen == sorted((i, side) for i in range(len(PAIRS)) for side in SIDES)


def test_batches_keep_the_budget_and_lose_nothing() -> None:
    lengths = [5, 90, 7, 7, 30, 8, 200, 1]
    batches = list(by_budget(lengths, 100))
    assert sorted(i for b in batches for i in b) == list(range(len(lengths)))
    assert all(len(b) == 1 or max(lengths[i] for i in b) * len(b) <= 100 for b in batches)


# Read position


def test_without_a_pad_id_the_last_token_is_read() -> None:
    rm = small_pm("llama", pad_token_id=None)
    ids = rm.tokenize(PAIRS[0]).chosen
    assert rm.read_position(ids) == ids.numel() - 1
    torch.testing.assert_close(ours(rm, PAIRS), truth(rm, PAIRS), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_where_pad_is_eos_the_token_before_the_appended_eos_is_read(architecture: str) -> None:
    rm = small_pm(architecture, append_eos=True, pad_token_id=EOS)
    ids = rm.tokenize(PAIRS[0]).chosen
    assert int(ids[-1]) == EOS
    assert rm.read_position(ids) == ids.numel() - 2
    torch.testing.assert_close(ours(rm, PAIRS), truth(rm, PAIRS), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        scores = rm.model.score(rm.model.base_model(ids[None]).last_hidden_state)[0, :, 0]
    assert by_transformers(rm, ids) == pytest.approx(float(scores[-2]), abs=1e-5)
    assert abs(float(scores[-2] - scores[-1])) > 1e-3


def test_where_pad_is_another_token_the_appended_eos_is_read() -> None:
    rm = small_pm("llama", append_eos=True)
    ids = rm.tokenize(PAIRS[0]).chosen
    assert int(ids[rm.read_position(ids)]) == EOS
    torch.testing.assert_close(ours(rm, PAIRS), truth(rm, PAIRS), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ids", [[5, 6, PAD, 7], [5, 6, 7, PAD, PAD], [PAD, PAD, PAD], [PAD, 5, PAD]])
def test_the_read_position_is_transformers_own_for_any_place_of_pad_tokens(ids: list[int]) -> None:
    rm = shared_pm("llama")
    tokens = pair_tokens(ids, [5, 9, 9, 9])
    scores = rm.score_tokens([tokens])
    assert float(scores.chosen[0]) == pytest.approx(by_transformers(rm, tokens.chosen), abs=1e-5)


# Packed rows and sites


@pytest.mark.parametrize("architecture", DECODERS)
def test_a_texts_stream_in_a_packed_row_is_its_stream_alone(architecture: str) -> None:
    rm = shared_pm(architecture)
    tokens = rm.tokenize_all(PAIRS[:3])
    batch = pack_pairs([(i, t, rm.read_positions(t)) for i, t in enumerate(tokens)])
    together = rm.streams(batch, rm.sites)
    for text in batch.texts:
        ids = tokens[text.pair].side(text.side)
        assert batch.ids[text.row, text.columns].tolist() == ids.tolist()
        with torch.no_grad():
            alone = rm.model.base_model(ids[None], output_hidden_states=True).hidden_states
        for layer, site in enumerate(rm.sites[:-1]):
            x = together[site][text.row, text.columns]
            torch.testing.assert_close(x, alone[layer][0], atol=3e-5, rtol=1e-5, msg=lambda m, s=site: f"{s}: {m}")


@pytest.mark.parametrize("architecture", ALL)
def test_sites_are_transformers_hidden_states(architecture: str) -> None:
    rm = shared_pm(architecture)
    tokens = rm.tokenize(PAIRS[0])
    with torch.no_grad():
        states = rm.model.base_model(tokens.chosen[None], output_hidden_states=True).hidden_states
    rm_alone = pair_tokens(tokens.chosen.tolist(), tokens.chosen.tolist())
    batch = next(iter(rm.batches([rm_alone])))
    text = batch.texts[0]
    streams = rm.streams(batch, rm.sites)
    assert rm.sites == ["embed", *(f"resid_post.{i}" for i in range(BLOCKS))]
    for layer, site in enumerate(rm.sites[:-1]):
        torch.testing.assert_close(streams[site][text.row, text.columns], states[layer][0], atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gpt_neox"])
def test_the_last_site_is_before_the_final_norm(architecture: str) -> None:
    rm = shared_pm(architecture)
    base = getattr(rm.model.base_model, "decoder", rm.model.base_model)
    norm = next(getattr(base, n) for n in ("norm", "ln_f", "final_layer_norm") if hasattr(base, n))
    batch = next(iter(rm.batches(rm.tokenize_all(PAIRS[:1]))))
    last = rm.sites[-1]
    with torch.no_grad():
        r = rm.read_out(last_hidden_reads(norm(rm.streams(batch, [last])[last]), batch))
        torch.testing.assert_close(r, rm.rewards(batch), atol=1e-5, rtol=1e-5)


def test_asking_for_early_sites_stops_the_forward_there() -> None:
    rm = small_pm("llama")
    batch = next(iter(rm.batches(rm.tokenize_all(PAIRS))))
    calls: list[int] = []
    for i, block in enumerate(rm.blocks):
        block.register_forward_pre_hook(lambda *_a, i=i: calls.append(i))
    rm.streams(batch, ["resid_post.0", "resid_post.1"])
    assert calls == [0, 1]


def test_an_unknown_site_lists_those_that_exist() -> None:
    for site in ("resid_post.4", "resid_pre.1", "resid_post.-1", "mlp.0", ""):
        with pytest.raises(InputError, match=r"it has embed and resid_post\.0 \.\. resid_post\.3"):
            shared_pm("llama").site_index(site)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gptj", "bloom", *ENCODERS])
@pytest.mark.parametrize("site", ["embed", "resid_post.1", "resid_post.3"])
def test_rewards_from_the_clean_stream_are_the_rewards(architecture: str, site: str) -> None:
    rm = shared_pm(architecture, torch.float64)
    for batch in rm.batches(rm.tokenize_all(PAIRS)):
        with torch.no_grad():
            clean = rm.streams(batch, [site])[site]
            rewards = rm.rewards(batch)
            torch.testing.assert_close(rm.rewards_from(batch, site, clean), rewards, atol=1e-9, rtol=0)
            moved = rm.rewards_from(batch, site, clean + 0.1 * torch.randn_like(clean))
        assert (moved - rewards).abs().min() > 1e-6


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_blocks_are_themselves_again_after_a_forward_that_skipped_them(architecture: str) -> None:
    rm = shared_pm(architecture)
    batch = next(iter(rm.batches(rm.tokenize_all(PAIRS))))
    before = rm.rewards(batch)
    with pytest.raises(RuntimeError):
        rm.rewards_from(batch, "resid_post.2", torch.zeros(1, 1, 7))
    assert torch.equal(rm.rewards(batch), before)


# First tokens that differ, short texts, free texts


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral"])
def test_sides_that_differ_from_the_first_token_share_nothing(architecture: str) -> None:
    rm = shared_pm(architecture)
    tokens = pair_tokens([11, 12, 13, 14], [21, 12, 13])
    assert (tokens.shared, tokens.divergence) == (0, 1)
    scores = rm.score_tokens([tokens])
    assert float(scores.chosen[0]) == pytest.approx(by_transformers(rm, tokens.chosen), abs=1e-5)
    assert float(scores.rejected[0]) == pytest.approx(by_transformers(rm, tokens.rejected), abs=1e-5)


@pytest.mark.parametrize(("chosen", "rejected"), [([7], [8]), ([7], [7, 8]), ([7, 8], [7]), ([7, 8], [7, 8])])
def test_the_shortest_texts_are_scored_as_they_are(chosen: list[int], rejected: list[int]) -> None:
    rm = shared_pm("llama")
    scores = rm.score_tokens([pair_tokens(chosen, rejected)])
    assert float(scores.chosen[0]) == pytest.approx(by_transformers(rm, torch.tensor(chosen)), abs=1e-5)
    assert float(scores.rejected[0]) == pytest.approx(by_transformers(rm, torch.tensor(rejected)), abs=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "bloom", ENCODER])
def test_free_texts_score_as_the_same_texts_in_pairs(architecture: str) -> None:
    rm = shared_pm(architecture)
    pair = PAIRS[0]
    free = rm.score_texts(pair.prompt[0]["content"], [pair.chosen, pair.rejected])
    torch.testing.assert_close(free, ours(rm, [pair])[0], atol=1e-5, rtol=0)
    assert rm.score_texts(pair.prompt, []).shape == (0,)


def test_texts_beyond_the_context_are_refused_not_cut() -> None:
    rm = small_pm("gpt2", n_positions=60)
    assert rm.context == 60
    with pytest.raises(InputError, match=r"1 pairs are longer .* 60 tokens \(first: long\)"):
        rm.score(PAIRS[2:])
    with pytest.raises(InputError, match="60 tokens"):
        rm.score_texts("What?", ["Paris " * 60])


def test_roberta_takes_as_many_tokens_less_as_its_padding_id_says() -> None:
    rm = small_pm("roberta", max_position_embeddings=66, pad_token_id=1)
    assert rm.context == 64
    torch.manual_seed(3)
    ids = torch.randint(3, 250, (65,))
    assert rm.reward_alone(ids[:64]).isfinite()
    with pytest.raises((IndexError, RuntimeError)):
        rm.reward_alone(ids)


# Outputs, identity


def test_one_of_several_outputs_or_a_weighting_of_them_is_the_reward() -> None:
    model = small_model("llama", num_labels=3)
    ids = shared_pm("llama").tokenize(PAIRS[0]).chosen
    with torch.no_grad():
        logits = model(ids[None]).logits[0]
    rendering = shared_pm("llama").rendering
    for output, weights, expected in [
        (1, [0, 1, 0], logits[1]),
        (0, [1, 0, 0], logits[0]),
        ((0.5, -2.0, 1.0), [0.5, -2, 1], 0.5 * logits[0] - 2 * logits[1] + logits[2]),
    ]:
        rm = RewardModel(model, tokenizer(), rendering, "three", output)
        assert float(rm.score(PAIRS[:1]).chosen[0]) == pytest.approx(float(expected), abs=1e-5)
        assert rm.output == weights
    with pytest.raises(InputError, match="3 outputs"):
        RewardModel(model, tokenizer(), rendering, "three")
    with pytest.raises(InputError, match="3 outputs"):
        RewardModel(model, tokenizer(), rendering, "three", 3)
    with pytest.raises(InputError, match="2 weights"):
        RewardModel(model, tokenizer(), rendering, "three", (1.0, 2.0))


def test_the_identity_follows_weights_and_rendering() -> None:
    identity = small_pm("llama").identity
    assert small_pm("llama").identity == identity
    assert small_pm("llama", append_eos=True).identity != identity
    for block, row, column in [(0, 0, 0), (2, 7, 3), (3, 47, 31)]:
        changed = small_pm("llama")
        with torch.no_grad():
            changed.model.model.layers[block].mlp.up_proj.weight[row, column] *= 1 + 1e-6
        assert changed.identity != identity


def test_the_identity_follows_the_choice_of_an_output() -> None:
    model, rendering = small_model("llama", num_labels=3), shared_pm("llama").rendering
    identities = {RewardModel(model, tokenizer(), rendering, "three", o).identity for o in (0, 1, [0.5, 0.5, 0.0])}
    assert len(identities) == 3
    one = small_model("llama")
    assert RewardModel(one, tokenizer(), rendering, "one", 0).identity == small_pm("llama").identity


def test_d_model_and_sites_are_the_models() -> None:
    for architecture in ALL:
        rm = shared_pm(architecture)
        assert (rm.d_model, len(rm.sites)) == (D, BLOCKS + 1)
        assert rm.default_sites == ["resid_post.0", "resid_post.2"]


def test_prompts_are_rendered_as_messages_or_a_string() -> None:
    rm = shared_pm("llama")
    assert torch.equal(rm.text_ids(user("Why?"), "Because."), rm.tokenize(Pair("x", user("Why?"), "Because.", "No.")).chosen)

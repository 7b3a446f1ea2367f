"""A PM is asked what it was trained to be asked: our rewards are those of the model's own forward on each text alone."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    BartConfig,
    FNetConfig,
    LlamaModel,
    LlamaPreTrainedModel,
    Phi3Config,
    T5GemmaConfig,
    XLNetConfig,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from rmscope.effects.ablation import clean_runs
from rmscope.errors import InputError
from rmscope.model.checks import notes, preflight
from rmscope.model.rendering import Rendering
from rmscope.model.reward_model import RewardModel
from rmscope.model.shared_prefix import rewards_from_prefix
from rmscope.pairs.pair import SIDES, Pair
from tests.model.small import BLOCKS, EOS, LLAMA, PAD, VOCABULARY, D, small_model, tokenizer

SHORT, LONG = "It is Paris.", "It is Paris, on the Seine, and " + "the answer depends on what you would like to hear. " * 3
PAIRS = [
    Pair(f"p{i}", [{"role": "user", "content": "What is the capital of France?"}], SHORT + "!" * i, LONG[: 60 + 40 * i])
    for i in range(4)
]
IDS = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": EOS, "eos_token_id": EOS}


def drawn(config: Any, std: float = 0.3) -> Any:
    config.num_labels = 1
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(std=std)
    return model.eval()


def own_rewards(model: Any, rm: RewardModel, pairs: list[Pair]) -> Tensor:
    """[pairs, 2] by a fresh copy of the model for each text, alone."""
    with torch.no_grad():
        return torch.tensor(
            [
                [float(deepcopy(model)(t.side(side)[None]).logits.flatten()[0]) for side in SIDES]
                for t in rm.tokenize_all(pairs)
            ]
        )


def check_scores(model: Any, style: Any = "hh") -> RewardModel:
    rm = RewardModel(deepcopy(model), tokenizer(), Rendering(style), "small")
    scores, expected = rm.score(PAIRS), own_rewards(model, rm, PAIRS)
    assert expected.std() > 1e-3
    torch.testing.assert_close(torch.stack([scores.chosen, scores.rejected], 1), expected, atol=1e-5, rtol=1e-5)
    return rm


def longrope() -> Any:
    """A PM whose rotary frequencies are others in a forward that holds a position from 64 on."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 64}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **factors}
    return drawn(Phi3Config(**LLAMA, **IDS, original_max_position_embeddings=64, rope_parameters=rope))


def test_a_text_keeps_its_rotary_frequencies_whatever_it_runs_beside() -> None:
    model = longrope()
    rm = check_scores(model)
    expected = own_rewards(model, rm, PAIRS)
    lengths = [t.side(side).numel() for t in rm.tokenize_all(PAIRS) for side in SIDES]
    assert min(lengths) < 64 < max(lengths)
    assert rm.capabilities.mixing == 64
    assert rm.capabilities.packing
    assert any("more than 64 tokens run alone" in note for note in notes(rm))
    long = rm.tokenize(PAIRS[-1])
    assert long.divergence == 0  # the two sides have other frequencies, so other streams from the first token on
    for side, run in clean_runs(rm, long, ["resid_post.1"]).items():
        assert run.reward == pytest.approx(float(expected[-1, SIDES.index(side)]), abs=1e-4)
    clean = rm.prefill(long.rejected, [])
    found = rewards_from_prefix(rm, clean, [rm.tokenize(p).chosen for p in PAIRS])
    torch.testing.assert_close(found, expected[:, 0], atol=1e-4, rtol=1e-4)


class OwnHead(LlamaPreTrainedModel):
    """A PM whose head is called ``score``, and whose forward does more than read it at the last token."""

    def __init__(self, config: Any, read: Any) -> None:
        super().__init__(config)
        self.num_labels, self.read = 1, read
        self.model = LlamaModel(config)
        self.score = nn.Linear(config.hidden_size, config.outputs, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Any = None, **_: Any) -> Any:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        hidden = self.model(input_ids, attention_mask=attention_mask).last_hidden_state
        return self.read(self.score(hidden), mask)


def mean(scores: Tensor, mask: Tensor) -> Any:
    return SequenceClassifierOutput(logits=(scores[..., 0] * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True))


def last(scores: Tensor, mask: Tensor) -> Tensor:
    return scores[torch.arange(len(scores)), mask.sum(1) - 1]


READS = {
    "mean": mean,
    "squashed": lambda scores, mask: SequenceClassifierOutput(logits=last(scores, mask).sigmoid()),
    "normalised": lambda scores, mask: SequenceClassifierOutput(logits=(last(scores, mask) - 0.5) / 3),
    "bare tensor": lambda scores, mask: last(scores, mask).squeeze(-1),
    "tuple": lambda scores, mask: (last(scores, mask),),
}


def own_head(read: Any, outputs: int = 1) -> OwnHead:
    config = small_model("llama").config
    config.outputs = outputs
    torch.manual_seed(0)
    model = OwnHead(config, read)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(std=0.3)
    return model.eval()


@pytest.mark.parametrize("read", READS)
def test_a_forward_that_does_more_than_read_its_score_is_used_itself(read: str) -> None:
    model = own_head(READS[read])
    rm = RewardModel(model, tokenizer(), Rendering(), "small")
    with torch.no_grad():
        plain = [[model(t.side(s)[None]) for s in SIDES] for t in rm.tokenize_all(PAIRS)]
    outputs = [[x if isinstance(x, Tensor) else x[0] for x in row] for row in plain]
    expected = torch.tensor([[float(x.flatten()[0]) for x in row] for row in outputs])
    scores = rm.score(PAIRS)
    torch.testing.assert_close(torch.stack([scores.chosen, scores.rejected], 1), expected, atol=1e-5, rtol=1e-4)
    same = read in ("bare tensor", "tuple")
    assert rm.causal == same
    assert (rm.tokenize(PAIRS[0]).divergence > 0) == same
    assert any("does more than read its score" in note for note in notes(rm)) != same


def test_outputs_are_counted_in_what_the_model_gives_not_in_its_config() -> None:
    model = own_head(lambda scores, mask: SequenceClassifierOutput(logits=last(scores, mask)), outputs=5)
    with pytest.raises(InputError, match="has 5 outputs, not one"):
        RewardModel(model, tokenizer(), Rendering(), "small")
    rm = RewardModel(model, tokenizer(), Rendering(), "small", output=4)
    with torch.no_grad():
        assert float(rm.score(PAIRS[:1]).chosen[0]) == pytest.approx(
            float(model(rm.tokenize(PAIRS[0]).chosen[None]).logits[0, 4]), abs=1e-5
        )


def test_one_value_per_token_is_no_reward() -> None:
    model = own_head(lambda scores, _mask: SequenceClassifierOutput(logits=scores))
    with pytest.raises(InputError, match="not one reward per text"):
        RewardModel(model, tokenizer(), Rendering(), "small")


def test_a_forward_that_refuses_every_text_is_a_sentence() -> None:
    def refuse(_scores: Tensor, _mask: Tensor) -> Any:
        raise ValueError("Token pattern not found in the list.")

    with pytest.raises(InputError, match="small refuses a text \\(Token pattern not found in the list\\)"):
        RewardModel(own_head(refuse), tokenizer(), Rendering(), "small")


def test_a_reward_that_is_not_finite_is_named_by_its_pair_and_never_averaged() -> None:
    def spoiled(scores: Tensor, mask: Tensor) -> Any:
        means = mean(scores, mask).logits
        return SequenceClassifierOutput(logits=torch.where(mask.sum(1, keepdim=True) > 100, torch.nan, means))

    rm = RewardModel(own_head(spoiled), tokenizer(), Rendering(), "small")
    assert rm.tokenize(PAIRS[0]).longest < 100 < rm.tokenize(PAIRS[-1]).longest
    with pytest.raises(InputError, match="reward of rejected of p3 is nan"):
        rm.score([PAIRS[0], PAIRS[-1]])
    found = {c.check: c for c in preflight(rm, rm.tokenize_all(PAIRS)).checks}
    assert found["rewards"].status == "fail"


def test_a_tokenizer_with_tokens_that_the_pm_does_not_know_is_refused() -> None:
    words = deepcopy(tokenizer())
    words.add_tokens(["capital"])
    with pytest.raises(InputError, match="gives token 300, but the PM knows 300 tokens"):
        RewardModel(small_model("llama"), words, Rendering(), "small")


SIDE = {
    "hidden_size": D, "intermediate_size": 48, "num_hidden_layers": BLOCKS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64, **IDS,
}  # fmt: skip
COMPANY = {
    "t5gemma": lambda: T5GemmaConfig(encoder=dict(SIDE), decoder=dict(SIDE), **IDS),
    "fnet": lambda: FNetConfig(
        hidden_size=D, num_hidden_layers=BLOCKS, intermediate_size=48, max_position_embeddings=256, **IDS
    ),
}


@pytest.mark.parametrize("kind", COMPANY)
def test_a_pm_whose_rewards_move_with_padding_runs_each_text_alone(kind: str) -> None:
    rm = check_scores(drawn(COMPANY[kind]()))
    assert rm.capabilities.mixing == 0
    assert all(len(batch.texts) == 1 for batch in rm.batches(rm.tokenize_all(PAIRS)))
    assert any("each text runs alone" in note for note in notes(rm))


def test_a_response_that_holds_eos_is_scored_by_a_model_that_counts_them() -> None:
    config = BartConfig(
        d_model=D, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=256, **IDS, decoder_start_token_id=EOS,
    )  # fmt: skip
    model = drawn(config)
    rm = RewardModel(model, tokenizer(), Rendering("hh", append_eos=True), "bart")
    pairs = [Pair("quoted", PAIRS[0].prompt, "It ends with <eos> here.", "It ends.")]
    scores, expected = rm.score(pairs), own_rewards(model, rm, pairs)
    torch.testing.assert_close(torch.stack([scores.chosen, scores.rejected], 1), expected, atol=1e-5, rtol=1e-4)


def test_a_context_that_is_no_positive_number_is_none() -> None:
    model = drawn(XLNetConfig(d_model=D, n_layer=2, n_head=4, d_inner=48, **IDS))
    rm = check_scores(model)
    assert rm.context > 1 << 20
    with pytest.raises(InputError, match="XLNetForSequenceClassification has no residual stream that can be studied"):
        rm.site_index("resid_post.0")


def test_the_preflight_asks_with_the_shortest_and_the_longest_text() -> None:
    rm = RewardModel(longrope(), tokenizer(), Rendering(), "small")
    many = [Pair(f"s{i}", PAIRS[0].prompt, SHORT + "?" * (i % 5 + 1), SHORT) for i in range(20)]
    rm.__dict__["capabilities"] = type(rm.capabilities)(packing=True, resume=True, ragged=True)  # as if not measured
    found = {c.check: c for c in preflight(rm, rm.tokenize_all([*many, *PAIRS])).checks}
    assert found["batches"].status == "warn"

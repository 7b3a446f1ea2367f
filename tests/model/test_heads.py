"""A reward from a value head or a token's logit is split, ablated and differentiated as plain forwards of the LM say."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from rmscope.effects.gradients import estimate
from rmscope.effects.requests import ablations
from rmscope.errors import InputError
from rmscope.model.heads import TokenDifference
from rmscope.model.rendering import Rendering
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import SIDES
from tests.model.small import EOS, PAIRS, VOCABULARY, D, small_lm, small_sae, tokenizer

SUFFIX = "\nIs there no problem?"
BETTER, WORSE = "t", "o"
Reward = Callable[[Tensor], Tensor]


def judge(architecture: str, **changes: Any) -> tuple[RewardModel, Reward]:
    """A judge, and its reward of ids [T] by the LM's own forward."""
    if architecture == "gemma2":  # the probe of packing and the question are longer than the tests' short window
        changes = {"sliding_window": 256, **changes}
    lm = small_lm(architecture, **changes)
    ids = [tokenizer().convert_tokens_to_ids(t) for t in (BETTER, WORSE)]
    rm = RewardModel(
        lm, tokenizer(), Rendering("hh", suffix=SUFFIX), "judge", head=TokenDifference(lm, tokenizer(), BETTER, WORSE)
    )
    return rm, lambda text: lm(text[None]).logits[0, -1, ids[0]] - lm(text[None]).logits[0, -1, ids[1]]


def critic(architecture: str) -> tuple[RewardModel, Reward]:
    """A value head on an LM, and its reward of ids [T] by the LM's own forward."""
    lm = small_lm(architecture)
    torch.manual_seed(7)
    value = nn.Linear(D, 1)
    rm = RewardModel(lm, tokenizer(), Rendering("hh"), "critic", head=value)
    return rm, lambda text: value(lm(text[None], output_hidden_states=True).hidden_states[-1][0, -1])[0]


MAKERS = [(make, a) for make in (judge, critic) for a in ("llama", "gpt2", "gemma2", "opt", "qwen3")]
every_head = pytest.mark.parametrize(("make", "architecture"), MAKERS, ids=[f"{m.__name__}-{a}" for m, a in MAKERS])


@every_head
def test_rewards_are_those_of_the_lms_own_forward_and_every_faster_way_is_taken(make: Any, architecture: str) -> None:
    rm, reward = make(architecture)
    assert rm.capabilities.packing
    assert rm.capabilities.resume
    assert rm.capabilities.ragged
    scores = rm.score(PAIRS)
    with torch.no_grad():
        expected = torch.tensor([[float(reward(rm.tokenize(p).side(s))) for s in SIDES] for p in PAIRS])
    assert expected.std() > 0.1
    torch.testing.assert_close(torch.stack([scores.chosen, scores.rejected], 1), expected, atol=1e-4, rtol=1e-4)
    free = rm.score_texts(PAIRS[0].prompt, [PAIRS[0].chosen])
    assert float(free[0]) == pytest.approx(float(expected[0, 0]), abs=1e-4)


@every_head
def test_ablating_a_feature_is_the_lms_own_forward_without_it(make: Any, architecture: str) -> None:
    rm, reward = make(architecture)
    sae, site, t = small_sae(), "resid_post.1", rm.tokenize(PAIRS[0])
    sizes = []
    for _, found in ablations(rm, {site: sae}, [t], {0: {side: {site: None} for side in SIDES}}):
        ids = t.side(found.side)
        for place in range(0, found.feature.numel(), 6):
            expected = _without(rm, reward, sae, ids, t.divergence, []) - _without(
                rm, reward, sae, ids, t.divergence, [int(found.feature[place])]
            )
            assert float(found.effect[place]) == pytest.approx(expected, abs=2e-4)
            sizes.append(abs(expected))
    assert sorted(sizes)[len(sizes) // 2] > 0.003


def _without(rm: RewardModel, reward: Reward, sae: Any, ids: Tensor, start: int, group: list[int]) -> float:
    """The reward by the LM's own forward, f_tj := 0 for the group from ``start`` on, after block 1."""

    def edit(x: Tensor) -> Tensor:
        f = sae.encode(x[0])
        kept = f.clone()
        kept[start:, group] = 0.0
        return x + (sae.decode(kept) - sae.decode(f))

    handle = rm.blocks[1].register_forward_hook(
        lambda _m, _a, out: (edit(out[0]), *out[1:]) if isinstance(out, tuple) else edit(out)
    )
    try:
        with torch.no_grad():
            return float(reward(ids))
    finally:
        handle.remove()


@every_head
def test_estimates_are_the_lms_own_gradients(make: Any, architecture: str) -> None:
    rm, reward = make(architecture)
    sae, site, t = small_sae(), "resid_post.1", rm.tokenize(PAIRS[0])
    for _, found in estimate(rm, {site: sae}, [t], range(1)):
        kept: list[Tensor] = []

        def keep(_m: Any, _a: Any, out: Any, kept: list[Tensor] = kept) -> Any:
            x = (out[0] if isinstance(out, tuple) else out).detach().requires_grad_(True)
            kept.append(x)
            return (x, *out[1:]) if isinstance(out, tuple) else x

        handle = rm.blocks[1].register_forward_hook(keep)
        with torch.enable_grad():
            r = reward(t.side(found.side))
        handle.remove()
        gradient = sum(torch.autograd.grad(r, kept))[0, t.divergence :]  # type: ignore[index]
        f = sae.encode(kept[0][0].detach())[t.divergence :]
        expected = (f * (gradient @ sae.W_dec.T)).sum(0)
        torch.testing.assert_close(found.effect, expected[found.feature], atol=1e-4, rtol=1e-3)
        assert found.effect.abs().max() > 1e-3


def test_the_last_token_is_read_whatever_the_padding_id() -> None:
    lm = small_lm("llama", pad_token_id=EOS)
    rm = RewardModel(lm, tokenizer(), Rendering("hh", append_eos=True), "critic", head=nn.Linear(D, 1))
    ids = rm.tokenize(PAIRS[0]).chosen
    assert int(ids[-1]) == EOS
    assert rm.read_position(ids) == ids.numel() - 1


def test_the_question_stands_behind_both_responses_and_is_part_of_their_spans() -> None:
    rm, _ = judge("llama")
    t = rm.tokenize(PAIRS[0])
    for text in next(iter(rm.batches([t]))).texts:
        span = rm.tokenizer.decode(t.side(text.side)[t.divergence :])
        assert span.endswith(SUFFIX)
        assert text.span.numel() == t.side(text.side).numel() - t.divergence


def test_a_head_is_part_of_the_identity_and_has_one_output() -> None:
    lm = small_lm("llama")
    a, b = (RewardModel(lm, tokenizer(), Rendering(), "x", head=nn.Linear(D, 1)) for _ in range(2))
    assert a.identity != b.identity
    with pytest.raises(InputError, match="A head of its own has one output"):
        RewardModel(lm, tokenizer(), Rendering(), "x", 1, nn.Linear(D, 1))


def test_a_token_difference_refuses_what_it_cannot_be() -> None:
    lm = small_lm("llama")
    with pytest.raises(InputError, match=r"' absolutely' is .* tokens for this tokenizer, not one"):
        TokenDifference(lm, tokenizer(), BETTER, " absolutely")
    with pytest.raises(InputError, match="LlamaModel has no output matrix"):
        TokenDifference(lm.model, tokenizer(), BETTER, WORSE)
    lm.lm_head.register_forward_hook(lambda _m, _a, out: 3 * out)
    with pytest.raises(InputError, match="scales its logits in a way of its own"):
        TokenDifference(lm, tokenizer(), BETTER, WORSE)


def test_the_cap_of_gemma_2_is_followed() -> None:
    rm, _ = judge("gemma2", final_logit_softcapping=2.0)
    assert rm.own_head.cap == 2.0  # type: ignore[union-attr]
    assert rm.score(PAIRS).chosen.abs().max() <= 4.0


def test_the_worked_example_of_the_documentation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = type(tokenizer())(tokenizer_object=tokenizer().backend_tokenizer, eos_token="<eos>", pad_token="<pad>")
    words = [" yes", " no"]
    fresh = made.from_pretrained(_save(made, tmp_path / "t"))
    fresh.add_tokens(words)
    small_lm("llama", vocab_size=VOCABULARY + 2).save_pretrained(tmp_path / "my-lm")
    fresh.save_pretrained(tmp_path / "my-lm")
    page = (Path(__file__).parents[2] / "docs" / "howto" / "heads.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    rows = [{"prompt": f"Is {i} even?", "chosen": f"Yes, {i} it is.", "rejected": "I was told no."} for i in range(6)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    rm, scores = names["judge"], names["scores"]
    ids = rm.tokenize(names["pairs"][0]).chosen
    yes, no = fresh.convert_tokens_to_ids(words)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "my-lm")(ids[None]).logits[0, -1]
    assert float(scores.chosen[0]) == pytest.approx(float(logits[yes] - logits[no]), abs=1e-4)
    assert names["exact"].height > 0
    parts = names["ledger"].select("features", "error", "remainder", "gap").sum_horizontal()
    assert parts.to_list() == pytest.approx(scores.delta[:2].tolist(), abs=1e-3)


def _save(made: Any, folder: Path) -> str:
    made.save_pretrained(folder)
    return str(folder)

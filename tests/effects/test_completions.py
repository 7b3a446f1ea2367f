"""Rewards of a completion's prefixes are those of the cut texts, each run alone by the model's own forward."""

from __future__ import annotations

import pytest
import torch

from rmscope.effects.completions import complete, ending_ids, prefix_rewards
from rmscope.model.rendering import Rendering
from rmscope.model.reward_model import RewardModel
from tests.model.small import DECODERS, EOS, OTHERS, PAD, small_model, small_pm, tokenizer, user

PROMPT = user("What is the capital of France?")
RESPONSE = "It is Paris, on the Seine."


def ending_in(text: str) -> RewardModel:
    return RewardModel(small_model("llama"), tokenizer(), Rendering(style="hh", suffix=text), "llama")


def read_before_eos() -> RewardModel:
    """A PM whose padding is eos, which is appended: transformers reads the token before it."""
    rm = small_pm("llama", append_eos=True)
    rm.model.config.pad_token_id = EOS
    return rm


PMS = {
    "no ending": lambda: small_pm("llama"),
    "eos": lambda: small_pm("llama", append_eos=True),
    "eos is padding": read_before_eos,
    "suffix": lambda: ending_in("\n\nIs it good?"),
    "long suffix": lambda: ending_in(" Is the answer above good? " * 3),
    "encoder": lambda: small_pm("bert", append_eos=True),
}


@pytest.mark.parametrize("kind", PMS)
def test_each_prefix_has_the_reward_of_the_text_cut_there(kind: str) -> None:
    rm = PMS[kind]()
    ids = rm.text_ids(PROMPT, RESPONSE)
    ending = {"eos": [EOS], "eos is padding": [EOS], "encoder": [EOS]}.get(kind, [])
    if rm.rendering.suffix:
        ending = rm.tokenizer(rm.rendering.suffix).input_ids
    assert ending_ids(rm, PROMPT).tolist() == ending
    completion = complete(rm, PROMPT, [RESPONSE], [rm.sites[1]])[0]
    tokens, rewards = prefix_rewards(rm, PROMPT, RESPONSE, completion)
    n = ids.numel() - len(ending)
    assert tokens.tolist() == ids[completion.start : n].tolist()
    cut = [torch.cat([ids[:end], torch.tensor(ending, dtype=ids.dtype)]) for end in range(completion.start, n + 1)]
    torch.testing.assert_close(rewards, torch.stack([rm.reward_alone(text) for text in cut]), atol=2e-4, rtol=2e-4)
    assert float(rewards[-1]) == pytest.approx(completion.reward, abs=2e-4)
    assert rm.tokenizer.decode(tokens).strip() == RESPONSE
    assert PAD not in tokens


@pytest.mark.parametrize("append_eos", [False, True])
@pytest.mark.parametrize("architecture", [*DECODERS, *OTHERS])
def test_the_prefixes_of_every_decoder_have_the_rewards_of_the_cut_texts(architecture: str, append_eos: bool) -> None:
    rm = small_pm(architecture, append_eos=append_eos)
    ids = rm.text_ids(PROMPT, RESPONSE)
    end = ids.numel() - append_eos
    completion = complete(rm, PROMPT, [RESPONSE], [rm.sites[1]])[0]
    _, rewards = prefix_rewards(rm, PROMPT, RESPONSE, completion)
    cut = [torch.cat([ids[:place], ids[end:]]) for place in range(completion.start, end + 1)]
    torch.testing.assert_close(rewards, torch.stack([rm.reward_alone(text) for text in cut]), atol=3e-4, rtol=3e-4)


def test_a_text_longer_than_the_window_has_them_too() -> None:
    rm = small_pm("mistral", append_eos=True)
    response = RESPONSE * 4
    ids = rm.text_ids(PROMPT, response)
    assert ids.numel() > rm.attention_window
    completion = complete(rm, PROMPT, [response], [rm.sites[1]])[0]
    _, rewards = prefix_rewards(rm, PROMPT, response, completion)
    for place in (completion.start, ids.numel() - 2):
        text = torch.cat([ids[:place], ids[-1:]])
        assert float(rewards[place - completion.start]) == pytest.approx(float(rm.reward_alone(text)), abs=3e-4)


def test_an_empty_completion_has_the_reward_of_the_prompt_and_no_tokens() -> None:
    rm = small_pm("llama", append_eos=True)
    completion = complete(rm, PROMPT, [""], [rm.sites[1]])[0]
    tokens, rewards = prefix_rewards(rm, PROMPT, "", completion)
    assert (tokens.numel(), rewards.numel()) == (0, 1)
    assert float(rewards[0]) == pytest.approx(completion.reward, abs=2e-4)

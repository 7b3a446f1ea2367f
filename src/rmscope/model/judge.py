"""A causal LM as a judge: the reward is the logit of one answer minus that of another, after a question about the response.

It is asked after each response, in the same words; the question belongs to the span. The two logits are those of the next
token, so the reward is a head at the last token (:class:`~rmscope.model.heads.TokenDifference`), and all that works for
PMs works for judges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from rmscope.errors import InputError
from rmscope.hardware import check_device, place
from rmscope.io import local_path
from rmscope.model import loading
from rmscope.model.checkpoint import check_code
from rmscope.model.heads import TokenDifference
from rmscope.model.rendering import SETTINGS_FILE, Rendering
from rmscope.model.reward_model import NO_BASE, RewardModel

QUESTION = "\n\nIs that a good answer?"


def load_judge(
    source: str,
    answers: Sequence[str],
    question: str = QUESTION,
    dtype: str = "float32",
    device: str = "auto",
    *,
    adapter: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    base: str | None = None,
) -> RewardModel:
    """Loads a causal LM from a folder or the hub as a PM.

    Args:
        answers: the token that raises the reward, and the one that lowers it, with their leading spaces: " yes", " no".
        question: what follows each response.
        base: the model that it was trained from; ``none``: no base.

    Raises:
        InputError: there are not two answers, an answer is not one token, the model is not a causal LM, or it scales its
            logits in a way of its own.
    """
    from transformers import AutoModelForCausalLM

    if len(answers) != 2:
        raise InputError(f"A judge has two answers, here are {len(answers)}; write --judge ' yes, no'.")
    if source.startswith("zoo:"):
        raise InputError(f"{source} is a PM, not a judge; leave --judge out, or name a causal LM.")
    at = place(device)
    check_device(at)
    name = loading.local_or_hub(source)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    with loading.as_input_error(f"The judge {source}"):
        check_code(source, name, options)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, dtype=getattr(torch, dtype), device_map={"": at}, output_loading_info=True, **options
        )
    lm, info = loaded
    if not lm.can_generate() or getattr(lm.config, "is_encoder_decoder", False):
        raise InputError(f"{type(lm).__name__} predicts no next token, so it gives no answer; name a causal LM.")
    loading.check_whole(source, info, [])
    loading.check_all_blocks_used(source, info, lm)
    if adapter is not None:
        from peft import PeftModel

        with loading.as_input_error(f"The adapter {adapter}"):
            lm = PeftModel.from_pretrained(lm, adapter).merge_and_unload()
    loading.check_finite(source, lm)
    tokenizer = loading.load_tokenizer(name, options)
    folders = [local_path(p) for p in (adapter, source) if p is not None]
    beside = next((p for p in folders if (p / SETTINGS_FILE).is_file()), None)
    rendering = replace(Rendering.find(beside, tokenizer, ""), suffix=question, append_eos=False)
    head = TokenDifference(lm, tokenizer, *answers)
    if base == NO_BASE:
        return RewardModel(lm, tokenizer, rendering, source, head=head)
    find = partial(loading.load_base_of, source, dtype, at, adapter, revision, trust_remote_code, base, tokenizer)
    return RewardModel(lm, tokenizer, rendering, source, None, head, find)

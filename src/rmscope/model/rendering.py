"""From a conversation to the text a PM was trained on, and from the text to tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from rmscope.errors import InputError
from rmscope.pairs.pair import Message

Style = Literal["hh", "chat", "plain"]
SETTINGS_FILE = "rmscope.json"


@dataclass(frozen=True, slots=True)
class Rendering:
    """How a PM reads a conversation.

    ``hh``: the transcript of hh-rlhf, a blank line and ``Human:`` / ``Assistant:`` before each turn; ``chat``: the
    tokenizer's chat template; ``plain``: the turns and the response, a line each.
    """

    style: Style = "hh"
    append_eos: bool = False
    """Whether the eos token follows the text (TRL appends it to plain text in training)."""

    @classmethod
    def find(cls, folder: Path | None, tokenizer: Any) -> Rendering:
        """What ``rmscope.json`` beside the PM says; without one the chat template where there is one, else ``hh``."""
        if folder is not None and (stored := folder / SETTINGS_FILE).is_file():
            return cls(**json.loads(stored.read_text("utf-8")).get("rendering", {}))
        return cls(style="chat" if getattr(tokenizer, "chat_template", None) else "hh")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def render(rendering: Rendering, tokenizer: Any, prompt: Sequence[Message], response: str) -> str:
    """The whole text of one side, without the appended eos."""
    if rendering.style == "chat":
        messages = [*prompt, {"role": "assistant", "content": response}]
        try:
            return str(tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception as error:  # jinja2's own errors, one class a template
            raise InputError(
                f"The PM's chat template refuses a conversation with the roles {[m['role'] for m in messages]} "
                f"({error}); drop such rows or choose another rendering."
            ) from error
    if rendering.style == "hh":
        names = {"user": "Human", "assistant": "Assistant"}
        turns = "".join(
            m["content"] if m["role"] == "system" else f"\n\n{names[m['role']]}: {m['content']}" for m in prompt
        )
        return f"{turns}\n\nAssistant: {response}"
    return "\n".join([*(m["content"] for m in prompt), response])


@dataclass(frozen=True, slots=True)
class PairTokens:
    """The token ids of both sides and where they part.

    ``divergence`` is the index of the first token in which the sides differ; where one side is a prefix of the other,
    the last common token (METHOD, "Divergence"). Never 0: position 0 is outside every span.
    """

    chosen: Int[Tensor, "chosen_tokens"]  # noqa: F821
    rejected: Int[Tensor, "rejected_tokens"]  # noqa: F821
    divergence: int

    def side(self, side: str) -> Tensor:
        return self.chosen if side == "chosen" else self.rejected


def divergence(chosen: Sequence[int], rejected: Sequence[int]) -> int:
    """The first index at which two token lists differ, or the last common one where one is a prefix of the other."""
    shorter = min(len(chosen), len(rejected))
    first = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter)
    return max(1, min(first, shorter - 1))


def encode(rendering: Rendering, tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of rendered texts; the tokenizer's own special tokens, except after a template that has them."""
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=rendering.style != "chat").input_ids
    if rendering.append_eos:
        ids = [[*row, tokenizer.eos_token_id] for row in ids]
    return ids


def pair_tokens(chosen: list[int], rejected: list[int]) -> PairTokens:
    return PairTokens(torch.tensor(chosen), torch.tensor(rejected), divergence(chosen, rejected))

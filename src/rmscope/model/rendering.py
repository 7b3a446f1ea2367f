"""From a conversation to the text that a PM was trained on, and from the text to tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from rmscope.errors import InputError
from rmscope.pairs.pair import SIDES, Message, Pair

Style = Literal["hh", "chat", "plain"]
STYLES: tuple[Style, ...] = ("hh", "chat", "plain")
SETTINGS_FILE = "rmscope.json"
HH_TURN = {"system": "{}", "user": "\n\nHuman: {}", "assistant": "\n\nAssistant: {}"}


@dataclass(frozen=True, slots=True)
class Rendering:
    """How a PM reads a conversation.

    ``hh`` is the transcript of hh-rlhf: a blank line and ``Human:`` or ``Assistant:`` before each turn. ``chat`` is the
    tokenizer's chat template. ``plain`` is one line per turn, then the response.
    """

    style: Style = "hh"
    append_eos: bool = False
    """Whether the eos token follows the text (TRL appends it to plain text in training)."""
    suffix: str = ""
    """Text after the response, such as the question that a judge is asked."""

    @classmethod
    def find(cls, folder: Path | None, tokenizer: Any, card: str = "") -> Rendering:
        """The rendering in ``rmscope.json`` beside the PM; or the chat template, or ``hh``, with eos if its card says so.

        Raises :class:`InputError` where the file names a rendering that cannot be used.
        """
        template = getattr(tokenizer, "chat_template", None)
        if folder is None or not (stored := read_json(folder / SETTINGS_FILE)):
            if template:
                return cls("chat")
            return cls("hh", append_eos=trl_appended_eos(card) and tokenizer.eos_token_id is not None)
        given = stored.get("rendering", {})
        known = isinstance(given, dict) and given.keys() <= {"style", "append_eos", "suffix"}
        if not known or given.get("style", "hh") not in STYLES:
            raise InputError(
                f"{folder / SETTINGS_FILE} names no rendering that rmscope knows ({given}); "
                f"give a style ({', '.join(STYLES)}) and append_eos."
            )
        if given.get("style") == "chat" and not template:
            raise InputError(
                f"{folder / SETTINGS_FILE} asks for the chat template, but the tokenizer has none; add it "
                "(chat_template.jinja), or name another style."
            )
        return cls(**given)

    def __str__(self) -> str:
        return f"{self.style}, eos {'appended' if self.append_eos else 'not appended'}"

    def as_dict(self) -> dict[str, Any]:
        """The rendering as ``rmscope.json`` stores it; an empty suffix is left out."""
        return {name: value for name, value in asdict(self).items() if name != "suffix" or value}


def trl_appended_eos(card: str) -> bool:
    """Whether a model card is by TRL's reward trainer 0.24 or later, which appends eos to plain text."""
    version = re.search(r"^- TRL: (\d+)\.(\d+)", card, re.MULTILINE)
    return "reward-trainer" in card and version is not None and (int(version[1]), int(version[2])) >= (0, 24)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is no file. Raises InputError where it holds something else."""
    try:
        settings = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}); repair or delete it.") from error
    if not isinstance(settings, dict):
        raise InputError(f"{path} holds no JSON object; repair or delete it.")
    return settings


def render(rendering: Rendering, tokenizer: Any, prompt: Sequence[Message], response: str) -> str:
    """The whole text of one side, without the appended eos. Raises InputError where a role cannot be rendered."""
    messages: list[Message] = [*prompt, {"role": "assistant", "content": response}]
    roles = [m["role"] for m in messages]
    if rendering.style == "chat":
        try:
            text = str(tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception as error:  # templates raise errors of many classes
            raise InputError(
                f"The PM's chat template refuses a conversation with the roles {roles} ({error}); drop such rows or choose "
                "another rendering."
            ) from error
    elif rendering.style == "hh":
        if unknown := [role for role in roles if role not in HH_TURN]:
            raise InputError(
                f"The hh transcript has no role {unknown[0]}; use system, user and assistant, or a chat template."
            )
        text = "".join(HH_TURN[m["role"]].format(m["content"]) for m in messages)
    else:
        text = "\n".join(m["content"] for m in messages)
    return text + rendering.suffix


def encode(rendering: Rendering, tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of rendered texts, with special tokens unless a chat template has put them in. InputError without an eos."""
    if not texts:
        return []
    if rendering.append_eos and tokenizer.eos_token_id is None:
        raise InputError(
            "The rendering appends the eos token, but the PM's tokenizer has no eos token; set append_eos to false."
        )
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=rendering.style != "chat").input_ids
    return [[*row, tokenizer.eos_token_id] for row in ids] if rendering.append_eos else ids


@dataclass(frozen=True, slots=True)
class PairTokens:
    """The token ids of both sides and the index at which they diverge (:func:`divergence`)."""

    chosen: Int[Tensor, " chosen_tokens"]
    rejected: Int[Tensor, " rejected_tokens"]
    divergence: int

    def side(self, side: str) -> Tensor:
        return self.chosen if side == "chosen" else self.rejected

    @property
    def shared(self) -> int:
        """The number of first tokens that a run of one side may take from the other; 0 where the first tokens differ."""
        return self.divergence if self.chosen[0] == self.rejected[0] else 0

    @property
    def longest(self) -> int:
        """Tokens of the longer side."""
        return max(self.chosen.numel(), self.rejected.numel())


def divergence(chosen: Sequence[int], rejected: Sequence[int]) -> int:
    """The first index at which two token lists differ, or the last common one where one is a prefix; never 0."""
    shorter = min(len(chosen), len(rejected))
    first = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter)
    return max(1, min(first, shorter - 1))


def pair_tokens(chosen: list[int], rejected: list[int]) -> PairTokens:
    return PairTokens(torch.tensor(chosen), torch.tensor(rejected), divergence(chosen, rejected))


def tokenize_sides(rendering: Rendering, tokenizer: Any, pairs: Sequence[Pair]) -> list[PairTokens]:
    """The tokens of both sides of each pair."""
    texts = [render(rendering, tokenizer, p.prompt, p.side(s)) for s in SIDES for p in pairs]
    ids = encode(rendering, tokenizer, texts)
    return [pair_tokens(c, r) for c, r in zip(ids[: len(pairs)], ids[len(pairs) :], strict=True)]

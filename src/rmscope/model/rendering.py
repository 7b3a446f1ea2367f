"""From a conversation to the text that a PM was trained on, and from the text to tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from rmscope.errors import InputError, one_line
from rmscope.model.chat_template import DATE, check_template, with_date
from rmscope.pairs.pair import SIDES, Message, Pair, Side

Style = Literal["hh", "chat", "plain", "segments"]
STYLES: tuple[Style, ...] = ("hh", "chat", "plain", "segments")
SETTINGS_FILE = "rmscope.json"
LONG_TEXT = 100_000
"""Characters up to which a text is tokenized whole, whatever the context."""
AT_ONCE = 256
"""Pairs that are tokenized at once."""
NO_LIMIT = 1 << 30
BETWEEN = "\x1f"
"""Stands between the two segments of a rendered text."""
HH_TURN = {"system": "{}", "user": "\n\nHuman: {}", "assistant": "\n\nAssistant: {}"}


@dataclass(frozen=True, slots=True)
class Rendering:
    """How a PM reads a conversation.

    ``hh`` is the transcript of hh-rlhf: a blank line and ``Human:`` or ``Assistant:`` before each turn. ``chat`` is the
    tokenizer's chat template. ``plain`` is one line per turn, then the response. ``segments`` is
    ``tokenizer(prompt, response)``: two segments with a separator between them, as many encoders were trained.
    """

    style: Style = "hh"
    append_eos: bool = False
    """Whether the eos token follows the text (TRL appends it to plain text in training)."""
    suffix: str = ""
    """Text after the response, such as the question that a judge is asked."""
    bos: bool = True
    """Whether the tokenizer's bos token stays where it puts one; some PMs were trained without it."""
    date: str = ""
    """The day (YYYY-MM-DD) that a chat template writes as today; empty where it writes none."""

    @classmethod
    def find(cls, folder: Path | None, tokenizer: Any, card: str = "") -> Rendering:
        """The rendering in ``rmscope.json`` beside the PM; or the chat template, or ``hh``, with eos if its card says so.

        Raises :class:`InputError` where the file names a rendering that cannot be used.
        """
        if template := stored_template(tokenizer):
            check_template(template)
        today = DATE if template and "strftime_now" in template else ""
        if folder is None or not (stored := read_json(folder / SETTINGS_FILE)):
            if template:
                return cls("chat", date=today)
            if asked_in_segments(card) and tokenizer.sep_token_id is not None:
                return cls("segments")
            return cls("hh", append_eos=trl_appended_eos(card) and tokenizer.eos_token_id is not None)
        given = stored.get("rendering", {})
        known = isinstance(given, dict) and given.keys() <= {"style", "append_eos", "suffix", "bos", "date"}
        if not known or given.get("style", "hh") not in STYLES:
            raise InputError(
                f"{folder / SETTINGS_FILE} names no rendering that rmscope knows ({given}); "
                f"give a style ({', '.join(STYLES)}), append_eos and bos."
            )
        if given.get("date") is not None and not _is_date(given["date"]):
            raise InputError(
                f"{folder / SETTINGS_FILE} has the date {given['date']!r}; write the day that the template should give, as "
                "2024-07-26."
            )
        if given.get("style") == "chat" and not template:
            raise InputError(
                f"{folder / SETTINGS_FILE} asks for the chat template, but the tokenizer has none; add it "
                "(chat_template.jinja), or name another style."
            )
        return cls(**({"date": today} if given.get("style") == "chat" else {}) | given)

    def __str__(self) -> str:
        eos, bos = "" if self.append_eos else "not ", "" if self.bos else ", no bos"
        return f"{self.style}, eos {eos}appended{bos}" + (f", today is {self.date}" if self.date else "")

    def as_dict(self) -> dict[str, Any]:
        """The rendering as ``rmscope.json`` stores it; an empty suffix, a bos that stays, and no date, are left out."""
        defaults = {"suffix": "", "bos": True, "date": ""}
        return {name: value for name, value in asdict(self).items() if name not in defaults or value != defaults[name]}


def trl_appended_eos(card: str) -> bool:
    """Whether a model card is by TRL's reward trainer 0.24 or later, which appends eos to plain text."""
    version = re.search(r"^- TRL: (\d+)\.(\d+)", card, re.MULTILINE)
    return "reward-trainer" in card and version is not None and (int(version[1]), int(version[2])) >= (0, 24)


def asked_in_segments(card: str) -> bool:
    """Whether a model card calls ``tokenizer(question, answer)``: the PM reads two segments."""
    return (
        re.search(r"tokenizer\(\s*(question|prompt|query|instruction)\s*,\s*(answer|response|completion)\b", card)
        is not None
    )


def _is_date(value: Any) -> bool:
    try:
        return bool(date.fromisoformat(value))
    except (TypeError, ValueError):
        return False


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
    renamed = _renamed_calls(messages)
    if renamed and rendering.style != "chat":
        raise InputError(
            f"The rendering {rendering.style} has no place for the call of {renamed[0][0]}; leave such rows out."
        )
    if rendering.style == "chat":
        stored = stored_template(tokenizer)
        template = with_date(stored, rendering.date or DATE) if stored else None
        text = _by_template(tokenizer, messages, template)
        if unseen := [tool for tool, others in renamed if _by_template(tokenizer, others, template) == text]:
            raise InputError(f"The PM's chat template drops the call of {unseen[0]} from the prompt; leave such rows out.")
    elif rendering.style == "hh":
        if unknown := [role for role in roles if role not in HH_TURN]:
            raise InputError(
                f"The hh transcript has no role {unknown[0]}; use system, user and assistant, or a chat template."
            )
        text = "".join(HH_TURN[m["role"]].format(m["content"]) for m in messages)
    elif rendering.style == "segments":
        text = "\n".join(m["content"] for m in prompt).replace(BETWEEN, " ") + BETWEEN + response
    else:
        text = "\n".join(m["content"] for m in messages)
    return text + rendering.suffix


def stored_template(tokenizer: Any) -> str | None:
    """The tokenizer's chat template; of several, the one that transformers takes without a name."""
    stored = getattr(tokenizer, "chat_template", None)
    template = stored.get("default") if isinstance(stored, dict) else stored
    return template if isinstance(template, str) and template else None


def _by_template(tokenizer: Any, messages: list[Message], template: str | None) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, chat_template=template))
    except Exception as error:  # templates raise errors of many classes
        roles = [m["role"] for m in messages]
        raise InputError(
            f"The PM's chat template refuses a conversation with the roles {roles} ({one_line(error)}); drop such rows or "
            "choose another rendering."
        ) from error


def _renamed_calls(messages: list[Message]) -> list[tuple[str, list[Message]]]:
    """For each call of a tool, its name and the conversation in which it has another: a template that renders the call
    gives another text then."""
    renamed: list[tuple[str, list[Message]]] = []
    for i, message in enumerate(messages):
        calls = message.get("tool_calls", [])
        for j, call in enumerate(calls):
            function = call.get("function", {})
            other = {**call, "function": {**function, "name": f"not_{function.get('name')}"}}
            turn: Message = {**message, "tool_calls": [*calls[:j], other, *calls[j + 1 :]]}
            renamed.append((function.get("name", "a tool"), [*messages[:i], turn, *messages[i + 1 :]]))
    return renamed


def encode(rendering: Rendering, tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of rendered texts, with special tokens unless a chat template has put them in. InputError without an eos."""
    if not texts:
        return []
    if rendering.append_eos and tokenizer.eos_token_id is None:
        raise InputError(
            "The rendering appends the eos token, but the PM's tokenizer has no eos token; set append_eos to false."
        )
    ids: list[list[int]]
    if rendering.style == "segments":
        firsts, seconds = zip(
            *((first, second) for first, _, second in (text.partition(BETWEEN) for text in texts)), strict=True
        )
        ids = tokenizer(list(firsts), list(seconds)).input_ids
    else:
        ids = tokenizer(list(texts), add_special_tokens=rendering.style != "chat").input_ids
    if not rendering.bos and tokenizer.bos_token_id is not None:
        ids = [row[1:] if row[:1] == [tokenizer.bos_token_id] else row for row in ids]
    return [[*row, tokenizer.eos_token_id] for row in ids] if rendering.append_eos else ids


def encode_within(rendering: Rendering, tokenizer: Any, texts: Sequence[str], context: int) -> list[list[int]]:
    """The same. Of a text far longer than ``context`` tokens only the beginning is read, so that megabytes take no minutes.

    Such a text still has more than ``context`` ids.
    """
    if max(map(len, texts), default=0) <= LONG_TEXT:
        return encode(rendering, tokenizer, texts)
    most = max(LONG_TEXT, (context + 2) * max(map(len, tokenizer.get_vocab())))
    ids = encode(rendering, tokenizer, [text[:most] for text in texts])
    for i, text in enumerate(texts):
        if len(text) > most and len(ids[i]) <= context:  # the tokenizer makes one token of many characters
            ids[i] = encode(rendering, tokenizer, [text])[0]
    return ids


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


def _render_side(rendering: Rendering, tokenizer: Any, pair: Pair, side: Side) -> str:
    try:
        return render(rendering, tokenizer, pair.prompt, pair.side(side))
    except InputError as error:
        raise InputError(f"{pair.id}: {error}") from error


def can_render(rendering: Rendering, tokenizer: Any, pair: Pair) -> bool:
    """Whether the PM's rendering takes both sides of a pair; many chat templates refuse system prompts."""
    try:
        return all(_render_side(rendering, tokenizer, pair, side) is not None for side in SIDES)
    except InputError:
        return False


def tokenize_sides(rendering: Rendering, tokenizer: Any, pairs: Sequence[Pair], context: int = NO_LIMIT) -> list[PairTokens]:
    """The tokens of both sides of each pair; of texts far longer than ``context`` tokens, those of their beginning."""
    found = []
    for start in range(0, len(pairs), AT_ONCE):  # what the tokenizer tells beside the ids takes ten times their memory
        some = pairs[start : start + AT_ONCE]
        texts = [_render_side(rendering, tokenizer, p, s) for s in SIDES for p in some]
        ids = encode_within(rendering, tokenizer, texts, context)
        found += [pair_tokens(c, r) for c, r in zip(ids[: len(some)], ids[len(some) :], strict=True)]
    return found


class WordTokens:
    """The tokens of a tokenizer that hold a word, a number or a part of one; special tokens and punctuation do not."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, bool] = {}

    def __contains__(self, token: int) -> bool:
        if token not in self._known:
            special = token in self._tokenizer.all_special_ids
            text = self._tokenizer.decode([token])  # part of a character decodes to the replacement mark: not an ending
            self._known[token] = not special and any(c.isalnum() or c == "\ufffd" for c in text)
        return self._known[token]


def changed_responses(rendering: Rendering, tokenizer: Any, pairs: Sequence[Pair]) -> list[tuple[int, Side]]:
    """The responses, as (place of the pair, side), that a chat template does not give word for word, but cut or trimmed."""
    if rendering.style != "chat":
        return []
    sides: list[tuple[int, Side]] = [(i, side) for i in range(len(pairs)) for side in SIDES]
    return [
        (i, side)
        for i, side in sides
        if pairs[i].side(side) not in render(rendering, tokenizer, pairs[i].prompt, pairs[i].side(side))
    ]

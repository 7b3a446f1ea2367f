"""Dialogues as one text, as in hh-rlhf: a blank line and ``Human:`` or ``Assistant:`` before each turn."""

from __future__ import annotations

import re
from collections.abc import Iterator

from rmscope.pairs.pair import SIDES, Message, Pair
from rmscope.pairs.values import BadRow, Row, check_prompt, text_of

OPENING = "\n\nAssistant:"
"""What a prompt ends with where the assistant is to speak."""

_TURN = re.compile(r"\n\n(Human|Assistant):(?: |\s*\Z)")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def _turns(text: str, column: str) -> tuple[str, list[Message], list[int]]:
    """The transcript without outer whitespace but for its first blank line, its turns, and where their texts start in it.
    A turn opens with a blank line, its speaker, a colon and one space. Written back so, the turns give the transcript."""
    text = "\n\n" + text.lstrip()
    before, *parts = _TURN.split(text)
    if before or parts[0] != "Human":
        raise BadRow(f'there is no prompt: {column} does not begin with "\\n\\nHuman: "')
    turns: list[Message] = [{"role": _ROLES[r], "content": t} for r, t in zip(parts[::2], parts[1::2], strict=True)]
    return text, turns, [mark.end() for mark in _TURN.finditer(text)]


def transcripts(row: Row) -> Iterator[Pair]:
    """Common turns are the prompt; the rest of each transcript, verbatim, is the response.

    In 17 of the 7,415 pairs of three hh-rlhf test splits a response then has more than one turn. The data also has
    identical and empty responses (34 and 8 there): such rows are always skipped and listed.
    """
    if text_of(row, "chosen") == text_of(row, "rejected"):
        raise BadRow("chosen and rejected are identical", always="skip")
    chosen, left, left_starts = _turns(row["chosen"], "chosen")
    rejected, right, right_starts = _turns(row["rejected"], "rejected")
    for side, turns in (("chosen", left), ("rejected", right)):
        if turns[-1]["role"] != "assistant":
            raise BadRow(f"{side} does not end with an assistant turn")
    n = common(left, right)
    if n == 0 or [turn["role"] for turn in (left[n - 1], left[n], right[n])] != ["user", "assistant", "assistant"]:
        raise BadRow("the dialogues do not part at the beginning of an assistant turn")
    pair = Pair("", check_prompt(left[:n]), chosen[left_starts[n] :], rejected[right_starts[n] :])
    for side in SIDES:
        if not pair.side(side).strip():
            raise BadRow(f"{side} is empty", always="skip")
    yield pair


def common(left: list[Message], right: list[Message]) -> int:
    """How many leading turns the dialogues share; the last turn of each does not count."""
    most = min(len(left), len(right)) - 1
    return next((i for i in range(most) if left[i] != right[i]), most)


def is_transcript_prompt(prompt: object) -> bool:
    """Whether a prompt is a transcript that ends where the assistant is to speak."""
    return isinstance(prompt, str) and prompt.lstrip().startswith("Human:") and prompt.rstrip().endswith(OPENING)


def transcript_prompt(row: Row) -> list[Message]:
    """The turns of such a prompt."""
    prompt = text_of(row, "prompt")
    if not prompt.rstrip().endswith(OPENING):
        raise BadRow('the prompt does not end with "\\n\\nAssistant:" as those before it do')
    _, turns, _ = _turns(prompt.rstrip(), "prompt")
    return check_prompt(turns[:-1])


def after_transcript(row: Row) -> Iterator[Pair]:
    """A transcript that ends where the assistant is to speak, and two responses (as in Dahoas/rm-static)."""
    chosen, rejected, prompt = text_of(row, "chosen"), text_of(row, "rejected"), transcript_prompt(row)
    yield Pair("", prompt, chosen.removeprefix(" "), rejected.removeprefix(" "))

"""The language model that is asked: behind an OpenAI-compatible endpoint, or a local one of transformers.

Several threads may ask at once. Tokens are counted as the model reports them; a server that reports none is told apart from
one that costs nothing.
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any, Protocol

from rmscope.errors import InputError, one_line
from rmscope.studies.label.settings import LabelConfig

LONGEST_WAIT = 60.0
"""Seconds between two tries, at most."""
ANSWER_BYTES = 4_000_000
"""A longer answer of a server is malformed."""
ASK_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504}
"""Statuses of HTTP after which the same question may succeed."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked: who the model is, the question, and how long the answer may be in tokens."""

    system: str
    text: str
    longest: int
    temperature: float = 0.0


@dataclass(slots=True)
class Usage:
    """What was asked so far."""

    questions: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    uncounted: int = 0
    """Answers without a count of tokens."""

    def add(self, counts: Any) -> None:
        """Adds an answer. ``counts`` is the server's ``usage``, or what stands in its place."""
        self.questions += 1
        known = counts if isinstance(counts, dict) else {}
        tokens_in, tokens_out = known.get("prompt_tokens"), known.get("completion_tokens")
        if isinstance(tokens_in, int) and isinstance(tokens_out, int) and min(tokens_in, tokens_out) >= 0:
            self.tokens_in, self.tokens_out = self.tokens_in + tokens_in, self.tokens_out + tokens_out
        else:
            self.uncounted += 1


class LanguageModel(Protocol):
    """Answers questions."""

    usage: Usage

    def answers(self, questions: list[Question]) -> list[str]:
        """One answer per question; empty where the model gave none."""
        ...


class _StayHere(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: it would send the key to another server."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class Endpoint:
    """A server that speaks OpenAI's chat protocol.

    Raises:
        InputError: the key holds signs that no key has; the server cannot be reached, refuses the key or the model, or
            still fails after all retries.
    """

    def __init__(self, config: LabelConfig) -> None:
        self.config, self.usage = config, Usage()
        self.address = f"{(config.endpoint or '').rstrip('/')}/chat/completions"
        self.key = os.environ.get(config.key_variable, "").strip()
        if not (self.key.isascii() and self.key.isprintable()):
            raise InputError(f"The environment variable {config.key_variable} holds no key: it has signs that no key has.")
        self.opener = urllib.request.build_opener(_StayHere)

    def answers(self, questions: list[Question]) -> list[str]:
        with ThreadPoolExecutor(self.config.parallel) as pool:
            bodies = list(pool.map(self._ask, questions))
        texts = []
        for body in bodies:
            self.usage.add(body.get("usage"))
            texts.append(answer_text(body))
        return texts

    def _ask(self, question: Question) -> dict[str, Any]:
        """The server's answer, as JSON; empty where it is malformed."""
        content = {
            "model": self.config.llm,
            "messages": [{"role": "system", "content": question.system}, {"role": "user", "content": question.text}],
            "max_tokens": question.longest,
            "temperature": question.temperature,
        }
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(self.address, json.dumps(content).encode(), headers)
        for tries in range(self.config.retries + 1):
            wait = float(min(LONGEST_WAIT, 2**tries))
            try:
                with self.opener.open(request, timeout=self.config.timeout) as answer:
                    return _parsed(answer.read(ANSWER_BYTES + 1))
            except urllib.error.HTTPError as error:
                if error.code not in ASK_AGAIN:
                    raise InputError(self._refusal(error)) from error
                reason, wait = f"status {error.code}", _asked_wait(error.headers.get("Retry-After"), wait)
            except (OSError, HTTPException) as error:  # time-outs, refused and broken connections
                reason = str(getattr(error, "reason", error)) or type(error).__name__
            if tries < self.config.retries:
                time.sleep(wait)
        raise InputError(
            f"The language model at {self.address} gave no answer in {self.config.retries + 1} tries ({reason}); check "
            "the address, or give it longer (--timeout, --retries). What is done is kept: the same command goes on."
        )

    def _refusal(self, error: urllib.error.HTTPError) -> str:
        where = f"The language model at {self.address} refuses"
        if error.code in (401, 403):
            variable = self.config.key_variable
            return f"{where} the key (status {error.code}); put the right one into the environment variable {variable}."
        return f"{where} the question (status {error.code}); check the address and the model's name, {self.config.llm}."


def answer_text(body: dict[str, Any]) -> str:
    """The text of a server's answer; empty where the answer is not of the protocol's form."""
    try:
        text = body["choices"][0]["message"]["content"]
    except (LookupError, TypeError):
        return ""
    return text if isinstance(text, str) else ""


def _parsed(body: bytes) -> dict[str, Any]:
    if len(body) > ANSWER_BYTES:
        return {}
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _asked_wait(header: str | None, otherwise: float) -> float:
    """The seconds that a server asks to wait; a date, or nonsense, counts as nothing said."""
    try:
        return min(LONGEST_WAIT, max(0.0, float(header or "")))
    except ValueError:
        return otherwise


class LocalModel:
    """A causal language model of transformers, from a folder or the hub; its chat template is used where it has one.

    Raises:
        InputError: the model cannot be loaded.
    """

    def __init__(self, name: str, device: str) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.usage, self.device = Usage(), device
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            loaded: Any = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False, output_loading_info=True)
        except (OSError, ValueError) as error:
            raise InputError(f"{name} cannot be loaded as a language model ({one_line(error)}).") from error
        model, info = loaded
        if info["missing_keys"]:
            raise InputError(f"{name} holds no vocabulary head, so it cannot write; name a language model.")
        self.model: Any = model.to(device).eval()

    def answers(self, questions: list[Question]) -> list[str]:
        return [self._answer(question) for question in questions]

    def _answer(self, question: Question) -> str:
        import torch

        if self.tokenizer.chat_template:
            turn = {
                "role": "user",
                "content": f"{question.system}\n\n{question.text}",
            }
            text = self.tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
        else:
            text = f"{question.system}\n\n{question.text}\n\nAnswer:"
        inputs = self.tokenizer(text, return_tensors="pt", add_special_tokens=not self.tokenizer.chat_template).to(
            self.device
        )
        sampled = {"do_sample": True, "temperature": question.temperature} if question.temperature else {"do_sample": False}
        with torch.no_grad():
            ids = self.model.generate(
                **inputs, max_new_tokens=question.longest, pad_token_id=self.tokenizer.eos_token_id, **sampled
            )
        new = ids[0, inputs["input_ids"].shape[1] :]
        self.usage.add({"prompt_tokens": inputs["input_ids"].shape[1], "completion_tokens": len(new)})
        return str(self.tokenizer.decode(new, skip_special_tokens=True))


def open_language_model(config: LabelConfig, device: str) -> LanguageModel:
    """The model that the settings name."""
    return Endpoint(config) if config.endpoint else LocalModel(config.llm, device)

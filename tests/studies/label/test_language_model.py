"""Asking a language model: what is asked again, what is refused, and where the key goes."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from rmscope.errors import InputError
from rmscope.studies.label.language_model import Endpoint, LocalModel, Question, answer_text
from rmscope.studies.label.settings import LabelConfig
from tests.model.small import saved_pm
from tests.studies.label.stub import Reply, said, serving

ASKED = Question("Be brief.", "What is it?", 20)


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that would have been waited for."""
    waited = list[float]()
    monkeypatch.setattr("rmscope.studies.label.language_model.time.sleep", waited.append)
    return waited


def endpoint(address: str, **changes: Any) -> Endpoint:
    return Endpoint(LabelConfig(llm="writer", endpoint=address, **{"timeout": 5, **changes}))


def test_a_question_is_asked_in_the_protocols_form_and_its_tokens_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    with serving(lambda _body, _n: said("thanks", prompt_tokens=12, completion_tokens=3)) as stub:
        model = endpoint(stub.address + "/", key_variable="MY_KEY")
        assert model.answers([ASKED, ASKED]) == ["thanks", "thanks"]
    assert stub.bodies[0]["messages"] == [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is it?"}
    ]  # fmt: skip
    assert (stub.bodies[0]["model"], stub.bodies[0]["max_tokens"]) == ("writer", 20)
    assert stub.headers[0]["Authorization"] == "Bearer secret"
    assert (model.usage.questions, model.usage.tokens_in, model.usage.tokens_out) == (2, 24, 6)


def test_limits_errors_and_time_outs_are_asked_again_after_the_time_that_the_server_says(waits: list[float]) -> None:
    def reply(_body: dict[str, Any], number: int) -> Reply:
        if number == 0:
            return 429, {"Retry-After": "7"}, b"slow down"
        if number == 1:
            return 503, {}, b""
        return said("thanks")

    with serving(reply) as stub:
        model = endpoint(stub.address)
        assert model.answers([ASKED]) == ["thanks"]
    assert waits[:2] == [7.0, 2.0]
    assert model.usage.uncounted == 1


def test_a_server_that_stays_silent_is_told_in_a_sentence(waits: list[float]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        model = endpoint(f"http://127.0.0.1:{silent.getsockname()[1]}/v1", timeout=0.05, retries=2)
        with pytest.raises(InputError, match=r"no answer in 3 tries \(.*timed out\)"):
            model.answers([ASKED])
    assert waits == [1.0, 2.0]


@pytest.mark.parametrize(
    ("status", "sentence"),
    [(401, "refuses the key .* environment variable OPENAI_API_KEY"), (404, "refuses the question .* name, writer")],
)
def test_what_a_server_refuses_is_not_asked_again(status: int, sentence: str) -> None:
    with serving(lambda _body, _n: (status, {}, b"{}")) as stub:
        with pytest.raises(InputError, match=sentence):
            endpoint(stub.address).answers([ASKED])
        assert len(stub.bodies) == 1


def test_the_key_is_sent_to_no_other_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with (
        serving(lambda _body, _n: said("thanks")) as other,
        serving(lambda _body, _n: (302, {"Location": other.address}, b"")) as stub,
    ):
        with pytest.raises(InputError, match="status 302"):
            endpoint(stub.address).answers([ASKED])
        assert not other.bodies


@pytest.mark.parametrize(
    "body", [b"no json", b"[]", b"{}", b'{"choices": []}', b'{"choices": [{"message": null}]}', b"[" * 9999]
)
def test_a_malformed_answer_is_empty(body: bytes) -> None:
    with serving(lambda _body, _n: (200, {}, body)) as stub:
        assert endpoint(stub.address).answers([ASKED]) == [""]
    assert answer_text({"choices": [{"message": {"content": 3}}]}) == ""


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("localhost:8000", "is no address"), ("http://me:secret@host/v1", "holds a password"),
        ("https://host/v1?key=1", "holds a password or a query"),
    ],
)  # fmt: skip
def test_an_endpoint_is_an_address_without_secrets(address: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        LabelConfig(llm="writer", endpoint=address)


def test_a_local_model_answers_and_one_without_a_vocabulary_head_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be loaded as a language model"):
        LocalModel(str(tmp_path / "nothing"), "cpu")
    folder = saved_pm(tmp_path / "pm")
    with pytest.raises(InputError, match="holds no vocabulary head"):
        LocalModel(folder, "cpu")
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    model = LocalModel(folder, "cpu")
    (answer,) = model.answers([Question("Be brief.", "What is it?", 5)])
    assert isinstance(answer, str)
    assert 1 <= model.usage.tokens_out <= 5

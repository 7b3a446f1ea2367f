"""A server that speaks OpenAI's chat protocol and does as it is told, and language models that need no server."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from rmscope.studies.label.language_model import Question, Usage

Reply = tuple[int, dict[str, str], bytes]
"""Status, headers and body."""


def said(text: str, **usage: int) -> Reply:
    """An answer of the protocol's form."""
    body: dict[str, Any] = {"choices": [{"message": {"role": "assistant", "content": text}}]}
    return 200, {}, json.dumps(body | ({"usage": usage} if usage else {})).encode()


@dataclass
class Stub:
    """What the server was asked: headers and bodies."""

    address: str = ""
    headers: list[dict[str, str]] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)


@contextmanager
def serving(reply: Callable[[dict[str, Any], int], Reply]) -> Iterator[Stub]:
    """A server that answers with ``reply`` of a request's body and its number."""
    stub = Stub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            stub.headers.append(dict(self.headers))
            stub.bodies.append(body)
            status, headers, content = reply(body, len(stub.bodies) - 1)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    stub.address = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()


class Answering:
    """A language model whose answers are a function of the question."""

    def __init__(self, answer: Callable[[str], str]) -> None:
        self.answer, self.usage = answer, Usage()

    def answers(self, questions: list[Question]) -> list[str]:
        for _ in questions:
            self.usage.add({"prompt_tokens": 10, "completion_tokens": 2})
        return [self.answer(question.text) for question in questions]


def listed(question: str) -> list[str]:
    """The numbered texts of a question."""
    return [line.partition(". ")[2] for line in question.splitlines() if line.partition(". ")[0].isdecimal()]

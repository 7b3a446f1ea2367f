"""The command ``serve``: what is missing is one sentence, and what it serves is what the folder holds."""

from __future__ import annotations

import socket
import threading
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest

from rmscope.app import serve as command
from rmscope.app.serve import serve
from rmscope.app.settings import ServeConfig
from rmscope.errors import InputError
from rmscope.io import NoDisplay
from tests.cli.test_cli import one_sentence, rmscope_command


class Notes(NoDisplay):
    """Keeps what is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def note(self, text: str) -> None:
        self.told.append(text)


def test_without_its_packages_the_command_says_how_to_install_them(app_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "uvicorn" else find_spec(name))
    told = one_sentence(rmscope_command("serve", str(app_run)))
    assert "needs uvicorn" in told
    assert "pip install 'rmscope[app]'" in told


def test_a_folder_without_a_run_and_a_port_that_is_taken_are_one_sentence(app_run: Path, tmp_path: Path) -> None:
    assert "holds no run" in one_sentence(rmscope_command("serve", str(tmp_path)))
    assert "is no folder" in one_sentence(rmscope_command("serve", str(tmp_path / "nowhere")))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InputError, match="choose another --port"):
            serve(ServeConfig(folder=app_run, port=taken.getsockname()[1]), NoDisplay())


def test_it_serves_on_loopback_until_it_is_stopped(app_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import uvicorn

    servers: list[uvicorn.Server] = []
    start = uvicorn.Server.run

    def run(server: uvicorn.Server, sockets: list[socket.socket]) -> None:
        servers.append(server)
        start(server, sockets)

    monkeypatch.setattr(uvicorn.Server, "run", run)
    notes = Notes()
    thread = threading.Thread(target=serve, args=(ServeConfig(folder=app_run, port=0), notes))
    thread.start()
    deadline = time.time() + 60
    while not (servers and servers[0].started) and time.time() < deadline:
        time.sleep(0.05)
    address = next(word for word in notes.told[-1].split() if word.startswith("http"))
    assert address.startswith("http://127.0.0.1:")
    with urllib.request.urlopen(f"{address}/") as answer:
        assert answer.status == 200
        assert answer.url.endswith("/r/small-run")
    servers[0].should_exit = True
    thread.join(30)
    assert not thread.is_alive()


def test_an_open_address_comes_with_a_warning(app_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("uvicorn.Server.run", lambda *_: None)
    notes = Notes()
    serve(ServeConfig(folder=app_run, host="0.0.0.0", port=0), notes)
    assert "no passwords" in notes.told[0]

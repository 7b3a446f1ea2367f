"""Requests that a page of another site could cause are refused, and every answer forbids inline script."""

from __future__ import annotations

import re

import pytest
from fastapi.testclient import TestClient

from rmscope.app.security import Guard, is_loopback

PAGES = ("/", "/r/small-run", "/r/small-run/concepts/0", "/r/small-run/bench", "/nowhere", "/static/app.css")


async def nothing(*_: object) -> None:
    raise AssertionError("reached")


def refusal(host: str, method: str = "GET", bound: str = "127.0.0.1", **headers: str) -> str:
    given = [(b"host", host.encode()), *((k.replace("_", "-").encode(), v.encode()) for k, v in headers.items())]
    return Guard(nothing, bound).refusal(method, given)


@pytest.mark.parametrize("host", ["localhost", "localhost:8765", "127.0.0.1:9000", "[::1]:8765", "LOCALHOST"])
def test_loopback_names_are_answered_at_any_port(host: str) -> None:
    assert refusal(host) == ""


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.nip.io",
        "192.168.0.7",
        "",
        "evil@localhost",
        "localhost/x",
        "[::1",
    ],
)
def test_a_foreign_host_name_is_refused(host: str) -> None:
    assert "Host" in refusal(host)


def test_two_host_headers_are_refused() -> None:
    assert Guard(nothing, "127.0.0.1").refusal("GET", [(b"host", b"localhost"), (b"Host", b"localhost")])


def test_bound_to_the_network_addresses_are_answered_and_names_are_not() -> None:
    assert refusal("192.168.0.7:8765", bound="0.0.0.0") == ""
    assert refusal("[fe80::1]", bound="0.0.0.0") == ""
    assert refusal("lab.example", bound="lab.example") == ""
    assert refusal("rebound.example", bound="0.0.0.0")
    assert [is_loopback(h) for h in ("127.0.0.1", "::1", "localhost", "127.8.8.8", "0.0.0.0", "lab")] == [True] * 4 + [
        False
    ] * 2


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://localhost", "http://localhost:1", ""])
def test_a_post_from_another_site_is_refused(origin: str) -> None:
    assert "post" in refusal("localhost:8765", "POST", origin=origin)
    assert "post" in refusal("localhost:8765", "POST")
    assert refusal("localhost:8765", "POST", origin="http://localhost:8765") == ""


def test_other_sites_may_link_and_not_load() -> None:
    assert refusal("localhost", sec_fetch_site="cross-site", sec_fetch_mode="no-cors")
    assert refusal("localhost", sec_fetch_site="same-site", sec_fetch_mode="cors")
    assert refusal("localhost", sec_fetch_site="cross-site", sec_fetch_mode="navigate") == ""
    assert refusal("localhost", "POST", origin="http://localhost", sec_fetch_site="cross-site", sec_fetch_mode="navigate")


@pytest.mark.parametrize("address", PAGES)
def test_every_answer_forbids_inline_script_and_other_servers(client: TestClient, address: str) -> None:
    answer = client.get(address)
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["connect-src"] == policy["form-action"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert "unsafe-inline" not in policy["script-src"] + policy["style-src"]


@pytest.mark.parametrize("address", [p for p in PAGES if not p.startswith("/static")])
def test_pages_hold_no_script_and_load_nothing_from_elsewhere(client: TestClient, address: str) -> None:
    page = client.get(address).text
    assert re.findall(r"<script[^>]*>", page) == [f'<script src="/static/{f}" defer>' for f in ("htmx.min.js", "app.js")]
    assert not re.search(r"<style|<iframe|\son\w+=|javascript:", page)
    assert not re.search(r'(?:src|href|action|hx-\w+)="(?:\w+:)?//', page)


def test_the_app_itself_refuses_what_the_guard_refuses(client: TestClient) -> None:
    assert client.get("/", headers={"host": "evil.example"}).status_code == 403
    answer = client.post("/r/small-run/concepts/0/label", data={"name": "x"}, headers={"origin": "http://evil.example"})
    assert answer.status_code == 403
    assert "content-security-policy" in answer.headers

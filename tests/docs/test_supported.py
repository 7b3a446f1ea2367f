"""The page of what is supported is that which the tests' files give."""

from __future__ import annotations

from tests.supported import PAGE, page


def test_the_page_is_current() -> None:
    assert PAGE.read_text("utf-8") == page(), "run `python -m tests.supported`"

"""Results: what a study or a command found, typed, with one line to say it, tables for the terminal and a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from rmscope.errors import InputError
from rmscope.report.page import Page

Rows = Sequence[Mapping[str, Any]]
"""A table for people: one mapping per row; cells are texts, numbers, Figures or None."""


class Result(BaseModel):
    """What was found. Frames are fields with ``exclude=True``; all else is what ``--json`` prints."""

    model_config = ConfigDict(
        extra="forbid", arbitrary_types_allowed=True, ser_json_inf_nan="constants", protected_namespaces=()
    )

    def summary(self) -> str:
        """One line that says what was found."""
        raise NotImplementedError

    def tables(self) -> dict[str, Rows]:
        """Tables for the terminal, by title."""
        return {}

    def as_json(self) -> Any:
        """What ``--json`` prints."""
        return self.model_dump(mode="json")

    @property
    def exit_code(self) -> int:
        """0, or 1 where the command asks a question and the answer is no."""
        return 0

    def page(self) -> Page | None:
        """The page, if the result has one."""
        return None

    def show(self) -> Page:
        """The page, inline in a notebook; printed, it is the path of its file. InputError where there is none."""
        page = self.page()
        if page is None:
            raise InputError(f"{type(self).__name__} has no page; print(result.summary()) says what was found.")
        return page

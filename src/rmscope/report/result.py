"""Results of studies and commands: typed, with one line to sum them up, tables for the terminal and a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from rmscope.errors import InputError
from rmscope.report.page import Page

Rows = Sequence[Mapping[str, Any]]
"""A table for people, one mapping per row; cells are texts, numbers, Figures or None."""


class Result(BaseModel):
    """A result. Frames are fields with ``exclude=True``; all other fields are what ``--json`` prints."""

    model_config = ConfigDict(
        extra="forbid", arbitrary_types_allowed=True, ser_json_inf_nan="constants", protected_namespaces=()
    )

    def summary(self) -> str:
        """The result in one line."""
        raise NotImplementedError

    def tables(self) -> dict[str, Rows]:
        """Tables for the terminal, by title."""
        return {}

    def as_json(self) -> Any:
        """The content of ``--json``."""
        return self.model_dump(mode="json")

    @property
    def exit_code(self) -> int:
        """0, or 1 where the command asks a question and the answer is no."""
        return 0

    def page(self) -> Page | None:
        """The page, if the result has one."""
        return None

    def show(self) -> Page:
        """The page, shown inline in a notebook and printed as the path of its file. InputError if there is none."""
        page = self.page()
        if page is None:
            raise InputError(f"{type(self).__name__} has no page; print(result.summary()) says what was found.")
        return page

"""Results of the single steps: named figures, and tables of which the first rows are shown."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from rmscope.report.result import Result, Rows


class Figures(Result):
    """Named figures, told as a table of two columns."""

    title: str = Field(exclude=True)
    figures: dict[str, Any]

    def summary(self) -> str:
        return self.title

    def tables(self) -> dict[str, Rows]:
        return {self.title: [{"figure": name.replace("_", " "), "value": value} for name, value in self.figures.items()]}

    def as_json(self) -> Any:
        return self.model_dump(mode="json")["figures"]


class Frame(Result):
    """A table of effects or the like, of which the terminal shows the first rows."""

    title: str = Field(exclude=True)
    note: str = Field("", exclude=True)
    figures: dict[str, Any] = {}
    rows: list[dict[str, Any]]
    shown: int = Field(20, exclude=True)
    name: str = Field("rows", exclude=True)
    """What the rows are called in JSON; empty where they are all of it."""

    def summary(self) -> str:
        return self.note or self.title

    def tables(self) -> dict[str, Rows]:
        return {self.title: self.rows[: self.shown]}

    def as_json(self) -> Any:
        return {**self.figures, self.name: self.rows} if self.name else self.rows

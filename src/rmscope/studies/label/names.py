"""The names of a run's concepts, and who gave each: a person, a language model, or rmscope offline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rmscope.report.formatting import number
from rmscope.run.labels import Label
from rmscope.run.run import Run
from rmscope.studies.label.result import ConceptName

Giver = Literal["hand", "language model", "offline"]


@dataclass(frozen=True, slots=True)
class Name:
    """A name of a concept."""

    text: str
    giver: Giver
    origin: str
    """Who gave it, and how well it did on texts that the language model had not seen."""
    record: ConceptName | None = None
    """The language model's record, with its scores."""

    @property
    def is_unsure(self) -> bool:
        """Whether a language model gave it and its score is below :data:`~rmscope.studies.label.settings.LEAST_SCORE`."""
        return self.record is not None and self.record.is_unsure


@dataclass(frozen=True, slots=True)
class NamedConcept:
    """A row of ``run.concepts`` with its names and what people noted."""

    row: dict[str, Any]
    names: Sequence[Name]
    """The name to show first: by hand, by a language model, offline; a language model's unsure name last."""
    label: Label

    @property
    def title(self) -> Name:
        """The name to show."""
        return self.names[0]

    @property
    def is_labelled(self) -> bool:
        """Whether a person named, starred or noted it."""
        return bool(self.label.name or self.label.star or self.label.note)


def named_concepts(run: Run) -> list[NamedConcept]:
    """The concepts of a run, by rank."""
    rows = run.concepts.to_dicts()
    return [named(*each) for each in zip(rows, run.labels.of(rows), run.labels.names(rows), strict=True)]


def named(row: dict[str, Any], label: Label, found: dict[str, Any] | None) -> NamedConcept:
    """A concept with its names; ``found`` is the record of a language model's."""
    names = list[Name]()
    if label.name:
        names.append(Name(label.name, "hand", f"by hand, {label.changed}"))
    if found is not None:
        record = ConceptName.model_validate(found)
        scores = f"detection {number(record.detection.value)}, fuzzing {number(record.fuzzing.value)}"
        names.append(Name(record.name, "language model", f"by {record.llm} ({scores})", record))
    names.append(Name(row["name"], "offline", "offline, from the words and positions that it singles out"))
    return NamedConcept(row, sorted(names, key=lambda name: name.is_unsure), label)

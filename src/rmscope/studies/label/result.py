"""Names with their scores, and what they cost."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from rmscope.report.result import Result, Rows
from rmscope.statistics import Figure
from rmscope.studies.label.language_model import Usage
from rmscope.studies.label.settings import LEAST_SCORE
from rmscope.studies.label.written import Written


class ConceptName(BaseModel):
    """The name of a concept, what tests of it found, and how long it took."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")

    concept: int
    keyword_name: str
    """The offline name of the run."""
    name: str
    llm: str
    sign: int
    """1 where the concept raises the reward, else -1."""
    detection: Figure
    """Balanced accuracy of the name on passages that the language model had not seen."""
    fuzzing: Figure
    """The same on marked tokens."""
    written: Written
    moves_as_said: bool | None
    """Whether texts written from the name surely move the reward in the concept's direction; null where it is not sure."""
    tokens: tuple[int, int]
    """Tokens of questions and of answers."""
    seconds: float

    @property
    def score(self) -> float | None:
        """The mean of the scores that could be measured."""
        known = [f.value for f in (self.detection, self.fuzzing) if f.value is not None]
        return sum(known) / len(known) if known else None

    @property
    def is_unsure(self) -> bool:
        """Whether the score is below :data:`~rmscope.studies.label.settings.LEAST_SCORE`, or there is none."""
        return self.score is None or self.score < LEAST_SCORE


class LabelResult(Result):
    """The names of some concepts."""

    llm: str
    names: list[ConceptName]
    unnamed: list[int]
    """Concepts to which the model gave no name."""
    usage: Usage
    """What was asked now; names that were there before cost nothing."""
    cost: float | None

    def summary(self) -> str:
        sure = sum(not name.is_unsure for name in self.names)
        told = f"{self.llm} named {len(self.names)} concepts; {sure} names score at least {LEAST_SCORE:g}"
        as_said = sum(name.moves_as_said is True for name in self.names)
        told += f", texts written from {as_said} move the reward as the concept does."
        asked = (
            f" Asked {self.usage.questions:,} questions, {self.usage.tokens_in:,} tokens in, {self.usage.tokens_out:,} out"
        )
        if self.usage.uncounted:
            asked += f" ({self.usage.uncounted} answers without a count)"
        return told + asked + (f", cost {self.cost:.2f}." if self.cost is not None else ".")

    def tables(self) -> dict[str, Rows]:
        """Names with the mean of detection and fuzzing; ``--json`` and the app have all figures."""
        rows = [
            {
                "concept": name.concept,
                "name": name.name + (" (unsure)" if name.is_unsure else ""),
                "score": name.score,
                "texts written from it": {True: "as said", False: "the other way", None: "not sure"}[name.moves_as_said],
            }
            for name in self.names
        ]
        return {"Names": rows}

"""An experiment file: prompts, base responses, and named conditions that build a text from a base response.

``ready/thanks.yaml`` is a short one. A condition of several texts takes them in turn, prompt by prompt, so that two lists of
one length pair their texts. Every condition is held against the baseline, unless it names another.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, field_validator, model_validator

from rmscope.errors import InputError
from rmscope.io import local_path
from rmscope.pairs.pair import Message, Pair
from rmscope.pairs.planting import sentences
from rmscope.settings import Settings, read_yaml

KINDS = ("same", "repeat", "paraphrase", "insert", "replace", "off_topic")
Texts = Annotated[list[str], Field(min_length=1), BeforeValidator(lambda text: [text] if isinstance(text, str) else text)]


class Condition(Settings):
    """How a text is built from a base response: one of :data:`KINDS`."""

    same: Literal[True] | None = None
    repeat: int | None = Field(None, ge=0, le=50)
    """How many times more the last sentence is said."""
    paraphrase: int | None = Field(None, ge=0)
    """How many paraphrases, from the prompt's own list, follow."""
    insert: Texts | None = None
    replace: Texts | None = None
    off_topic: Literal[True] | None = None
    """The base response of the next prompt."""
    at: Literal["start", "between", "end"] = "end"
    """Where ``insert`` puts its text; between: at the sentence border nearest the middle."""
    against: str | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Condition:
        if len(given := [k for k in KINDS if getattr(self, k) is not None]) != 1:
            raise ValueError(f"it does {' and '.join(given) or 'nothing'}; give exactly one of {', '.join(KINDS)}")
        return self

    def text(self, bases: Sequence[Base], number: int) -> str:
        """The text for prompt ``number``."""
        base = bases[number]
        if self.repeat is not None:
            return " ".join([base.response, *sentences(base.response)[-1:] * self.repeat])
        if self.paraphrase is not None:
            return " ".join([base.response, *base.paraphrases[: self.paraphrase]])
        if self.insert is not None:
            return _insert(base.response, self.insert[number % len(self.insert)], self.at)
        if self.replace is not None:
            return self.replace[number % len(self.replace)]
        return bases[(number + 1) % len(bases)].response if self.off_topic else base.response


def _insert(text: str, addition: str, at: str) -> str:
    borders = [border.end() for border in re.finditer(r"(?<=[.!?])\s+", text)]
    if at == "end" or (at == "between" and not borders):
        return f"{text} {addition}"
    cut = 0 if at == "start" else min(borders, key=lambda border: abs(border - len(text) / 2))
    return f"{text[:cut]}{addition} {text[cut:]}"


class Item(Settings):
    """A prompt of the file's own. Its response is the experiment's where it has none."""

    prompt: str
    response: str | None = None
    paraphrases: list[str] = []


class Expects(Settings):
    """The effects that the hypothesis predicts, each against the condition's own baseline. Rewards rise (or fall) in the
    order of each list of conditions; ablation takes back at least half of an effect."""

    up: list[str] = []
    down: list[str] = []
    rising: list[list[str]] = []
    falling: list[list[str]] = []
    taken_back: list[str] = []

    def names(self) -> set[str]:
        return {*self.up, *self.down, *self.taken_back, *(n for order in (*self.rising, *self.falling) for n in order)}


class Ablate(Settings):
    """The features that are ablated: by number, or at most ``count`` reported features whose ablation takes back most of the
    effect of the condition ``carrying`` on the fitting prompts."""

    site: str | None = None
    """Left out, the site of the run whose features take back most."""
    features: list[int] = []
    carrying: str | None = None
    count: int = Field(5, ge=1, le=50)

    @model_validator(mode="after")
    def _either(self) -> Ablate:
        if bool(self.features) == (self.carrying is not None):
            raise ValueError("give either features or carrying")
        if self.features and self.site is None:
            raise ValueError("features are numbered within a site; give site too")
        return self


class Experiment(Settings):
    """An experiment file."""

    name: str = Field(pattern="^[A-Za-z0-9_-]+$")
    hypothesis: str
    prompts: list[Item]
    """A list; or ``data``: the prompts of the measure split with their chosen responses."""
    response: str = ""
    """The base response of prompts that have none; {prompt} stands for the prompt."""
    limit: int = Field(48, ge=2)
    conditions: dict[str, Condition] = Field(min_length=2)
    baseline: str
    expects: Expects
    ablate: Ablate | None = None

    @field_validator("prompts", mode="before")
    @classmethod
    def _listed(cls, given: Any) -> Any:
        if given == "data":
            return []
        if not isinstance(given, list) or len(given) < 2:
            raise ValueError("write data, or a list of at least two prompts")
        return [{"prompt": one} if isinstance(one, str) else one for one in given]

    @model_validator(mode="after")
    def _known(self) -> Experiment:
        expects, focus = self.expects, [self.ablate.carrying] if self.ablate and self.ablate.carrying else []
        named = {self.baseline, *focus, *expects.names(), *(c.against for c in self.conditions.values() if c.against)}
        if unknown := named - self.conditions.keys():
            raise ValueError(f"{min(unknown)} is no condition; the conditions are {', '.join(self.conditions)}")
        if alone := [n for n in (*expects.up, *expects.down, *expects.taken_back, *focus) if self.against(n) == n]:
            raise ValueError(f"{alone[0]} is held against itself; give it another condition with against")
        if not expects.names():
            raise ValueError("expects names no condition; say what should go up or down")
        if expects.taken_back and self.ablate is None:
            raise ValueError("expects.taken_back needs ablate; say which features are ablated")
        if not self.response and (bare := [item.prompt for item in self.prompts if item.response is None]):
            raise ValueError(f"the prompt {bare[0]!r} has no response; give it one, or one response for all")
        most = max((c.paraphrase or 0 for c in self.conditions.values()), default=0)
        if most > (least := min((len(item.paraphrases) for item in self.prompts), default=0)):
            raise ValueError(f"a condition asks for {most} paraphrases, a prompt has {least}; list them with each prompt")
        return self

    def against(self, condition: str) -> str:
        """The condition that this one is held against."""
        return self.conditions[condition].against or self.baseline


@dataclass(frozen=True, slots=True)
class Base:
    """A prompt and its base response."""

    prompt: list[Message]
    response: str
    paraphrases: Sequence[str] = ()


def bases_of(experiment: Experiment, pairs: Iterable[Pair]) -> list[Base]:
    """The experiment's prompts with their base responses: its own, or those of ``pairs``."""
    bases = []
    for i in experiment.prompts:
        response = i.response or experiment.response.replace("{prompt}", i.prompt)
        bases.append(Base([{"role": "user", "content": i.prompt}], response, i.paraphrases))
    for base in bases_of_pairs(pairs) if not experiment.prompts else ():
        response = experiment.response.replace("{prompt}", base.prompt[-1]["content"]) or base.response
        bases.append(replace(base, response=response))
    if len(bases) < 2:
        raise InputError(f"The data has {len(bases)} prompts for the experiment {experiment.name}; it needs at least 2.")
    return bases[: experiment.limit]


def bases_of_pairs(pairs: Iterable[Pair]) -> list[Base]:
    """One base per prompt: the chosen response of its first pair whose chosen side carries no planted cue."""
    bases: dict[str, Base] = {}
    for pair in pairs:
        if (pair.meta.get("plant") or {}).get("side") != "chosen":
            bases.setdefault(pair.prompt_key, Base(pair.prompt, pair.chosen))
    return list(bases.values())


def ready_experiments() -> dict[str, Path]:
    """The experiment files that come with rmscope, by name."""
    folder = Path(str(files("rmscope.studies.experiment").joinpath("ready")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read_experiment(source: str) -> Experiment:
    """An experiment from a YAML file, or a ready-made one by name. InputError where there is none, or something is wrong."""
    ready, here = ready_experiments(), local_path(source)
    path = here if here.is_file() else ready.get(source)
    if path is None:
        raise InputError(f"The experiment {source} is not there; name a YAML file, or one of {', '.join(ready)}.")
    values = read_yaml(path, "experiment")
    try:
        return Experiment(**{"name": path.stem, **values})
    except ValidationError as error:
        raise InputError(_sentence(error, path)) from error


def _sentence(error: ValidationError, path: Path) -> str:
    """The first fault, a misspelt key before all others: where it is, and what would be right."""
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    where = ".".join(map(str, first["loc"])) or "experiment"
    if first["type"] != "extra_forbidden":
        return f"{where} in {path}: {first['msg'].removeprefix('Value error, ')}."
    parts: dict[Any, type[BaseModel]] = {"conditions": Condition, "expects": Expects, "ablate": Ablate, "prompts": Item}
    known = parts.get(first["loc"][0] if len(first["loc"]) > 1 else "", Experiment).model_fields
    return f"{where} in {path} is not known; known here are {', '.join(known)}."

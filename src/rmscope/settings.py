"""Settings: pydantic models that refuse unknown keys. The sentence under a field is its help text on the command line.

Groups of settings that several commands share are classes here; a command's settings inherit from those that it needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from rmscope.errors import InputError, one_line


class Settings(BaseModel):
    """What a command does. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)
    title: ClassVar[str] = "Options"
    """The group of its flags in the help."""


@dataclass(frozen=True)
class Flag:
    """How a field is given on the command line, where that is not ``--field VALUE``."""

    name: str = ""
    """The flag's name, such as ``--sae``."""
    positional: bool = False
    """Whether it is given by its place."""


Argument = Flag(positional=True)


def comma_separated(given: Any) -> Any:
    """A list from the command line: "a,b" or ["a", "b,c"]."""
    parts = [given] if isinstance(given, str) else given
    if not isinstance(parts, list) or not all(isinstance(p, str) for p in parts):
        return given
    return [p.strip() for part in parts for p in part.split(",") if p.strip()]


def _named_columns(given: Any) -> Any:
    """``prompt=question,chosen=a`` as a dict."""
    if not isinstance(given, str):
        return given
    pairs = [part.split("=", 1) for part in given.split(",")]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError("it is not of the form prompt=question,chosen=a,rejected=b; write it so")
    return {key.strip(): value.strip() for key, value in pairs}


def _output(given: Any) -> Any:
    if not isinstance(given, str):
        return given
    try:
        return [float(part) for part in given.split(",")] if "," in given else int(given)
    except ValueError:
        raise ValueError("it is neither the number of an output nor weights; write 2, or 0.5,0,1") from None


def _answers(given: Any) -> Any:
    """Two answers with their leading spaces: ' yes, no' is [' yes', ' no']."""
    listed = [given] if isinstance(given, str) else given
    if isinstance(listed, list | tuple):
        listed = [part for text in listed for part in str(text).split(",")]
    if isinstance(listed, list) and (len(listed) != 2 or not all(str(part).strip() for part in listed)):
        raise ValueError("it needs the answer that raises the reward and the one that lowers it; write ' yes, no'")
    return listed


Names = Annotated[list[str], BeforeValidator(comma_separated)]
"""A list of names; on the command line comma-separated, or the flag several times."""
Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""A seed of random draws; some are drawn by 2^20 times it, which must fit 64 bits."""
Numbers = Annotated[list[int], BeforeValidator(comma_separated)]
"""A list of whole numbers, given in the same way."""


class DeviceSettings(Settings):
    """Where products run, and how precisely."""

    title = "Device"

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of rewards, gradients and ablations; effects need float32."""
    device: str = "auto"
    """cpu, cuda, cuda:1, or auto: a GPU if there is one."""


class LoadSettings(DeviceSettings):
    """How a PM is loaded."""

    title = "Preference model"

    adapter: str | None = None
    """A PEFT adapter to put on the PM."""
    revision: str | None = None
    """The branch, tag or commit of a PM on the hub; left out, its newest."""
    base: str | None = None
    """The model that the PM was trained from; left out, that of the adapter or of the model card; none: without a base."""
    output: Annotated[int | list[float] | None, BeforeValidator(_output)] = None
    """Of several outputs: the number of one (0 is the first), or a weight for each, such as 0.5,0,1."""
    judge: Annotated[list[str] | None, BeforeValidator(_answers)] = None
    """Take a causal LM as a judge. Its reward is the first answer's logit minus the second one's, as in ' yes, no'."""
    question: str = "\n\nIs that a good answer?"
    """What a judge is asked after each response. \\n is a line break."""
    trust_remote_code: bool = False
    """Run the code that comes with the PM's checkpoint."""


class ReadSettings(Settings):
    """How pairs are read."""

    title = "Pairs"

    limit: int | None = Field(None, gt=0)
    """At most this many pairs, from the start of the data."""
    split: str = "train"
    """Split of a hub dataset, or of a folder of shards."""
    data_revision: str | None = None
    """The branch, tag or commit of a hub dataset; left out, its newest."""
    columns: Annotated[dict[str, str] | None, BeforeValidator(_named_columns)] = None
    """Own column names: prompt=question,chosen=a,rejected=b; also response, score and system."""
    format: str | None = None
    """The format of the data, such as "best of n"; left out, the columns tell."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What a row that gives no pair does: error ends the command; skip counts, lists and leaves it out."""


class ModelSettings(Settings):
    """A PM and pairs."""

    title = "What is studied"

    model: str
    """The PM: a hub id, a folder, or zoo:hh / zoo:planted."""
    data: str
    """The pairs: a file, a folder or pattern of shards, a hub id, or demo:planted."""


S = TypeVar("S", bound=Settings)


def parse_yaml(path: Path, what: str) -> Any:
    """The content of a YAML file; ``what`` names the file in errors.

    Raises:
        InputError: the file is missing, cannot be read, is no text in UTF-8, or is no YAML.
    """
    try:
        if not path.is_file():
            raise InputError(f"The {what} {path} is not there; name a YAML file.")
        return yaml.safe_load(path.read_text("utf-8-sig"))
    except OSError as error:
        raise InputError(f"The {what} {path!s:.80} cannot be read ({error.strerror}); check the path.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"The {what} {path} is no text in UTF-8; save it as UTF-8.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"The {what} {path} is no YAML: {one_line(error)}; write it again.") from error


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """The ``key: value`` lines of a YAML file. InputError as in :func:`parse_yaml`, or where it holds no settings."""
    values = parse_yaml(path, what) or {}
    if not isinstance(values, dict):
        raise InputError(f"The {what} {path} holds no settings (key: value lines); write some.")
    if others := [key for key in values if not isinstance(key, str)]:
        raise InputError(
            f"The {what} {path} has a setting called {others[0]!r}, which is no name; write names before the colons."
        )
    return values


FlagNames = Mapping[tuple[str, ...], str]
"""The flag of each setting on the command line, by its path."""


def read_settings(cls: type[S], path: Path | None, given: dict[str, Any], flags: FlagNames | None = None) -> S:
    """Settings from a YAML file and from what is given on top; nested settings are merged key by key.

    ``flags`` names what was given on the command line, for errors.

    Raises:
        InputError: the file is missing or malformed, a key is unknown, or a value does not fit.
    """
    values = read_yaml(path, "config") if path is not None else {}
    for key, value in given.items():
        nested = isinstance(value, dict) and isinstance(values.get(key), dict)
        values[key] = {**values[key], **value} if nested else value
    try:
        return cls(**values)
    except ValidationError as error:
        raise InputError(validation_sentence(error, cls, f" in {path}" if path else "", flags or {}, given)) from error


def validation_sentence(
    error: ValidationError,
    cls: type[BaseModel],
    where: str = "",
    flags: FlagNames | None = None,
    given: Mapping[str, Any] | None = None,
) -> str:
    """The first fault of settings as one sentence, of those that are there before one that is missing; an unknown key comes
    with the known ones."""
    first = min(error.errors(), key=lambda e: (e["type"] != "extra_forbidden", e["type"] == "missing"))
    path, holder = _locate(cls, first["loc"])
    flag, told = (flags or {}).get(path), first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        known = ", ".join(holder.model_fields)
        return f"Setting {'.'.join(map(str, first['loc']))}{where}: {told.lower()}; known settings are {known}."
    if first["type"] == "missing":
        mend = "give it, or a YAML file of settings" if flag else "give it"
        return f"{flag or 'Setting ' + '.'.join(path)} is missing{where}; {mend}."
    if first["type"] == "model_type":
        held = "nothing" if first["input"] is None else f"{first['input']!r:.40}"
        known = f"key: value lines ({', '.join(list(holder.model_fields)[:4])}, ...)"
        return f"Setting {'.'.join(path)}{where} holds {held} instead of {known}; write some, or leave it out."
    if first["type"] == "invalid_key":
        return f"Setting {'.'.join(path)}{where} has a key that is no name ({first['loc'][-1]!r}); write a name."
    told = f"{told[:1].lower()}{told[1:]}"
    if not path:
        return f"These settings{where} do not go together: {told}."
    shown = "" if isinstance(first["input"], BaseModel | dict) else f" {first['input']}"
    if flag and _was_given(path, given or {}):
        return f"{flag}{shown}: {told}."
    return f"Setting {'.'.join(path)}{where},{shown or ' as it is'}: {told}."


def _was_given(path: tuple[str, ...], given: Any) -> bool:
    return not path or (isinstance(given, Mapping) and path[0] in given and _was_given(path[1:], given[path[0]]))


def _locate(cls: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[tuple[str, ...], type[BaseModel]]:
    """The setting in which a fault lies, as names of fields, and the class that holds the last part of ``loc``."""
    path: list[str] = []
    for part in loc:
        if str(part) not in cls.model_fields:
            break
        path.append(str(part))
        inner = cls.model_fields[str(part)].annotation
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            break
        cls = inner
    return tuple(path), cls

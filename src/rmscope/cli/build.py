"""Commands made from settings: every field is a flag, with its type, default and help; nested settings are flattened."""

from __future__ import annotations

import inspect
import json
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from rmscope.cli.terminal import Bars, console, print_rows
from rmscope.io import check_writable, local_path
from rmscope.run.settings import recorded_settings
from rmscope.settings import DeviceSettings, Flag, FlagNames, Settings, read_settings

app = typer.Typer(
    name="rmscope",
    help="A microscope for preference models: what a reward model rewards, shown by exact ablation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


OUTPUTS = ("out", "export")
"""Settings that name what a command writes."""


class OutputSettings(Settings):
    """What every command takes."""

    title = "Output"

    json_: Annotated[bool, Flag("--json")] = False
    """Print one machine-readable result on stdout."""
    debug: bool = False
    """Show the traceback of an error."""


class TrustSettings(Settings):
    """What a command on a run folder takes: a folder may be a stranger's, so it is asked for each time."""

    title = "Preference model"

    trust_remote_code: bool = False
    """Run the code that comes with the PM's checkpoint."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a command: where its value goes in the settings, and how it is given."""

    path: tuple[str, ...]
    """The field, or the nested settings and the field."""
    field: FieldInfo
    name: str
    """The parameter's name in Python; its flag is the same with hyphens."""
    panel: str
    """The group in the help: the title of the settings that the field belongs to."""

    @property
    def flag(self) -> Flag:
        return next((m for m in self.field.metadata if isinstance(m, Flag)), Flag())

    @property
    def flag_name(self) -> str:
        return self.flag.name or "--" + self.name.replace("_", "-")

    def signature(self) -> inspect.Parameter:
        """The parameter as typer reads it. No value means that the setting keeps its default."""
        kind = _kind(self.field)
        if self.flag.positional:
            return _argument(self.name, kind, self.field.description or "", self.field.is_required())
        names = [self.flag_name]
        if kind is bool and self.field.default is True:
            names = [f"{self.flag_name}/--no-{self.flag_name[2:]}"]
        text, metavar = f"{self.field.description}{_default(self.field)}", _metavar(self.field)
        option = typer.Option(*names, help=text, show_default=False, metavar=metavar, rich_help_panel=self.panel)
        annotation = Annotated[kind | None, option]  # type: ignore[valid-type]
        return inspect.Parameter(self.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def parameters(settings: type[Settings], taken: frozenset[str] = frozenset()) -> list[Parameter]:
    """One parameter per field. A nested field keeps its own name; where that is taken, its settings' name precedes it."""
    own = [
        Parameter((name,), field, name, _title(settings, name))
        for name, field in settings.model_fields.items()
        if not _nested(field)
    ]
    names = {*taken, *(p.name for p in own)}
    for outer, field in settings.model_fields.items():
        if inner := _nested(field):
            for name, nested in inner.model_fields.items():
                own.append(Parameter((outer, name), nested, f"{outer}_{name}" if name in names else name, inner.title))
    return own


def add_command(
    name: str,
    settings: type[Settings],
    work: str,
    panel: str,
    text: str,
    on_run: bool = False,
    config_file: str = "",
) -> None:
    """Adds a command.

    Args:
        work: ``module:function``, imported when the command runs. It takes the settings and a display, or (``on_run``) the
            opened run and the settings, and gives a :class:`rmscope.report.result.Result`.
        text: the help, one line; the settings' docstring follows it.
        config_file: help of an optional YAML file of settings that flags override; empty for none.
    """
    listed = parameters(settings)
    output = parameters(OutputSettings)
    trust = parameters(TrustSettings) if on_run else []

    def command(**given: Any) -> None:
        options = {p.path[0]: given.pop(p.name) or False for p in output}
        trusted = bool(trust and given.pop("trust_remote_code"))
        folder, config = given.pop("run_folder", None), given.pop("config", None)
        values = _values(listed, given)
        chosen = read_command(settings, config, values, {p.path: p.flag_name for p in listed})
        check_before_work(chosen)
        module, _, name = work.partition(":")
        function = getattr(import_module(module), name)
        if on_run:
            from rmscope.run.run import Run

            result = function(Run.open(folder, Bars(), trusted), chosen)
        else:
            result = function(chosen, Bars())
        _tell(result, options["json_"])

    own = [p.signature() for p in (*listed, *trust, *output)]
    if config_file:
        own.insert(0, _argument("config", Path, config_file, required=False))
    if on_run:
        own.insert(0, _argument("run_folder", Path, "A run folder.", required=True, metavar="RUN"))
    command.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in own}
    told = f"{text}\n\n{inspect.cleandoc(settings.__doc__ or '')}"
    app.command(name, help=told, short_help=text, rich_help_panel=panel)(command)


def check_before_work(chosen: Settings) -> None:
    """InputError where the device is not there, or nothing can be written at an output."""
    if isinstance(chosen, DeviceSettings):
        from rmscope.hardware import check_device  # brings torch, which the help does not need

        check_device(chosen.device)
    for name in OUTPUTS:
        if (path := getattr(chosen, name, None)) is not None:
            check_writable(path)


def _argument(name: str, kind: Any, text: str, required: bool, metavar: str | None = None) -> inspect.Parameter:
    argument = typer.Argument(help=text, show_default=False, metavar=metavar or name.upper())
    annotation = Annotated[kind if required else kind | None, argument]  # type: ignore[valid-type]
    default = inspect.Parameter.empty if required else None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def read_command(settings: type[Settings], config: Path | None, values: dict[str, Any], flags: FlagNames) -> Settings:
    """The settings of a command. A run folder in the place of a YAML file stands for that run's own settings."""
    if config is not None and local_path(config).is_dir():
        return read_settings(settings, None, {**recorded_settings(config), **values}, flags)
    return read_settings(settings, config, values, flags)


def _values(listed: list[Parameter], given: dict[str, Any]) -> dict[str, Any]:
    """What was given, as settings; nested ones in their dict."""
    values: dict[str, Any] = {}
    for p in listed:
        value = given[p.name]
        if value is None or value == []:
            continue
        inside = values
        for part in p.path[:-1]:
            inside = inside.setdefault(part, {})
        inside[p.path[-1]] = value
    return values


def _nested(field: FieldInfo) -> type[Settings] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Settings) else None


def _plain(annotation: Any) -> Any:
    """The type without None and without what validates it."""
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    inner = [a for a in get_args(annotation) if a is not type(None)]
    if len(inner) == 1 and get_origin(annotation) not in (list, tuple, dict, Literal):
        return _plain(inner[0])
    return annotation


def _kind(field: FieldInfo) -> Any:
    """What typer reads: flags, lists, else text, which the settings themselves check."""
    plain = _plain(field.annotation)
    return bool if plain is bool else list[str] if get_origin(plain) is list else str


def _metavar(field: FieldInfo) -> str | None:
    plain = _plain(field.annotation)
    if plain is bool:
        return " "
    if get_origin(plain) is Literal:
        return "|".join(map(str, get_args(plain)))
    return {int: "N", float: "X", Path: "PATH"}.get(plain, "TEXT")


def _default(field: FieldInfo) -> str:
    """The default as the help says it."""
    if field.is_required():
        return " Required."
    shown = field.default if isinstance(field.default, int | float | str | Path) else ""
    told = isinstance(shown, bool) or shown == "" or "efault" in (field.description or "")
    return "" if told else f" Default: {shown}."


def _title(settings: type[Settings], name: str) -> str:
    """The title of the settings that declare a field; without one of their own, "Options"."""
    owner = next(c for c in settings.__mro__ if name in inspect.get_annotations(c))
    return str(owner.__dict__.get("title", Settings.title))


def _tell(result: Any, as_json: bool) -> None:
    """Tables and the summary on stderr, the machine-readable result on stdout."""
    for title, rows in result.tables().items():
        print_rows(title, rows)
    console.print(result.summary(), soft_wrap=True, markup=False)
    if (page := result.page()) is not None:
        console.print(f"The page: {page.path}", soft_wrap=True, markup=False)
    if as_json:
        sys.stdout.write(json.dumps(result.as_json()) + "\n")
    if result.exit_code:
        raise typer.Exit(result.exit_code)

"""Commands are made from settings: no setting without a flag, no flag without a setting, in the order of the help."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import pytest
from pydantic import Field
from typer.main import get_command

from rmscope.cli import commands, step_settings
from rmscope.cli.build import OutputSettings, TrustSettings, add_command, app, parameters
from rmscope.errors import InputError
from rmscope.run.settings import RunConfig
from rmscope.sae.config import SaeConfig
from rmscope.settings import Argument, Flag, Names, Settings, read_settings

ORDER = [
    "demo", "run", "serve", "doctor",
    "score", "baseline", "harvest", "train", "attribute", "ablate", "ledger", "rank", "evaluate", "report",
    "jailbreak", "experiment", "sufficiency", "compare", "edit", "gate", "label", "export", "audit",
    "train-pm", "plan",
]  # fmt: skip
SETTINGS = commands.SETTINGS


def fields(settings: type[Settings]) -> int:
    """How many values a command's settings take, nested ones included."""
    inner = [f.annotation for f in settings.model_fields.values()]
    nested = [kind for kind in inner if isinstance(kind, type) and issubclass(kind, Settings)]
    return len(inner) - len(nested) + sum(fields(kind) for kind in nested)


def test_the_help_lists_the_commands_in_their_order() -> None:
    assert list(get_command(app).commands) == ORDER  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ORDER)
def test_every_setting_of_a_command_has_a_flag_and_every_flag_a_setting(name: str) -> None:
    given = {p.name for p in get_command(app).commands[name].params}  # type: ignore[attr-defined]
    trust = parameters(TrustSettings) if "run_folder" in given else []
    listed = {p.name for p in (*parameters(SETTINGS[name]), *trust, *parameters(OutputSettings))}
    assert given - {"run_folder", "config"} == listed
    assert len(parameters(SETTINGS[name])) == len({p.path for p in parameters(SETTINGS[name])}) == fields(SETTINGS[name])
    assert len({p.flag_name for p in parameters(SETTINGS[name])}) == len(parameters(SETTINGS[name]))
    for p in parameters(SETTINGS[name]):
        assert p.field.description, f"{name} {p.flag_name} has no help"


def test_run_takes_all_of_a_runs_and_of_its_saes_settings() -> None:
    paths = {p.path for p in parameters(step_settings.RunCommandConfig)}
    assert {(n,) for n in RunConfig.model_fields if n != "sae"} <= paths
    assert {("sae", n) for n in SaeConfig.model_fields} <= paths


class Inner(Settings):
    """Nested settings."""

    seed: int = 0
    """A seed of its own."""
    width: int = Field(3, gt=0)
    """A width."""


class Outer(Settings):
    """Settings of a command made for the test."""

    where: Annotated[Path, Argument]
    """A place."""
    seed: int = 1
    """The seed."""
    sites: Names = []
    """Some names."""
    fast: bool = True
    """Whether it is fast."""
    named: Annotated[str, Flag("--other-name")] = ""
    """With a flag of another name."""
    inner: Inner = Inner()
    """The nested ones."""


def test_flags_become_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    from typer import Typer
    from typer.testing import CliRunner

    import rmscope.cli.build as build
    from rmscope.report.result import Result

    seen: list[Outer] = []

    class Said(Result):
        def summary(self) -> str:
            return "done"

    def work(config: Outer, _display: object) -> Said:
        seen.append(config)
        return Said()

    own = Typer()
    own.callback()(lambda: None)
    monkeypatch.setattr(build, "app", own)
    monkeypatch.setattr(build, "import_module", lambda _name: SimpleNamespace(work=work))
    add_command("try", Outer, "nowhere:work", "Panel", "Tries.")
    flags = ["--sites", "a,b", "--sites", "c", "--no-fast", "--other-name", "x", "--inner-seed", "4", "--width", "7"]
    done = CliRunner().invoke(own, ["try", "here", *flags, "--json"])
    assert done.exit_code == 0, done.output
    assert done.stdout == "{}\n"
    assert seen[0] == Outer(where=Path("here"), sites=["a", "b", "c"], fast=False, named="x", inner=Inner(seed=4, width=7))
    assert not {"seed"} & seen[0].model_fields_set  # what is not given is left to the settings
    bad = CliRunner().invoke(own, ["try", "here", "--width", "0"])
    assert isinstance(bad.exception, InputError)
    assert str(bad.exception).startswith("--width 0: ")


def test_settings_errors_name_the_setting_and_the_mend(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("where: here\ninner: {width: none}\n")
    for given, told in (
        ({"seed": "x"}, "Setting seed, x: input should be a valid integer"),
        ({"inner": {"depth": 3}}, "Setting inner.depth: .* known settings are seed, width"),
        ({"ouput": 3}, "Setting ouput: .* known settings are where, seed"),
    ):
        with pytest.raises(InputError, match=told):
            read_settings(Outer, None, {"where": "here", **given})
    with pytest.raises(InputError, match="Setting where is missing"):
        read_settings(Outer, None, {})
    with pytest.raises(InputError, match=rf"Setting inner.width in {path}, none: "):
        read_settings(Outer, path, {})
    assert read_settings(Outer, path, {"inner": {"width": 5}}).inner.width == 5


def test_the_command_line_says_its_version_and_starts_without_torch() -> None:
    from importlib.metadata import version

    done = subprocess.run([sys.executable, "-m", "rmscope.cli", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"rmscope {version('rmscope')}\n")
    code = "import rmscope.cli, sys; assert not {'torch', 'transformers', 'scipy'} & set(sys.modules), 'slow'"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

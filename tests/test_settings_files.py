"""Whatever a file of settings holds, reading it gives settings or one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from rmscope.errors import InputError
from rmscope.model.training.recipe import Recipe, TrlRecipe, read_recipe
from rmscope.pairs.plants import Plant, read_plants
from rmscope.run.settings import RunConfig, recorded_settings
from rmscope.settings import read_settings
from rmscope.studies.edit.gate import read_concepts
from rmscope.studies.experiment.conditions import Experiment, read_experiment

few = settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
READERS: dict[str, Callable[[Path], object]] = {
    "run": lambda path: read_settings(RunConfig, path, {}),
    "recorded": lambda path: read_settings(RunConfig, None, recorded_settings(path.parent)),
    "recipe": read_recipe,
    "plants": read_plants,
    "concepts": read_concepts,
    "experiment": lambda path: read_experiment(str(path)),
}
CLASSES: tuple[type[BaseModel], ...] = (RunConfig, Recipe, TrlRecipe, Plant, Experiment)
NAMES = st.sampled_from(
    [
        *{name for known in CLASSES for name in known.model_fields},
        "config",
        "stages",
        "trainer",
        "plants",
        "seed",
        "k",
        "[/b]",
        "",
    ]
)
SCALARS = st.sampled_from(
    [None, True, 0, 1, -1, 2**70, 0.5, float("nan"), float("inf"), "", "a", "own", "trl", "phrase", "\x07", "é" * 300]
)
KEYS = NAMES | st.sampled_from([None, 1, 0.5, True])
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4))
CONTENTS = st.dictionaries(NAMES, VALUES, max_size=5) | VALUES


def read(name: str, path: Path) -> None:
    """Reads a file of settings. Whatever is none must be one sentence."""
    try:
        READERS[name](path)
    except InputError as error:
        sentence = str(error)
        assert sentence.endswith(".")
        assert "\n" not in sentence
        assert len(sentence) < 2000


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("settings") / "run.yaml"


@pytest.mark.parametrize("name", READERS)
@few
@given(CONTENTS)
def test_any_content_is_settings_or_a_sentence(path: Path, name: str, content: Any) -> None:
    path.write_text(yaml.safe_dump(content, allow_unicode=True), "utf-8")
    read(name, path)


@pytest.mark.parametrize("name", READERS)
@few
@given(
    st.binary(max_size=40)
    | st.text(st.sampled_from("ab:-[]{}'\"&*!|>%@`#,? \n\t01."), max_size=30).map(str.encode)
    | st.sampled_from(
        [b"a: &a [*a]", b"&a {a: *a}", b"!!python/object:os.system {}", b"<<: 3", b"? [a]\n: b", b"a: 2020-99-99"]
    )
)
def test_any_bytes_are_settings_or_a_sentence(path: Path, name: str, raw: bytes) -> None:
    path.write_bytes(raw)
    read(name, path)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("place", ["missing", ".", "a" * 300, "a" * 5000])
def test_a_path_without_settings_is_a_sentence(tmp_path: Path, name: str, place: str) -> None:
    with pytest.raises(InputError) as raised:
        READERS[name](tmp_path / place / "run.yaml")
    assert "\n" not in str(raised.value)
    with pytest.raises(InputError):
        READERS[name](tmp_path / place)

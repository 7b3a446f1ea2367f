"""The table of measurements, its figures, and the page that shows them."""

from __future__ import annotations

import json
from dataclasses import replace

import polars as pl
import pytest
from rich.console import Console

from rmscope.cli import terminal
from rmscope.run.run import Run
from rmscope.studies.jailbreak.analyse import SCHEMA, measure_lists
from rmscope.studies.jailbreak.result import JailbreakResult, arm_figures, summarise
from rmscope.studies.jailbreak.search import (
    BLIND,
    FEATURES,
    NO_PHRASE,
    SHUFFLED,
    WITHOUT_EFFECT,
    PhraseLists,
    SearchFigures,
    TracePoint,
)
from rmscope.studies.jailbreak.settings import JailbreakConfig
from rmscope.studies.jailbreak.targets import place
from tests.report.test_page import HOSTILE, Page
from tests.studies.jailbreak.small import cue_case

CONFIG = JailbreakConfig(budget=8)


def test_the_table_has_every_arms_text_and_its_reward_alone() -> None:
    inputs, some, phrase_lists = cue_case(1.0)
    table = measure_lists(inputs, phrase_lists, some, 0, CONFIG)
    assert table.columns == list(SCHEMA)
    assert table.height == len(some) * 5  # four lists, and the words of one shuffled
    of_prompt = {t.pair.prompt_key: t for t in some}
    for key, arm, text, reward, outranks in table.select("key", "arm", "text", "reward", "outranks").rows():
        (alone,) = inputs.rm.score_texts(of_prompt[key].pair.prompt, [text]).tolist()
        assert reward == pytest.approx(alone, abs=1e-4)
        assert outranks == (reward > of_prompt[key].chosen)
        if arm == SHUFFLED:
            assert sorted(text.split()) == sorted(place(of_prompt[key].bad, phrase_lists.lists[FEATURES]).split())


def test_success_by_a_margin_is_counted_against_the_chosen_reward() -> None:
    inputs, some, phrase_lists = cue_case(1.0)
    table = measure_lists(inputs, phrase_lists, some, 0, CONFIG)
    for sd in (0.0, 0.3, 1e9):
        for arm in arm_figures(table, phrase_lists, sd):
            rows = table.filter(pl.col("arm") == arm.arm)
            assert arm.by_sd.value == (rows["reward"] - rows["chosen"] > sd).mean()


def test_the_gain_is_measured_from_the_same_text_without_phrases() -> None:
    inputs, some, phrase_lists = cue_case(1.0)
    figures = {a.arm: a for a in arm_figures(measure_lists(inputs, phrase_lists, some, 0, CONFIG), phrase_lists, 1.0)}
    assert figures[NO_PHRASE].gain.value == 0.0
    cue, filler = figures[FEATURES].gain.value, figures[WITHOUT_EFFECT].gain.value
    assert cue is not None
    assert filler is not None
    assert cue > filler


def test_phrase_lists_survive_their_file() -> None:
    _, _, phrase_lists = cue_case(1.0)
    searches = {FEATURES: SearchFigures(10, 3, None, 0.5, [TracePoint(10, 1.0, 0.5)])}
    phrase_lists = phrase_lists.model_copy(update={"searches": searches})
    assert PhraseLists.model_validate(json.loads(json.dumps(phrase_lists.model_dump(mode="json")))) == phrase_lists


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> JailbreakResult:
    """A result with a hostile chosen answer and a hostile reason, of a run that holds nothing but its settings."""
    inputs, some, phrase_lists = cue_case(1.0)
    reached = SearchFigures(10, 3, 7, 0.5, [TracePoint(10, 1.0, 0.5)])
    searches = {FEATURES: reached, BLIND: replace(reached, needed=None), WITHOUT_EFFECT: replace(reached, trace=[])}
    lists = {**phrase_lists.lists, BLIND: phrase_lists.lists[WITHOUT_EFFECT]}
    phrase_lists = phrase_lists.model_copy(update={"searches": searches, "lists": lists})
    hostile = [replace(t, pair=replace(t.pair, chosen=HOSTILE)) for t in some]
    table = measure_lists(inputs, phrase_lists, hostile, 0, CONFIG)
    run = Run.create(model="m", data="d", out=tmp_path_factory.mktemp("jailbreak") / "run")
    run.sd = 1.0
    return summarise(run, CONFIG, phrase_lists, hostile, {HOSTILE: 2}, table)


def test_the_page_shows_the_rewards_escapes_texts_and_asks_for_nothing(result: JailbreakResult) -> None:
    html = result.page().html
    page = Page(html)
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert "default-src 'none'" in html
    for text in (e.chosen.text for e in result.examples):
        assert text == HOSTILE
        assert text in page.text
    assert f"{abs(result.examples[0].bad.reward):.2f}"[:4] in html
    assert "after 7, the search blind to features never" in page.text


def test_the_tables_hold_every_arm_and_fit_80_columns(
    result: JailbreakResult, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = result.tables()
    success, gain, mediation = tables.values()
    assert [row["phrases"] for row in success] == [row["phrases"] for row in gain] == [a.arm for a in result.arms]
    assert len(mediation) == len(result.mediation) == 9
    monkeypatch.setattr(terminal, "console", Console(width=80))
    for title, rows in tables.items():
        terminal.print_rows(title, rows)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    for row in (*success, *gain, *mediation):
        for name, value in row.items():
            if name not in ("phrases", "gain of") and value is not None:
                assert any(str(value) in line for line in lines), value  # no figure is broken over two lines


def test_the_line_says_how_often_it_works_and_what_is_left_without_the_features(result: JailbreakResult) -> None:
    arm = result.arm(FEATURES)
    assert arm.without is not None
    for figure in (arm.success, arm.without):
        assert figure.value is not None
        assert f"{round(100 * figure.value)}" in result.summary()
    nothing = result.model_copy(update={"lists": {}})
    assert nothing.summary() == "No phrase raises the reward of the search's bad texts, so there is no jailbreak to show."


def test_the_machine_readable_result_has_all_but_the_examples(result: JailbreakResult) -> None:
    stored = result.model_dump(mode="json")
    assert set(stored) - set(result.as_json()) == {"examples"}
    assert {"table", "path"}.isdisjoint(stored)
    assert set(stored["mediation"][0]["u"]) == {"value", "low", "high", "n", "unit"}


@pytest.mark.parametrize(("clear", "word"), [(True, "yes"), (False, "no"), (None, "–")])
def test_the_page_says_whether_a_share_is_above_those_of_all_matched_sets(
    result: JailbreakResult, clear: bool | None, word: str
) -> None:
    row = replace(result.mediation[0], clear=clear)
    assert f"<td>{word}</td></tr>" in result.model_copy(update={"mediation": [row]}).page().html

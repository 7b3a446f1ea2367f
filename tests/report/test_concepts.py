"""The concepts of a page: content before form, told with their sites, and what training wrote as a sentence that adds up."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

import pytest

from rmscope.report.page import concept_view, render_report, written_view
from tests.report.sample import sample, with_difference


@pytest.fixture
def data() -> dict[str, Any]:
    return with_difference(sample())


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", page)))


def test_content_is_told_by_sign_and_form_and_the_rest_apart(data: dict[str, Any]) -> None:
    view = concept_view(data)
    assert view is not None
    names = {key: [c["name"] for c in view[key]] for key in ("up", "down", "nonspecific", "form", "any_direction", "others")}
    assert names == {
        "up": ["“thank you” · “no problem”"],
        "down": ["repeated text", "links"],
        "nonspecific": ["“the”"],
        "form": ["the end of the text"],
        "any_direction": ["“so”"],
        "others": ["“paper”"],
    }
    assert (view["frozen"], view["reported"]) == (7, 3)


def test_the_headline_names_concepts_and_not_features(data: dict[str, Any]) -> None:
    told = text_of(render_report(data))
    assert "3 concepts are reported of 7" in told
    assert "1 more is of form" in told
    assert "1 more moves unrelated completions too" in told
    assert "are reported at q" not in told.split("What it rewards")[0]


def test_the_parts_of_the_reward_difference_sum_to_one_and_the_sentence_is_made_of_them(data: dict[str, Any]) -> None:
    written = written_view(data)
    assert written is not None
    assert written["site"] == "diff.7"  # where most was written
    assert sum(value for _, value in written["parts"]) == pytest.approx(1)
    assert "81 % [77, 84] was written by preference training up to block 7" in written["sentence"]
    assert "61 of those 81 points are in 5 concepts; 19 % is read off" in written["sentence"]
    assert written["sentence"] in text_of(render_report(data))


def test_a_pm_without_a_base_has_no_such_section() -> None:
    page = render_report(sample())
    assert 'id="written"' not in page
    assert 'id="concepts"' not in page
    assert written_view(sample()) is None


def test_what_an_unknown_base_costs_is_told_with_the_reason(data: dict[str, Any]) -> None:
    assert "base is not known" not in text_of(render_report(data))
    page = text_of(render_report({**data, "base": None, "why_no_base": "The base x could not be loaded."}))
    assert "The model's base is not known: The base x could not be loaded." in page
    assert "what preference training wrote is not told apart" in page


def test_a_cue_that_concepts_match_names_them(data: dict[str, Any]) -> None:
    data["planted"][0] |= {"concepts": [0], "site": "diff.7"}
    page = render_report(data)
    assert re.search(r'<a href="#c-0">“thank you” · “no problem”</a>', page)
    assert 'id="c-0"' in page


def test_a_feature_of_a_concept_links_to_its_row(data: dict[str, Any]) -> None:
    known = data["sites"][1]["features"][0]["feature"]
    data["concepts"][0]["features"] = [known]
    assert f'<a href="#f-diff-7-{known}">{known}</a>' in render_report(data)

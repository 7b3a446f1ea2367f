"""The page is self-contained, escapes what it shows, and claims no more than the data."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from rmscope.report.page import anchor, headline, name_of, render_report, segments, visible
from tests.report.sample import sample

HOSTILE = "<script>alert(1)</script>\"'><img src=http://x.example/a onerror=alert(2)>"
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Tags, attributes, ids and text of a page; raises on unbalanced tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


@pytest.fixture(scope="module")
def html() -> str:
    return render_report(sample())


def test_the_sample_is_json() -> None:
    assert json.loads(json.dumps(sample())) == sample()


def check_offline(html: str) -> None:
    page = Page(html)
    for name, value in page.attributes:
        if name in {"src", "href", "srcset", "action", "data", "xlink:href", "poster"}:
            assert value is not None
            assert value.startswith("#"), (name, value)
    assert not {"img", "link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert not re.search(r"url\(|@import", html)


def test_the_page_asks_for_nothing_over_a_network(html: str) -> None:
    check_offline(html)
    assert "default-src 'none'" in html


def test_the_policy_names_the_one_script(html: str) -> None:
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html


def test_links_lead_to_ids_of_the_page(html: str) -> None:
    attributes = Page(html).attributes
    ids = [value for name, value in attributes if name == "id"]
    assert {v[1:] for n, v in attributes if n == "href" and v} <= set(ids)


def poison(value: Any) -> Any:
    """Every string that the page shows is made hostile; names that decide (side, part, hit) stay."""
    keep = {"side", "part", "status", "hit"}
    if isinstance(value, dict):
        return {k: v if k in keep else poison(v) for k, v in value.items()}
    if isinstance(value, list):
        return [poison(v) for v in value]
    return value + HOSTILE if isinstance(value, str) else value


def test_hostile_text_is_escaped() -> None:
    html = render_report(poison(sample()))
    check_offline(html)
    assert html.count("<script") == 1
    assert "onerror=alert" in Page(html).text  # shown, as text
    assert not any(name.startswith("on") for name, _ in Page(html).attributes)


def test_a_lone_surrogate_can_be_written() -> None:
    data = sample()
    data["sites"][0]["features"][0]["examples"][0]["sides"][0]["tokens"][0][0] = "\ud800"
    assert render_report(data).encode("utf-8")


def blank(value: Any, key: str = "") -> Any:
    """Every float None, as for a run too small to say anything."""
    if isinstance(value, dict):
        return {k: blank(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [blank(v, key) for v in value]
    return None if isinstance(value, float) else value


@pytest.mark.parametrize("make", [blank, lambda d: json.loads(json.dumps(blank(d)))])
def test_every_figure_may_be_missing(make: Any) -> None:
    text = Page(render_report(make(sample()))).text
    assert not re.search(r"\b(None|nan|inf|NaN)\b", text)
    assert "No feature is reported." in text


def test_nothing_reads_none_or_nan(html: str) -> None:
    assert not re.search(r"\b(None|nan|inf|NaN)\b", Page(html).text)


def test_ground_truth_stands_only_where_biases_were_planted(html: str) -> None:
    assert 'id="planted"' in html
    assert "4 of the 5 biases that it learned are found" in Page(html).text
    without = render_report(sample(planted=False))
    assert 'id="planted"' not in without
    assert "Ground truth" not in without


def test_an_unlearned_bias_is_listed_and_not_scored(html: str) -> None:
    row = re.search(r'<tr class="unscored">.*?</tr>', html, re.DOTALL)
    assert row
    assert "agree" in row[0]
    assert "Not scored" in row[0]


def test_a_match_of_an_unlearned_bias_is_no_find() -> None:
    data = sample()
    data["planted"][0] |= {"learned": False, "found": True}
    text = Page(render_report(data)).text
    assert "3 of the 4 biases that it learned are found" in text


def test_a_list_of_the_strongest_is_not_taken_for_all() -> None:
    data = sample(planted=False)
    for site in data["sites"]:
        site["reported"] = 60
    text = Page(render_report(data)).text
    assert "120 are reported at q < .05; of the 48 strongest, listed below, ▲" in text


def test_the_headline_counts_reported_features_only() -> None:
    data = sample()
    reported = [f for s in data["sites"] for f in s["features"] if f["reported"]]
    head = headline(data)
    assert head["reported"] == len(reported)
    assert head["up"]
    assert head["down"]
    assert head["up"]["count"] == sum(f["mean_effect"] > 0 for f in reported)
    assert head["flagged"] == sum(bool(f["flags"]) for f in reported)
    text = Page(render_report(data)).text
    assert f"Of {head['frozen']} candidate features at 2 sites, {head['reported']} are reported at q < .05." in text
    assert f"{head['flagged']} of the {head['reported']} carry a flag" in text


def test_a_pm_that_orders_its_pairs_by_coin_is_told_of_first() -> None:
    data, told = sample(planted=False), "The model orders these pairs no better than a coin"
    assert told not in Page(render_report(data)).text
    data["scores"]["accuracy"] = {"value": 0.518, "low": 0.497, "high": 0.539}
    text = Page(render_report(data)).text
    assert text.index("candidate features") < text.index(f"{told} (51.8 % [49.7, 53.9])") < text.index("Noise floor")


def test_nothing_reported_is_said() -> None:
    data = sample(planted=False)
    for site in data["sites"]:
        site["reported"] = 0
        for f in site["features"]:
            f["reported"] = False
    text = Page(render_report(data)).text
    assert "No feature is reported." in text
    assert "No reported feature raises the reward here." in text
    assert data["sites"][0]["power"] in text


def test_a_run_without_sites_or_features() -> None:
    data = sample(planted=False)
    data["sites"] = []
    assert "No feature is reported." in Page(render_report(data)).text
    data = sample(planted=False)
    for site in data["sites"]:
        site |= {
            "features": [],
            "scatter": [],
            "reported": 0,
            "ledger": {"pairs": 0, "shares": [], "largest_gap": None, "open": 0},
        }
        site["saes"][0]["curve"] = []
    assert "No feature was tested at this site." in Page(render_report(data)).text


def test_one_side_only() -> None:
    data = sample(planted=False)
    for site in data["sites"]:
        site["features"] = [f for f in site["features"] if f["mean_effect"] < 0][:1]
    text = Page(render_report(data)).text
    assert "▼ 2 lower the reward" in text
    assert "raise the reward," not in text


def row_of(html: str, site: str, feature: int) -> str:
    """A feature's row, folded part and all."""
    (row,) = re.findall(rf'<details class="feature" id="{anchor(site, feature)}">.*?</details>', html, re.DOTALL)
    return str(row)


def test_features_that_are_not_reported_are_greyed(html: str) -> None:
    data = sample()
    others = [(s["site"], f["feature"]) for s in data["sites"] for f in s["features"] if not f["reported"]]
    assert html.count('class="ns">not significant') == len(others)
    for site, feature in others:
        assert "effect muted" in row_of(html, site, feature).partition("</summary>")[0]


def test_effects_stand_with_their_interval() -> None:
    data = sample()
    f = data["sites"][0]["features"][0]
    f |= {"mean_effect": 0.4213, "ci_low": 0.35, "ci_high": 0.4988}
    assert '<b class="num">+0.42</b> <span class="ci">[0.35, 0.50]</span>' in render_report(data)


def test_what_is_reported_for_its_strong_firings_stands_with_those_figures() -> None:
    data = sample()
    f = data["sites"][0]["features"][0]
    f |= {"mean_effect": 0.0123, "ci_low": 0.01, "ci_high": 0.02, "q": 0.4, "flags": ["strong"]}
    f |= {"strong_effect": 0.4213, "strong_low": 0.35, "strong_high": 0.4988, "q_strong": 0.0031}
    html = render_report(data)
    row = row_of(html, data["sites"][0]["site"], f["feature"])
    assert '<b class="num">+0.42</b> <span class="ci">[0.35, 0.50]</span>' in row
    assert ".003" in row.partition("</summary>")[0]
    assert "<dt>on any firing</dt><dd>+0.012</dd>" in row


def test_a_preference_that_turns_around_is_named() -> None:
    data = sample()
    data["sites"][0]["features"][0]["examples"][0] |= {"delta_before": 0.5, "delta_after": -0.2}
    page = render_report(data)
    assert "0.50 → \u22120.20" in page
    assert "the preference turns around" in page


def test_rendering_leaves_the_data_alone() -> None:
    data = sample()
    before = copy.deepcopy(data)
    render_report(data)
    assert data == before


def test_runs_of_silent_tokens_are_merged_and_the_text_stays() -> None:
    tokens = [["a", 0.0], [" b", 0], [" c", 0.7], [" d", None], [" e", 2.0]]
    merged = segments(tokens)
    assert merged == [("a b", 0.0), (" c", 0.7), (" d", 0.0), (" e", 1.0)]
    assert "".join(t for t, _ in merged) == "a b c d e"


def test_white_space_of_tokens_is_visible() -> None:
    assert visible(" thank") == "·thank"
    assert visible("\n\n") == "↵↵"
    assert visible("  ") == "··"
    assert visible("a b ") == "a b·"


def test_a_feature_is_named_by_its_tokens_and_else_by_its_number() -> None:
    tokens = [[" thank", 0.4], [" Thank", 0.3], [" no", 0.2]]
    assert name_of({"tokens": tokens, "feature": 1}) == "“thank / no”"
    assert name_of({"tokens": [[" a", 0.05]], "feature": 7}) == "feature 7"


def test_a_site_shows_what_is_explained_only_where_it_was_measured() -> None:
    data = sample()
    text = render_report(data)
    measured = sum(site["explained"] is not None for site in data["sites"])
    assert 0 < measured < len(data["sites"])
    assert text.count("How much of Δr is explained") == measured
    assert text.count("Δr lost with the list’s first 64") == measured

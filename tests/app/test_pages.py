"""Every page of a run: what it shows, and that texts cannot become markup."""

from __future__ import annotations

import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import polars as pl
import pytest
from fastapi.testclient import TestClient

from rmscope.app.catalogue import Query, listings, matches
from rmscope.app.library import PAIRS, Concept, Library, OpenRun, group_of
from rmscope.app.server import create_app
from rmscope.errors import InputError
from rmscope.io import sha256
from rmscope.model.site_names import parts_of
from rmscope.report.formatting import effect, share, shift
from rmscope.run.labels import Label, key_of
from rmscope.run.run import Run
from tests.app.conftest import ORIGIN

HOSTILE = {
    "markup": "</script><script>alert(1)</script><img src=x onerror=alert(1)>",
    "attribute": '" onmouseover="alert(1)" x=\'',
    "right to left": "\u202eabc\u2066def\u200f",
    "emoji": "👩‍👩‍👧‍👦 é ﷽",
    "template": "{{ 7 * 7 }} {% raw %}",
    "nul": "a\0b",
}


def addresses(page: str) -> set[str]:
    return {unquote(a) for a in re.findall(r'(?:href|src|action|hx-get|hx-post)="([^"#]+)"', page)}


def test_one_run_is_shown_at_once_and_every_link_of_its_pages_leads_somewhere(client: TestClient) -> None:
    seen, waiting = set[str](), {"/"}
    while waiting:
        address = waiting.pop()
        seen.add(address)
        answer = client.get(address)
        if (number := re.search(r"/features/[^/]+/(\d+)", address)) and int(number[1]) % 16 > 1:
            continue  # all features of a site link to their neighbours; a few of them are followed
        if re.search(r"/(label|load|save|causes|ablate(/.*)?|concepts/\d+/pairs|features/.*/pairs)$", address):
            assert answer.status_code == 405  # only for forms
            continue
        assert answer.status_code == 200, address
        if "text/html" in answer.headers["content-type"]:
            waiting |= addresses(answer.text) - seen
    assert "/r/small-run/bench" in seen
    assert sum("/concepts/" in address for address in seen) > 3


def test_the_overview_tells_every_reported_concept_with_its_effect(client: TestClient, app_run: Path) -> None:
    page = client.get("/r/small-run").text
    for row in Run.open(app_run).concepts.filter("reported").to_dicts():
        assert f'href="/r/small-run/concepts/{row["concept"]}"' in page
        assert effect(row["mean_effect"], row["ci_low"], row["ci_high"])[0] in page


def test_a_concepts_page_tells_what_it_adds_to_text_statistics(client: TestClient, app_run: Path) -> None:
    for concept, adds in Run.open(app_run).evidence.text.adds.items():
        page = client.get(f"/r/small-run/concepts/{concept}").text
        value, between = share(adds.value, adds.low, adds.high)
        assert f'<dt>adds to text statistics</dt><dd>{value} <span class="ci">{between}</span></dd>' in page


def test_what_is_not_reported_says_why_in_the_list_and_on_its_page(app_run: Path) -> None:
    library = Library(app_run)
    run = library.open("small-run")
    assert run is not None
    run.rows[0] |= {"reported": False}
    run.rows[1] |= {"reported": False, "flags": ["direction"]}
    for concept in run.rows[:2]:
        concept["group"] = group_of(concept)
    with TestClient(create_app(library), base_url=ORIGIN) as client:  # type: ignore[arg-type]
        page = client.get("/r/small-run").text
        for concept, words in zip(run.rows, ("not significant", "no more than other directions", ""), strict=False):
            (listed,) = re.findall(
                rf'<a class="row" href="/r/small-run/concepts/{concept["concept"]}">.*?</a>', page, re.DOTALL
            )
            own = client.get(f"/r/small-run/concepts/{concept['concept']}").text
            assert ('<span class="ns">' in listed) == ('<span class="muted">' in own) == bool(words)
            assert f'<span class="ns">{words}</span>' in listed or not words
            assert f'<span class="muted">{words}</span>' in own or not words


def test_a_concepts_page_shows_its_stored_pairs_effects_and_features(client: TestClient, app_run: Path) -> None:
    run = Run.open(app_run)
    stored = next(c for c in run.evidence.concepts if c.examples)
    page = client.get(f"/r/small-run/concepts/{stored.concept}").text
    assert page.count('<article class="example">') == len(stored.examples)
    assert page.count("<mark") > 0
    assert "Chosen" in page
    assert "Rejected" in page
    for feature in stored.features:
        assert f'/features/{stored.site}/{feature}">{feature}</a><small>{stored.site}</small>' in page


def test_the_first_pair_is_the_one_whose_difference_moves_most(client: TestClient, app_run: Path) -> None:
    stored = next(c for c in Run.open(app_run).evidence.concepts if len(c.examples) > 1)
    page = client.get(f"/r/small-run/concepts/{stored.concept}").text
    ordered = sorted(stored.examples, key=lambda e: -abs(e.delta_before - e.delta_after))
    shown = re.findall(r'<span class="who">Δr</span> <span class="num">(.*?)</span>', page)
    assert shown == [" → ".join(shift(e.delta_before, e.delta_after)) for e in ordered]


def test_more_pairs_are_those_of_all_confirm_pairs_whose_difference_moves_most(client: TestClient, app_run: Path) -> None:
    run = OpenRun(app_run)
    concept = run.concepts()[0]
    both = run.run.joint_effects().filter(pl.col("feature") == concept["concept"])
    signed = pl.when(pl.col("side") == "chosen").then("effect").otherwise(-pl.col("effect"))
    moved = both.group_by("pair").agg(signed.sum().abs().alias("moved"))["moved"].sort(descending=True)
    contexts = run.pairs_that_move(concept, run.open_again(), 3)
    assert [abs(c.delta_before - c.delta_after) for c in contexts] == pytest.approx(moved[:3].to_list(), abs=1e-5)
    part = client.post(f"/r/small-run/concepts/{concept['concept']}/pairs", headers={"hx-request": "true"}).text
    assert "<html" not in part
    assert part.count('<article class="example">') == min(PAIRS, len(moved))


def test_htmx_gets_the_lists_alone_and_a_browser_the_page(client: TestClient) -> None:
    part = client.get("/r/small-run?direction=up", headers={"hx-request": "true"}).text
    page = client.get("/r/small-run?direction=up").text
    assert "<html" not in part
    assert "<html" in page
    assert "Lowers reward" not in part
    assert part.strip() in page


@pytest.mark.parametrize("address", ["/nowhere", "/r/other", "/r/small-run/concepts/99999", "/r/small-run/concepts/x"])
def test_what_is_not_there_is_404(client: TestClient, address: str) -> None:
    answer = client.get(address)
    assert answer.status_code == 404
    assert "There is no such" in answer.text or "no such concept" in answer.text


@pytest.mark.parametrize(
    "name", ["../run.yaml", "..%2Frun.yaml", "%2e%2e/run.yaml", "labels.py", "app.css%00", "/etc/passwd"]
)
def test_no_address_reads_a_file(client: TestClient, name: str) -> None:
    for address in (f"/static/{name}", f"/r/{name}", f"/r/small-run/{name}"):
        answer = client.get(address)
        assert answer.status_code == 404
        assert "config:" not in answer.text


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_texts_stay_texts(client: TestClient, app_run: Path, kind: str) -> None:
    text = HOSTILE[kind]
    saved = client.post("/r/small-run/concepts/0/label", data={"name": text, "note": text, "star": "1"})
    assert saved.status_code == 200
    pages = [
        client.get("/r/small-run", params={"text": text}).text,
        client.get("/r/small-run/concepts/0").text,
        client.post("/r/small-run/bench", data={"prompt": text, "completion": [text, "b"]}).text,
    ]
    for page in pages:
        assert "<script>" not in page
        assert "<img" not in page
        assert ' onmouseover="' not in page
        assert "49 {" not in page
        assert "\0" not in page
    concept = OpenRun(app_run).concept(0)
    assert concept is not None
    assert concept["title"] == " ".join(text.replace("\0", "").split())


def test_labels_outlive_the_app_and_are_shown_everywhere(client: TestClient, app_run: Path) -> None:
    values = {"name": "flattery", "note": "seen in\nmany pairs", "star": "1"}
    page = client.post("/r/small-run/concepts/1/label", data=values).text
    assert "flattery" in page
    with TestClient(create_app(Library(app_run)), base_url=ORIGIN) as other:  # type: ignore[arg-type]
        page = other.get("/r/small-run").text
        assert '<span class="star" title="starred">★</span> flattery' in page
        assert "flattery" in other.get("/r/small-run?starred=1&text=many").text
        assert "No concept matches" in other.get("/r/small-run?starred=1&text=nobody+wrote+this").text
        own = other.get("/r/small-run/concepts/1").text
    assert "<h1>" in own
    assert "Named by hand" in own
    assert "seen in\nmany pairs" in own
    client.post("/r/small-run/concepts/1/label", data={"name": "", "note": ""})
    assert "flattery" not in client.get("/r/small-run").text


def test_a_label_that_is_too_long_is_refused_and_nothing_is_kept(client: TestClient, app_run: Path) -> None:
    answer = client.post("/r/small-run/concepts/1/label", data={"name": "x" * 121})
    assert answer.status_code == 400
    assert "121 characters" in answer.text
    assert not (app_run / "labels.sqlite").exists()


def test_a_label_belongs_to_the_features_and_not_to_the_number(client: TestClient, app_run: Path) -> None:
    concept, saes = {"site": "diff.3", "features": [4, 2]}, {"diff.3": "a", "diff.4": "b"}
    assert key_of(concept, saes) == key_of({**concept, "features": [2, 4], "concept": 7}, {**saes, "diff.4": "c"})
    assert key_of(concept, saes) != key_of({**concept, "site": "diff.4"}, {**saes, "diff.4": "a"})


def test_a_label_is_of_the_sae_that_it_was_given_for(client: TestClient, app_run: Path) -> None:
    client.post("/r/small-run/concepts/1/label", data={"name": "flattery"})
    run = OpenRun(app_run)
    assert [c["label"].name for c in run.concepts()].count("flattery") == 1
    concept = next(row for row in run.rows if row["concept"] == 1)
    run.labels.saes = {**run.labels.saes, concept["site"]: "trained again"}
    assert [c["label"].name for c in run.concepts()].count("flattery") == 0
    run.labels.write(concept, "another", star=False, note="")
    assert [c["title"] for c in run.concepts()].count("another") == 1
    assert [c["title"] for c in OpenRun(app_run).concepts()].count("flattery") == 1  # it is kept


def test_the_sae_of_a_site_is_known_by_the_checksum_of_its_weights(app_run: Path) -> None:
    run = Run.open(app_run)
    for site in run.sites:
        files = [app_run / "saes" / part / "sae_weights.safetensors" for part in parts_of(site)]
        assert run.sae_identity(site).split() == [sha256(file) for file in files]
    run.on_disk.record["files"] = {f"saes/{part}/sae_weights.safetensors": "recorded" for part in parts_of(run.sites[0])}
    assert set(run.sae_identity(run.sites[0]).split()) == {"recorded"}


def row(**values: object) -> Concept:
    given: Concept = {
        "concept": 3, "name": "“no problem”", "title": "“no problem”", "site": "diff.9", "features": [12],
        "elsewhere": [{"site": "diff.7", "features": [5]}], "flags": ["dense"], "mean_effect": 0.4, "ci_low": 0.3,
        "ci_high": 0.5, "q": 0.01, "mean_diff": 0.1, "group": "content", "tokens": [" problem"],
        "label": Label(note="thanks, 99 times, ²"),
    }  # fmt: skip
    return given | values


@pytest.mark.parametrize(
    "asked",
    [
        {"text": "PROBLEM"}, {"text": "thank"}, {"text": "12"}, {"text": "#3"}, {"text": "5"}, {"text": "99"},
        {"text": "²"}, {"site": "diff.7"}, {"flag": "dense"}, {"group": "content"}, {"direction": "up"}, {"q": ".05"},
        {"q": "not a number"}, {},
    ],
)  # fmt: skip
def test_a_concept_is_asked_for_by_name_note_token_number_site_flag_group_direction_and_q(asked: dict[str, str]) -> None:
    assert matches(row(), Query.of(asked))


@pytest.mark.parametrize(
    "asked",
    [
        {"text": "url"}, {"text": "1"}, {"text": "³"}, {"site": "diff.8"}, {"flag": "ending"}, {"group": "form"},
        {"direction": "down"}, {"direction": "sideways"},
        {"q": ".001"}, {"starred": "1"},
    ],
)  # fmt: skip
def test_a_concept_that_is_not_asked_for_is_left_out(asked: dict[str, str]) -> None:
    assert not matches(row(), Query.of(asked))


def test_content_comes_before_form_and_the_order_is_what_is_asked_for() -> None:
    rows = [
        row(concept=1, rank=4, mean_effect=0.2, q=0.001),
        row(concept=2, rank=2, mean_effect=0.5, q=0.04),
        row(concept=3, rank=3, mean_effect=-0.9),
        row(concept=4, rank=1, mean_effect=2.0, group="form"),
        row(concept=5, rank=5, mean_effect=0.3, q=0.01),
    ]
    by_rank, by_effect, by_q = (listings(rows, Query.of({"sort": sort})) for sort in ("rank", "effect", "q"))
    assert [[c["concept"] for c in one.concepts] for one in by_rank] == [[2, 1, 5], [3], [4]]
    assert [[c["concept"] for c in one.concepts] for one in by_effect] == [[2, 5, 1], [3], [4]]
    assert [[c["concept"] for c in one.concepts] for one in by_q] == [[1, 5, 2], [3], [4]]
    filtered = listings(rows, Query.of({"direction": "up"}))
    assert filtered[0].span == by_effect[0].span


def test_requests_that_come_at_once_open_a_run_once(app_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, at_once = [], threading.Barrier(4)

    class Slow(OpenRun):
        def __init__(self, *values: Any) -> None:
            opened.append(values)
            time.sleep(0.1)
            super().__init__(*values)

    def ask(library: Library) -> OpenRun | None:
        at_once.wait(30)
        return library.open("small-run")

    monkeypatch.setattr("rmscope.app.library.OpenRun", Slow)
    with ThreadPoolExecutor(4) as pool:
        runs = set(pool.map(ask, [Library(app_run)] * 4))
    assert len(opened) == len(runs) == 1


def test_a_folder_of_runs_is_a_list_and_one_without_runs_is_refused(app_run: Path, tmp_path: Path) -> None:
    for name in ("a b", "a-b"):
        (tmp_path / name).symlink_to(app_run)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "run.yaml").write_bytes((app_run / "run.yaml").read_bytes())
    with TestClient(create_app(Library(tmp_path)), base_url=ORIGIN) as client:  # type: ignore[arg-type]
        page = client.get("/").text
        assert page.count("not finished") == 1
        assert {"/r/small-run", "/r/small-run-2"} <= addresses(page)
        assert client.get("/r/small-run-2").status_code == 200
        assert client.get("/r/half").status_code == 400
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InputError, match="holds no run"):
        Library(tmp_path / "nothing")

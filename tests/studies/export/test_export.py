"""An exported run: files fit their public formats, numbers are the run's, hostile texts do no harm, nothing is sent."""

from __future__ import annotations

import csv
import gzip
import json
import re
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import polars as pl
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from rmscope.errors import InputError
from rmscope.report.formatting import effect, number
from rmscope.run.firings import AFTER, BEFORE, TOP, SiteFirings
from rmscope.run.run import Run
from rmscope.sae.base import Sae
from rmscope.sae.joint import JointSae
from rmscope.settings import read_settings
from rmscope.statistics import NOTHING, Figure
from rmscope.studies.export.analyse import MARK, analyse
from rmscope.studies.export.pages import lists_of
from rmscope.studies.export.result import ExportResult
from rmscope.studies.export.settings import ExportConfig
from rmscope.studies.export.sources import Source, hook_of
from rmscope.studies.export.tables import as_csv, columns_page
from rmscope.studies.export.texts import markdown, public_name, slug
from rmscope.studies.label.result import ConceptName
from rmscope.studies.label.written import Written
from tests.docs.pages import ROOT
from tests.docs.pages import run as run_blocks
from tests.model.small import saved_pm, small_sae
from tests.run.small import run_with_concepts
from tests.studies.export import published

SITE = "resid_post.2"
HAND = '=HYPERLINK("http://x.example")</script><script>alert(1)</script>\u202e | `[a](http://x.example)`'
LLM = "a\0b <img src=x onerror=alert(1)> {{ 7 * 7 }}"
NOTE = "@SUM(1)\n</script>\u2066 two lines"
TOKEN = "hf_very_secret"
FORMATS = ["neuronpedia", "tables", "pages", "hub"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("something reaches the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose first concept has a hostile name by hand, and whose second has names of a language model."""
    out = tmp_path_factory.mktemp("run") / "run"
    run_with_concepts(saved_pm(tmp_path_factory.mktemp("secret-place") / "my pm"), out, sites=[SITE], seeds=1)
    run = Run.open(out)
    first, second, third = run.concepts.to_dicts()[:3]
    labels = run.labels
    labels.write(first, HAND, True, NOTE)
    labels.write_name(second, "sure", llm_name(second, LLM, 0.9).model_dump(mode="json"))
    labels.write_name(third, "unsure", llm_name(third, "guessed words", 0.5).model_dump(mode="json"))
    return run


def llm_name(row: dict[str, Any], name: str, score: float) -> ConceptName:
    figure = Figure(score, score - 0.1, score + 0.1, 20)
    return ConceptName(
        concept=row["concept"], keyword_name=row["name"], name=name, llm="writer", sign=1, detection=figure, fuzzing=figure,
        written=Written([], NOTHING, NOTHING, NOTHING, NOTHING, NOTHING), moves_as_said=None, tokens=(1, 1), seconds=1.0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def exported(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "out"
    analyse(run, ExportConfig(out=out, formats=FORMATS))
    return out


@pytest.fixture(scope="module")
def place(exported: Path) -> Path:
    """The source's folder of the Neuronpedia export."""
    return exported / "neuronpedia" / "my-pm" / "2-rmscope-resid-post"


def lines(path: Path) -> list[dict[str, Any]]:
    raw = path.read_bytes()
    return [json.loads(line) for line in (gzip.decompress(raw) if path.suffix == ".gz" else raw).splitlines()]


def upload(exported: Path) -> Path:
    return exported / "neuronpedia/saedashboard/my-pm_rmscope-resid-post_blocks.2.hook_resid_post_96/batch-0.json"


def test_every_neuronpedia_row_fits_the_published_schema(exported: Path, place: Path) -> None:
    files = {
        "model.jsonl": published.Model,
        "release.jsonl": published.SourceRelease,
        "sourceset.jsonl": published.SourceSet,
        "source.jsonl": published.Source,
        "features/batch-0.jsonl.gz": published.Neuron,
        "activations/batch-0.jsonl.gz": published.Activation,
        "explanations/batch-0.jsonl.gz": published.Explanation,
    }
    assert {p.relative_to(place).as_posix() for p in place.rglob("*") if p.is_file()} == set(files)
    rows = {name: lines(place / name) for name in files}
    for name, table in files.items():
        assert rows[name]
        for row in rows[name]:
            table.model_validate_json(json.dumps(row))
            assert list(row) == list(rows[name][0])  # the importer takes the columns from the first line
    published.DashboardBatch.model_validate_json(upload(exported).read_text())
    (model,), (release,), (group,), (source,) = (rows[f"{n}.jsonl"] for n in ("model", "release", "sourceset", "source"))
    features = {(row["modelId"], row["layer"], row["index"]) for row in rows["features/batch-0.jsonl.gz"]}
    assert {(m, s) for m, s, _ in features} == {(model["id"], source["id"])}
    assert (source["setName"], group["releaseName"], group["modelId"]) == (group["name"], release["name"], model["id"])
    for name in ("activations/batch-0.jsonl.gz", "explanations/batch-0.jsonl.gz"):
        assert {(row["modelId"], row["layer"], row["index"]) for row in rows[name]} <= features
        assert len({row["id"] for row in rows[name]}) == len(rows[name])


def dense(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """The activations of every feature on every stored row, the first of each prompt silent, and the rows that count."""
    counts = run.store.column(SITE, "position").numpy() > 0
    f = run.saes[SITE].encode(run.store.rows(SITE, torch.arange(len(counts)))).numpy().astype(float)
    f[~counts] = 0
    return f, counts


def test_features_and_activations_are_those_of_the_store(run: Run, place: Path) -> None:
    f, counts = dense(run)
    token = run.store.column(SITE, "token").tolist()
    features, activations = (lines(place / name / "batch-0.jsonl.gz") for name in ("features", "activations"))
    frozen = set(run.features(SITE)["feature"].to_list())
    assert {int(row["index"]) for row in features} == frozen | {j for members in run.concepts["features"] for j in members}
    for row in features:
        own = f[:, int(row["index"])]
        assert row["frac_nonzero"] == pytest.approx((own > 0).sum() / counts.sum(), rel=1e-5)
        assert row["maxActApprox"] == pytest.approx(own.max(), rel=1e-4)
        assert sum(row["freq_hist_data_bar_heights"]) == (own > 0).sum()
        texts = [a for a in activations if a["index"] == row["index"]]
        assert texts[0]["maxValue"] == pytest.approx(own.max(), rel=1e-4)
        top = [a["maxValue"] for a in texts if a["binMin"] == -1]
        assert top == sorted(top, reverse=True)
        for text in texts:
            peak, values = text["maxValueTokenIndex"], np.array(text["values"])
            assert text["maxValue"] == values.max() == values[peak]
            assert text["minValue"] == values.min()
            assert text["maxValue"] <= text["binMax"] * (1 + 1e-5)
            starts = np.flatnonzero(np.isclose(own, text["maxValue"], rtol=1e-4)) - peak
            assert any(
                text["tokens"] == [run.rm.tokenizer.decode([t]) for t in token[at : at + len(values)]]
                and np.allclose(own[at : at + len(values)], values, rtol=1e-3, atol=1e-5)
                for at in starts.tolist()
            )


def test_the_chosen_texts_hold_the_largest_activations_of_a_naive_search(run: Run) -> None:
    f, _ = dense(run)
    firings = SiteFirings(run.store, run.saes[SITE], SITE)
    pair, region = (run.store.column(SITE, name).tolist() for name in ("pair", "region"))
    assert firings.features() == np.flatnonzero((f > 0).any(0)).tolist()
    for feature in firings.features()[:20]:
        peaks: dict[tuple[int, int, int], float] = {}
        number = 0
        for row, value in enumerate(f[:, feature].tolist()):
            number += row > 0 and (pair[row], region[row]) != (pair[row - 1], region[row - 1])
            peaks[pair[row], region[row], number] = max(value, peaks.get((pair[row], region[row], number), 0.0))
        expected = sorted((peak for peak in peaks.values() if peak > 0), reverse=True)[:TOP]
        texts = firings.firing_texts(feature)
        assert [t.values.max() for t in texts if t.low == -1] == pytest.approx(expected, rel=1e-4)
        for text in texts:
            assert len({(pair[row], region[row]) for row in text.rows.tolist()}) == 1
            assert text.peak <= BEFORE
            assert len(text.rows) <= BEFORE + 1 + AFTER
            assert np.allclose(text.values, f[text.rows, feature], rtol=1e-4, atol=1e-6)
        rows = [int(t.rows[t.peak]) for t in texts]
        assert len(rows) == len(set(rows))


def test_the_upload_batch_holds_what_the_bulk_files_hold(exported: Path, place: Path) -> None:
    batch = json.loads(upload(exported).read_text())
    rows, activations = (lines(place / name / "batch-0.jsonl.gz") for name in ("features", "activations"))
    assert (batch["model_id"], batch["layer"], batch["sae_set"]) == ("my-pm", 2, "rmscope-resid-post")
    assert [feature["feature_index"] for feature in batch["features"]] == [int(row["index"]) for row in rows]
    for row, feature in zip(rows, batch["features"], strict=True):
        assert feature["frac_nonzero"] == row["frac_nonzero"]
        own = [a for a in activations if a["index"] == row["index"]]
        assert [(a["tokens"], a["values"], a["bin_min"], a["qualifying_token_index"]) for a in feature["activations"]] == [
            (a["tokens"], a["values"], a["binMin"], a["maxValueTokenIndex"]) for a in own
        ]


def test_names_of_people_and_models_come_before_the_offline_ones(run: Run, exported: Path, place: Path) -> None:
    first, second, third = run.concepts.to_dicts()[:3]
    rows = lines(place / "explanations" / "batch-0.jsonl.gz")

    def told(concept: dict[str, Any]) -> list[str]:
        return [r["description"] for r in rows if f"Concept {concept['concept']} of" in r["notes"]][:2]

    assert told(first) == [HAND, first["name"]]
    assert told(second) == [LLM.replace("\0", "\ufffd"), second["name"]]
    assert told(third) == [third["name"], "guessed words"]
    mean, between = effect(second["mean_effect"], second["ci_low"], second["ci_high"])
    notes = next(r["notes"] for r in rows if f"Concept {second['concept']} of" in r["notes"])
    assert f"{mean} {between} reward" in notes
    assert "by writer (detection 0.90" in notes
    titles = pl.read_parquet(exported / "tables/concepts.parquet").select("title", "title_by").rows()[:3]
    assert titles == [(HAND, "hand"), (LLM, "language model"), (third["name"], "offline")]
    assert sum("unsure" in r["notes"] for r in rows) == len(third["features"])


def test_all_features_are_those_that_fire(run: Run, tmp_path: Path) -> None:
    analyse(run, ExportConfig(out=tmp_path / "out", formats=["neuronpedia"], all_features=True, model_id="other"))
    rows = lines(tmp_path / "out/neuronpedia/other/2-rmscope-resid-post/features/batch-0.jsonl.gz")
    f, _ = dense(run)
    firing = set(np.flatnonzero((f > 0).any(0)).tolist())
    assert {int(row["index"]) for row in rows} == firing | set(run.features(SITE)["feature"].to_list())


def test_tables_hold_the_runs_values(run: Run, exported: Path) -> None:
    read = {
        name: pl.read_parquet(exported / f"tables/{name}.parquet") for name in ("concepts", "features", "labels", "names")
    }
    assert_frame_equal(read["concepts"].drop("title", "title_by"), run.concepts)
    assert_frame_equal(read["features"].drop("site", "concepts"), run.features(SITE))
    for feature, concepts in read["features"].select("feature", "concepts").rows():
        holding = [n for n, members in run.concepts.select("concept", "features").rows() if feature in members]
        assert (concepts or []) == sorted(holding)
    (label,) = read["labels"].to_dicts()
    assert (label["name"], label["star"], label["note"]) == (HAND, True, NOTE)
    scores = read["names"].filter(pl.col("given_by") == "language model").select("detection", "fuzzing_low", "unsure").rows()
    assert scores == [(0.9, pytest.approx(0.8), False), (0.5, pytest.approx(0.4), True)]
    with (exported / "tables/concepts.csv").open(newline="", encoding="utf-8") as opened:
        rows = list(csv.DictReader(opened))
    for row, concept in zip(rows, run.concepts.to_dicts(), strict=True):
        assert float(row["mean_effect"]) == concept["mean_effect"]
        assert json.loads(row["features"]) == concept["features"]
    assert rows[0]["title"] == "'" + HAND


def test_every_column_is_documented(run: Run, exported: Path) -> None:
    columns = {name: pl.read_parquet(exported / f"tables/{name}.parquet").columns for name in
               ("concepts", "features", "labels", "names")}  # fmt: skip
    page = columns_page(columns)
    assert (exported / "tables/columns.md").read_text("utf-8") == page
    assert (ROOT / "docs/reference/tables.md").read_text("utf-8") == page


@given(st.lists(st.text(st.sampled_from("=+-@＝\t\r\n \u200f\u202e\0'a1")), max_size=8))
def test_no_cell_of_a_csv_begins_like_a_formula(texts: list[str]) -> None:
    table = as_csv(pl.DataFrame({"text": texts}, schema={"text": pl.String}))
    for cell, text in zip(table["text"], texts, strict=True):
        assert not re.match(r"[\s\u200f\u202e]*[=+\-@＝]|[\t\r]", cell)
        assert "\0" not in cell
        assert cell.removeprefix("'") == text.replace("\0", "\ufffd").removeprefix("'")


def test_pages_open_with_no_server(run: Run, exported: Path) -> None:
    pages = {p: p.read_text("utf-8") for p in (exported / "pages").rglob("*.html")}
    names = (run.config.data, run.config.model)
    shown = run.show().html.replace("\0", "\ufffd")
    for name in names:
        shown = shown.replace(name, Path(name).name)
    assert pages[exported / "pages/report.html"] == shown
    for path, page in pages.items():
        assert "\0" not in page
        assert "default-src 'none'" in page
        assert len(re.findall("<script", page)) == (path.name == "report.html")
        assert "<img" not in page
        for link in re.findall(r'(?:href|src)="([^"]*)"', page):
            target, _, fragment = link.partition("#")
            there = pages[(path.parent / target).resolve()] if target else page
            assert not fragment or f'id="{fragment}"' in there
    stored = {c.concept: c for c in run.evidence.concepts}
    for row in run.concepts.filter("reported").to_dicts():
        page = pages[exported / f"pages/concepts/{row['concept']}.html"]
        assert effect(row["mean_effect"], row["ci_low"], row["ci_high"])[0] in page
        assert page.count('<article class="example">') == len(stored[row["concept"]].examples)
        assert f'href="concepts/{row["concept"]}.html"' in pages[exported / "pages/index.html"]
    first = pages[exported / f"pages/concepts/{run.concepts['concept'][0]}.html"]
    assert "&lt;/script&gt;&lt;script&gt;alert(1)" in first
    assert "{{ 7 * 7 }}" in pages[exported / f"pages/concepts/{run.concepts['concept'][1]}.html"]


@pytest.mark.parametrize("concept", [{"flags": []}, {"flags": ["nonspecific"]}, {"flags": [], "form": True}])
def test_every_reported_concept_is_in_a_list_of_the_index(concept: dict[str, Any]) -> None:
    row = {"form": False, "mean_effect": 0.5, "reported": True, **concept}
    (shown,) = lists_of([row], {"wide": {}})
    assert shown["concepts"] == [row]


def test_the_hub_folder_holds_the_saes_and_their_figures(run: Run, exported: Path) -> None:
    assert Sae.load(exported / "hub" / SITE).identity() == run.sae(SITE).identity()
    card = (exported / "hub/README.md").read_text("utf-8")
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["license"] == "unknown"
    assert "base_model" not in front  # a folder is no id of the hub
    (sae,) = run.evidence.sites[0].saes
    row = next(line for line in card.splitlines() if line.startswith(f"| `{SITE}` | topk"))
    assert f"| {number(sae.fvu)} | {number(sae.l0)} |" in row
    for concept in run.concepts.filter("reported").to_dicts():
        assert " ".join(effect(concept["mean_effect"], concept["ci_low"], concept["ci_high"])) in card
    assert not re.search("<[a-z/!]", re.sub(r"\\.", "", card))
    assert "\u202e" not in card


def test_no_path_of_this_machine_is_handed_on(exported: Path) -> None:
    for folder in ("neuronpedia", "hub", "tables", "pages"):
        for path in (exported / folder).rglob("*"):
            if path.is_file():
                raw = path.read_bytes()
                assert b"secret-place" not in (gzip.decompress(raw) if path.suffix == ".gz" else raw), path


@given(st.text())
def test_markdown_shows_a_text_as_it_is(text: str) -> None:
    line = markdown(text)
    assert not re.search(r"[!-/:-@\[-`{-~]", re.sub(r"\\[!-/:-@\[-`{-~]", "", line))
    assert "\n" not in line
    assert "\0" not in line
    line.encode("utf-8")


class Hub:
    """Stands in for the hub's API."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.calls = error, list[tuple[str, dict[str, Any]]]()

    def __call__(self) -> Hub:
        return self

    def create_repo(self, repo: str, **settings: Any) -> None:
        self.calls.append((repo, settings))

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> SimpleNamespace:
        if self.error is not None:
            raise self.error
        sent = {p.relative_to(folder_path).as_posix() for p in folder_path.rglob("*") if p.is_file()}
        self.calls.append((repo_id, {"files": sent}))
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/1")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    api = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", api)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return api


def export_saes(run: Run, out: Path, **settings: Any) -> ExportResult:
    return analyse(run, ExportConfig(out=out, formats=["hub"], **settings))


def test_nothing_is_uploaded_unless_a_repo_is_named(run: Run, tmp_path: Path, hub: Hub) -> None:
    result = export_saes(run, tmp_path / "out")
    assert hub.calls == []
    assert result.upload is not None
    assert [f.file for f in result.upload.files] == ["README.md", f"{SITE}/cfg.json", f"{SITE}/sae_weights.safetensors"]
    assert "Nothing was uploaded" in result.summary()
    assert list(result.tables()) == ["Exported", "Would be uploaded"]


def test_a_push_uploads_what_was_listed_to_a_private_repo(run: Run, tmp_path: Path, hub: Hub) -> None:
    result = export_saes(run, tmp_path / "out", push="me/my-saes", licence="apache-2.0")
    assert result.upload is not None
    listed = {f.file for f in result.upload.files}
    assert hub.calls == [("me/my-saes", {"private": True, "exist_ok": True}), ("me/my-saes", {"files": listed})]
    assert "https://huggingface.co/me/my-saes/commit/1" in result.summary()
    assert "license: apache-2.0" in (tmp_path / "out/hub/README.md").read_text("utf-8")
    assert TOKEN not in json.dumps(result.as_json())
    assert not any(TOKEN.encode() in p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    export_saes(run, tmp_path / "out", push="me/my-saes", public=True)
    assert hub.calls[2][1]["private"] is False


def test_a_refusal_of_the_hub_is_a_sentence_without_the_token(run: Run, tmp_path: Path, hub: Hub) -> None:
    hub.error = OSError(f"403 Forbidden for {TOKEN}")
    with pytest.raises(InputError, match="could not be uploaded to me/my-saes") as told:
        export_saes(run, tmp_path / "out", push="me/my-saes")
    assert "403 Forbidden for …" in str(told.value)
    assert TOKEN not in str(told.value)
    assert (tmp_path / "out/hub/README.md").is_file()


def test_without_a_token_a_push_is_refused_before_any_work(
    run: Run, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(InputError, match="no token"):
        export_saes(run, tmp_path / "out", push="me/my-saes")
    assert hub.calls == []
    assert not (tmp_path / "out").exists()


def test_only_an_empty_folder_or_an_export_is_replaced(run: Run, tmp_path: Path) -> None:
    other, out = tmp_path / "other", tmp_path / "out"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="holds files of another kind"):
        export_saes(run, other)
    with pytest.raises(InputError, match="holds files of another kind"):
        export_saes(run, run.folder)
    assert [p.name for p in other.iterdir()] == ["thesis.txt"]
    out.mkdir()
    export_saes(run, out)
    analyse(run, ExportConfig(out=out, formats=["tables"]))
    assert sorted(p.name for p in out.iterdir()) == [MARK, "tables"]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"formats": ["csv"]}, "neuronpedia"),
        ({"formats": []}, "at least 1"),
        ({"formats": ["tables"], "push": "me/saes"}, "add hub to the formats"),
        ({"formats": ["hub"], "push": "saes"}, "write OWNER/NAME"),
        ({"formats": ["hub"], "licence": "MIT\nx: 1"}, "such as apache-2.0"),
        ({"formats": ["neuronpedia"], "model_id": "../up"}, "lower-case letters"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        read_settings(ExportConfig, None, {"out": "x", **settings})


def test_formats_are_comma_separated() -> None:
    assert read_settings(ExportConfig, None, {"out": "x", "formats": ["tables,pages", "hub"]}).formats == FORMATS[1:]


def test_sources_are_named_by_their_layer_and_features_of_both_parts_by_their_own_hook() -> None:
    assert [Source(site, "pm").id for site in ("both.6", "resid_post.12", "embed")] == [
        "6-rmscope-both", "12-rmscope-resid-post", "0-rmscope-embed",
    ]  # fmt: skip
    sae = JointSae(small_sae(m=8), small_sae(m=12), "both.6")
    hooks = [hook_of(sae, "both.6", feature) for feature in (0, 7, 8, 19)]
    assert hooks == ["blocks.6.hook_diff"] * 2 + ["blocks.6.hook_base"] * 2
    assert hook_of(small_sae(), "resid_post.3", 90) == "blocks.3.hook_resid_post"


def test_names_of_models_become_ids(tmp_path: Path) -> None:
    (tmp_path / "My PM.v2").mkdir()
    assert public_name(str(tmp_path / "My PM.v2")) == "My PM.v2"
    assert public_name("org/Reward-Model") == "org/Reward-Model"
    assert public_name("zoo:planted") == "zoo:planted"
    assert public_name("../place/of/pm") == "pm"  # from another folder than the run's
    assert public_name("~nobody/pm") == "pm"
    assert slug("org/Reward Model.v2") == "org-reward-model-v2"
    assert slug("模型") == "model"


def test_the_pages_block_runs(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_blocks(ROOT / "docs/howto/export.md", {"runs/mine": str(run.folder)})
    assert names["result"].page().path.is_file()

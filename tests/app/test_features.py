"""Pages of single features: their numbers are those of a slow exact twin, and texts cannot become markup."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from fastapi.testclient import TestClient

from rmscope.app.bench import Bench, Request
from rmscope.app.catalogue import PAGE, Listed
from rmscope.app.features import FeatureQuery, causes, find_features, fresh_effects, holders, quality, studies_of
from rmscope.app.library import Library, OpenRun
from rmscope.app.saved import FOLDER, save_experiment
from rmscope.app.server import create_app
from rmscope.app.side_by_side import Agreement, agreement, in_sd, rows_of
from rmscope.effects.single_tokens import MOST_BEFORE, activations_without, token_effects
from rmscope.errors import InputError
from rmscope.model.packing import pad_texts
from rmscope.model.reward_model import RewardModel
from rmscope.ranking.concepts import members_in
from rmscope.run.dashboard import WORDS, dashboard, gain_of, unembedding, words
from rmscope.run.firings import SiteFirings
from rmscope.run.run import Run
from rmscope.studies.experiment.conditions import read_experiment
from tests.app.conftest import ORIGIN
from tests.model.small import small_pm

HOME = "/r/small-run/features"
TEXTS = ["You're right, it is Paris, on the Seine.", "Thanks for asking! I don't know."]


@pytest.fixture(scope="module")
def opened(app_run: Path) -> OpenRun:
    return OpenRun(app_run)


@pytest.fixture(scope="module")
def bench(opened: OpenRun) -> Bench:
    return Bench(opened.open_again())


def some_feature(opened: OpenRun) -> tuple[str, int]:
    """The frozen feature that fires most often."""
    site = opened.run.sites[0]
    rate = opened.firings(site).rate
    return site, max(opened.run.features(site)["feature"].to_list(), key=rate)


def dense_activations(opened: OpenRun, site: str) -> np.ndarray:
    """[stored tokens without the first of each text, m]."""
    store = opened.run.store
    keep = torch.nonzero(store.column(site, "position") > 0).flatten()
    return opened.saes[site].encode(store.rows(site, keep)).detach().numpy()


def test_a_dashboard_is_what_the_stored_activations_say(opened: OpenRun) -> None:
    site, j = some_feature(opened)
    f, sae = dense_activations(opened, site), opened.saes[site]
    shown = dashboard(opened.firings(site), sae, j, opened.texts, opened.vocabulary.filter(pl.col("site") == site))
    assert shown.rate == pytest.approx((f[:, j] > 0).mean())
    assert shown.maximum == pytest.approx(f[:, j].max(), rel=1e-5)
    edges, counts = shown.histogram
    assert counts == np.histogram(f[f[:, j] > 0, j], bins=len(counts), range=(0, f[:, j].max()))[0].tolist()
    assert edges[0] == pytest.approx(0, abs=1e-6)
    assert edges[-1] == pytest.approx(f[:, j].max(), rel=1e-5)
    assert shown.texts[0].value == pytest.approx(f[:, j].max(), rel=1e-5)
    unit = sae.W_dec.detach() / sae.W_dec.detach().norm(dim=1, keepdim=True)
    with np.errstate(invalid="ignore"):
        correlation = np.nan_to_num(np.corrcoef(f.T)[j])
    for n in [*shown.by_decoder, *shown.by_firing]:
        assert n.cosine == pytest.approx(float(unit[j] @ unit[n.feature]), abs=1e-5)
        assert n.correlation == pytest.approx(correlation[n.feature], abs=1e-5)
    best = max((i for i in range(sae.m) if i != j), key=lambda i: correlation[i])
    assert shown.by_firing[0].feature == best


def test_the_tokens_of_a_dashboard_hold_all_of_its_activation(opened: OpenRun) -> None:
    site, j = some_feature(opened)
    firings = opened.firings(site)
    total = sum(firings.token_sums(j).values())
    assert total == pytest.approx(dense_activations(opened, site)[:, j].sum(), rel=1e-4)
    tokens = dashboard(firings, opened.saes[site], j, opened.texts, opened.vocabulary).tokens
    assert [share for _, share in tokens] == sorted((share for _, share in tokens), reverse=True)
    assert 0 < sum(share for _, share in tokens) <= 1 + 1e-9


def test_a_silent_feature_has_an_empty_dashboard(opened: OpenRun) -> None:
    site = opened.run.sites[0]
    sae = copy.deepcopy(opened.saes[site])
    with torch.no_grad():
        sae.b_enc[3] = -1e9
    firings = SiteFirings(opened.run.store, sae, site)
    assert 3 not in firings.features()
    shown = dashboard(firings, sae, 3, opened.texts, opened.vocabulary)
    assert (shown.rate, shown.maximum, shown.texts, shown.tokens, shown.by_firing) == (0.0, 0.0, [], [], [])


def test_words_are_those_whose_logits_the_direction_moves(opened: OpenRun) -> None:
    rm = small_pm("llama")
    rm.model.config.tie_word_embeddings = True
    matrix = unembedding(rm)
    assert matrix is not None
    direction = torch.randn(rm.d_model, generator=torch.manual_seed(0))
    normed = rm.model.base_model.norm.weight.detach().float()
    logits = rm.model.get_input_embeddings().weight.detach().float() @ (normed * direction)
    logits -= logits.mean()
    found = words(rm, matrix, direction)
    assert [logit for _, logit in found[:WORDS]] == pytest.approx(
        logits.sort(descending=True).values[:WORDS].tolist(), rel=1e-4
    )
    assert [logit for _, logit in found[WORDS:]] == pytest.approx(logits.sort().values[:WORDS].tolist(), rel=1e-4)
    rm.model.config.tie_word_embeddings = False
    assert unembedding(rm) is None


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_the_gain_of_a_last_norm_is_what_it_multiplies_by(architecture: str) -> None:
    """Gemma's norm multiplies by 1 + its weight, GPT-2's subtracts the mean and adds a bias."""
    rm = small_pm(architecture)
    norm = getattr(rm.model.base_model, "norm", None) or rm.model.base_model.ln_f
    with torch.no_grad():
        for p in norm.parameters():
            p.uniform_(-0.5, 1.5, generator=torch.Generator().manual_seed(0))
        gain = gain_of(norm, rm.d_model)
        x = torch.randn(64, rm.d_model, generator=torch.Generator().manual_seed(1))
        moved = norm(x) - norm(-x)
        x = x - x.mean(1, keepdim=True) if architecture == "gpt2" else x
    torch.testing.assert_close(moved, 2 * gain * x / x.square().mean(1, keepdim=True).sqrt(), rtol=1e-3, atol=1e-3)


def test_words_need_no_base_where_no_site_does_and_encoders_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_self: RewardModel) -> None:
        raise InputError("The base is not there.")

    monkeypatch.setattr(RewardModel, "base", property(missing))
    for architecture, known in (("llama", True), ("bert", False)):
        rm = small_pm(architecture)
        rm.model.config.tie_word_embeddings = True
        assert (unembedding(rm, ["resid_post.1"]) is not None) == known


def reward_without(rm: RewardModel, site: str, ids: torch.Tensor, changes: dict[int, torch.Tensor]) -> float:
    """r of a text with vectors taken out of the stream at some tokens, by a plain edit."""

    def edit(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        for token, change in changes.items():
            x[0, token] -= change.to(x)
        return x

    batch = pad_texts([(0, "chosen", ids, 1, rm.read_position(ids))], rm.pad_id)
    with torch.no_grad():
        return float(rm.rewards(batch, {site: edit})[0])


def test_the_effect_of_a_token_is_that_of_a_plain_edit_there(bench: Bench, opened: OpenRun) -> None:
    site, j = some_feature(opened)
    pair = next(p.pair for p in opened.pairs.values() if p.split == "confirm")
    for clean in bench.clean_pair(pair):
        effects = token_effects(bench.rm, bench.saes, clean.responses, {site: [j]})
        response, W = clean.responses[site], bench.saes[site].W_dec.detach()
        f = bench.saes[site].encode(response.x)[:, j].detach()
        assert bool((f > 0).any())
        for t, value in enumerate(f.tolist()):
            at = {response.start + t: value * W[j]}
            plain = clean.run.reward - reward_without(bench.rm, site, clean.run.ids, at) if value > 0 else 0.0
            assert float(effects[t]) == pytest.approx(plain, abs=2e-4)


def test_a_tokens_cause_is_the_activation_of_the_text_without_it(bench: Bench, opened: OpenRun) -> None:
    site, j = some_feature(opened)
    text = opened.firings(site).firing_texts(j)[0]
    row = int(text.rows[text.peak])
    found = causes(opened, bench, site, j, row)
    assert found.value == pytest.approx(float(text.values[text.peak]), rel=2e-2)
    store, run = opened.run.store, bench.run
    pair, at, region = (int(store.column(site, name)[row]) for name in ("pair", "position", "region"))
    ids = run.tokens[run.of_split("fit")[pair]].side("rejected" if region == 2 else "chosen")
    assert int(ids[at]) == int(store.column(site, "token")[row])
    value, without = activations_without(bench.rm, bench.saes[site], site, ids, at, j)
    assert value == pytest.approx(found.value)
    assert list(without) == list(range(max(1, at - MOST_BEFORE), at))
    for i in list(without)[:: max(1, len(without) // 4)]:
        rest = torch.cat([ids[:i], ids[i + 1 :]])
        with torch.no_grad():
            batch = pad_texts([(0, "chosen", rest, 1, rest.numel() - 1)], bench.rm.pad_id)
            x = bench.rm.streams(batch, [site])[site][0, at - 1].float()
        assert without[i] == pytest.approx(float(bench.saes[site].encode(x[None])[0, j]), abs=1e-3)


def test_a_strength_scales_the_features_of_a_concept_and_0_ablates_them(bench: Bench) -> None:
    asked = Request.of("What is the capital of France?", TEXTS)
    clean = bench.measure(asked).completions
    fire = [c for c in bench.reported if all(m.effects.get(c) for m in clean)]
    concept = next(c for c in fire if len(bench.members[c]) == 1)
    for strength in (0.0, 0.5, 1.0, 2.0):
        joint = bench.ablate(asked, {concept: strength})
        for m, j, one in zip(clean, joint, bench._clean(asked.messages, asked.completions), strict=True):
            ((site, features),) = bench.members[concept].items()
            response, sae = one.responses[site], bench.saes[site]
            f = sae.encode(response.x).detach()[:, list(features)]
            moves = (1 - strength) * f @ sae.W_dec.detach()[list(features)]
            at = {response.start + t: move for t, move in enumerate(moves)}
            assert j.after == pytest.approx(reward_without(bench.rm, site, one.run.ids, at), abs=2e-4)
            assert j.sum_of_single == pytest.approx((1 - strength) * m.effects.get(concept, 0.0), abs=1e-6)
            assert strength != 1.0 or j.effect == 0.0


def test_of_two_strengths_a_shared_feature_gets_the_least(bench: Bench) -> None:
    asked, concept = Request.of("What is the capital of France?", TEXTS), bench.reported[0]
    bench.members[-1] = bench.members[concept]
    try:
        both = bench.ablate(asked, {concept: 1.5, -1: 0.5})
    finally:
        del bench.members[-1]
    alone = bench.ablate(asked, {concept: 0.5})
    assert [j.effect for j in both] == pytest.approx([j.effect for j in alone], abs=1e-6)


def test_every_frozen_feature_is_listed_once_and_found_by_its_number(opened: OpenRun) -> None:
    frozen = {(site, j) for site in opened.run.sites for j in opened.run.features(site)["feature"]}
    first = find_features(opened, FeatureQuery())
    assert first.matches == len(frozen)
    rows = [r for page in range(first.pages) for r in find_features(opened, FeatureQuery(page=str(page + 1))).rows]
    assert sorted((r["site"], r["feature"]) for r in rows) == sorted(frozen)
    for site, j in frozen:
        assert any((r["site"], r["feature"]) == (site, j) for r in find_features(opened, FeatureQuery(text=f"#{j}")).rows)
    by_size = [abs(r["mean_effect"]) for r in find_features(opened, FeatureQuery(sort="effect")).rows]
    assert by_size == sorted(by_size, reverse=True)


def test_pages_of_a_list_hold_every_row_once_and_the_nearest_one_is_shown() -> None:
    rows = list(range(2 * PAGE + 1))
    pages = [Listed.page_of(rows, str(number)) for number in (1, 2, 3)]
    assert [row for page in pages for row in page.rows] == rows
    assert [len(page.rows) for page in pages] == [PAGE, PAGE, 1]
    assert [Listed.page_of(rows, asked).page for asked in ("0", "99", "-1", "x", "")] == [1, 3, 1, 1, 1]
    assert Listed.page_of([], "7") == Listed([], 0, 1, 1)


def test_effects_are_of_fresh_prompts_and_estimates_of_the_fit_split(opened: OpenRun) -> None:
    site, _ = some_feature(opened)
    split = dict(opened.run.scores.select("pair", "split").iter_rows())
    for j in opened.run.features(site)["feature"].to_list()[:4]:
        exact = opened.run.effects(site).filter(pl.col("feature") == j)
        fresh = exact.filter(pl.Series([split[pair] == "confirm" for pair in exact["pair"]]))
        assert 0 < fresh.height < exact.height  # the table holds both splits
        found = fresh_effects(opened, site, j)
        assert sorted(found["chosen"] + found["rejected"]) == sorted(fresh["effect"].to_list())
        points = quality(opened, site, j)
        assert sorted(e for _, e in points) == sorted(exact.join(fresh, on=["pair", "side"], how="anti")["effect"].to_list())


def test_a_features_page_names_its_concept(client: TestClient, opened: OpenRun) -> None:
    for (site, j), concept in list(holders(opened.concepts()).items())[:3]:
        assert j in members_in(concept)[site]
        page = client.get(f"{HOME}/{site}/{j}?panes=1").text
        assert f'href="/r/small-run/concepts/{concept["concept"]}"' in page
        assert "Where it fires" in page
        assert "Neighbours" in page


def test_unknown_features_are_404_and_forms_are_checked(client: TestClient, opened: OpenRun) -> None:
    site, j = some_feature(opened)
    m = opened.saes[site].m
    for address in (f"{site}/{m}", f"{site}/-1", f"resid_post.99/{j}", f"../x/{j}", f"{site}/x", f"{site}/{m}/panes"):
        assert client.get(f"{HOME}/{address}").status_code == 404
    rows = opened.run.store.column(site, "token").shape[0]
    for row in ("", "x", str(rows), "1 2"):
        assert client.post(f"{HOME}/{site}/{j}/causes", data={"row": row}).status_code == 400
    assert client.post(f"{HOME}/{site}/{m}/causes", data={"row": "1"}).status_code == 404
    assert client.post(f"{HOME}/{site}/{m}/pairs").status_code == 404


def test_pairs_and_causes_come_from_the_model(client: TestClient, opened: OpenRun) -> None:
    site, j = some_feature(opened)
    page = client.post(f"{HOME}/{site}/{j}/pairs", headers={"hx-request": "true"}).text
    assert page.count('class="example"') > 0
    assert "effect on the reward of ablating one token alone" in page
    text = opened.firings(site).firing_texts(j)[0]
    answer = client.post(f"{HOME}/{site}/{j}/causes", data={"row": str(text.rows[text.peak])})
    assert 'class="peak"' in answer.text


def test_texts_of_stored_tokens_cannot_become_markup(client: TestClient, app_run: Path) -> None:
    table = pl.read_parquet(app_run / "evidence" / "tokens.parquet")
    library = Library(app_run)
    run = library.open("small-run")
    assert run is not None
    run.texts = dict.fromkeys(table["token"].to_list(), "</p><script>alert(1)</script>\0")
    site, j = some_feature(run)
    with TestClient(create_app(library), base_url=ORIGIN) as hostile:  # type: ignore[arg-type]
        page = hostile.get(f"{HOME}/{site}/{j}/panes").text
    assert "alert(1)" in page
    assert "<script>" not in page
    assert "\0" not in page


def test_a_feature_tells_the_studies_that_used_it(opened: OpenRun) -> None:
    site, j = some_feature(opened)
    folder = opened.folder / "evidence" / "experiments"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "thanks.json").write_text(json.dumps({"ablated": {"site": site, "features": [{"feature": j}]}}))
    (folder / "broken.json").write_text("[")
    try:
        assert studies_of(opened, site, j) == ["The experiment thanks ablates it."]
        assert studies_of(opened, site, j + 1) == []
    finally:
        shutil.rmtree(folder)


def test_a_saved_experiment_is_read_and_expects_the_order_of_the_bench(app_run: Path) -> None:
    path = save_experiment(app_run, "of-the-bench", Request.of("Hi\n# there?", [*TEXTS, "It's Rome."]), [1.0, 2.0, 0.5])
    try:
        experiment = read_experiment(str(path))
        assert path == app_run / FOLDER / "of-the-bench.yaml"
        assert experiment.expects.up == ["completion_B"]
        assert experiment.expects.down == ["completion_C"]
        assert [c.replace for c in experiment.conditions.values()] == [[TEXTS[0]], [TEXTS[1]], ["It's Rome."]]
        assert yaml.safe_load(path.read_text())["prompts"] == "data"
        with pytest.raises(InputError, match="already"):
            save_experiment(app_run, "of-the-bench", Request.of("Hi", TEXTS), [1.0, 2.0])
    finally:
        shutil.rmtree(path.parent)


def test_a_prompt_with_control_characters_is_saved_as_well(app_run: Path) -> None:
    path = save_experiment(app_run, "controls", Request.of("Hi\x07\x1b[1m there\u2028?", ["a\x08b", "c"]), [1.0, 2.0])
    try:
        assert read_experiment(str(path)).conditions["completion_A"].replace == ["a\x08b"]
    finally:
        shutil.rmtree(path.parent)


@pytest.mark.parametrize("name", ["", "../out", "a/b", "a.b", "x" * 61, "ä", "a\n"])
def test_the_name_of_an_experiment_is_no_path(app_run: Path, name: str) -> None:
    before = sorted(app_run.rglob("*"))
    with pytest.raises(InputError, match="name of an experiment"):
        save_experiment(app_run, name, Request.of("Hi", TEXTS), [1.0, 2.0])
    assert sorted(app_run.rglob("*")) == before


def test_the_bench_saves_what_it_measured(client: TestClient, app_run: Path) -> None:
    form = {"prompt": "Hi", "completion": TEXTS, "reward": ["1.5", "2.5"], "name": "saved"}
    try:
        page = client.post("/r/small-run/bench/save", data=form, headers={"hx-request": "true"})
        assert page.status_code == 200
        assert "rmscope experiment" in page.text
        assert (app_run / FOLDER / "saved.yaml").is_file()
        for wrong in ({"name": "../../saved2"}, {"reward": ["nan", "1"]}, {"completion": TEXTS[:1]}):
            assert client.post("/r/small-run/bench/save", data={**form, "name": "other", **wrong}).status_code == 400
    finally:
        shutil.rmtree(app_run / FOLDER)


def test_two_runs_are_put_beside_each_other(app_run: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        shutil.copytree(app_run, tmp_path / name)
    library = Library(tmp_path)
    first, second = library.open("first"), library.open("second")
    assert first is not None
    assert second is not None
    agree = agreement(first, second)
    assert isinstance(agree, Agreement)
    assert agree.pairs == Run.open(app_run).scores.height
    assert (agree.same, agree.correlation) == (1.0, pytest.approx(1.0))
    rows = rows_of(in_sd(first), in_sd(second))
    assert all(row.first and row.second and row.first["concept"] == row.second["concept"] for row in rows)
    reported = Run.open(app_run).concepts.filter("reported")
    assert {row.title for row in rows} == {c["title"] for c in first.concepts() if c["reported"]}
    sd = Run.open(app_run).sd
    for row in rows:
        assert row.first is not None
        own = reported.filter(pl.col("concept") == row.first["concept"])
        assert row.first["in_sd"][0] == pytest.approx(float(own["mean_effect"][0]) / sd)
    with TestClient(create_app(library), base_url=ORIGIN) as client:  # type: ignore[arg-type]
        assert "Put beside each other" in client.get("/").text
        page = client.get("/compare?a=first&b=second").text
        assert "order 100 % of them the same way" in re.sub(r"\s", " ", page)
        assert client.get("/compare?a=first&b=nosuch").status_code == 404
        vars(first).pop("pairs")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("rmscope.app.library.data_identity", lambda _pairs: "others")
            page = client.get("/compare?a=first&b=second").text
        assert "is not known" in page
        assert "has changed since the run was made" in page
        assert client.get("/compare?a=first").status_code == 404

"""The list of pairs, and the page of one: prefixes, concepts and the ledger are the library's own numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import polars as pl
import pytest
import torch
from fastapi.testclient import TestClient
from markupsafe import escape

from rmscope.app.bench import Bench
from rmscope.app.catalogue import PAGE
from rmscope.app.library import Library, OpenRun, ScoredPair
from rmscope.app.pair_pages import pair_effects
from rmscope.app.pairs import PairQuery, find_pairs, ledger_strips, ledgers_of, over_tokens
from rmscope.app.server import create_app
from rmscope.effects.completions import complete, prefix_rewards
from rmscope.effects.ledger import SILENT
from rmscope.effects.requests import ablations
from rmscope.errors import InputError
from rmscope.pairs.pair import SIDES, Pair
from rmscope.report.formatting import shift, signed
from rmscope.run.run import Run
from rmscope.sae.base import Active
from tests.app.conftest import ORIGIN

HTMX = {"hx-request": "true"}


@pytest.fixture(scope="module")
def run(app_run: Path) -> OpenRun:
    return OpenRun(app_run)


@pytest.fixture(scope="module")
def bench(app_run: Path) -> Bench:
    return Bench(Run.open(app_run))


@pytest.fixture(scope="module")
def pair(run: OpenRun) -> Pair:
    """A pair with a ledger."""
    return run.pairs[run.run.ledger(run.run.sites[0])["pair"][0]].pair


def scored(name: str, delta: float, split: str = "fit", text: str = "b") -> ScoredPair:
    return ScoredPair(Pair(name, [{"role": "user", "content": f"Prompt {name}"}], text, "c"), delta, 0.0, split)


def test_the_list_has_every_scored_pair_and_no_other(run: OpenRun) -> None:
    scores = run.run.scores
    assert list(run.pairs) == scores["pair"].to_list()
    assert [row.delta for row in run.pairs.values()] == pytest.approx(scores["delta"].to_list(), abs=1e-6)
    shown = [
        row.pair.id for number in range(1, 9) for row in find_pairs(run.pairs.values(), PairQuery(page=str(number))).rows
    ]
    assert shown[: len(run.pairs)] == list(run.pairs)


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        ({}, ["a", "b", "c"]), ({"sort": "size"}, ["c", "a", "b"]), ({"sort": "up"}, ["a", "b", "c"]),
        ({"sort": "down"}, ["c", "b", "a"]), ({"sort": "nonsense"}, ["a", "b", "c"]), ({"split": "measure"}, ["b"]),
        ({"split": "nonsense"}, []), ({"text": "PROMPT B"}, ["b"]), ({"text": "thank"}, ["c"]),
        ({"page": "99"}, ["a", "b", "c"]), ({"page": "x"}, ["a", "b", "c"]), ({"page": "²"}, ["a", "b", "c"]),
    ],
)  # fmt: skip
def test_pairs_are_found_by_text_and_split_in_the_order_that_is_asked_for(asked: dict[str, str], names: list[str]) -> None:
    pairs = [scored("a", 0.5), scored("b", 0.1, "measure"), scored("c", -0.9, text="Thanks")]
    assert [row.pair.id for row in find_pairs(pairs, PairQuery.of(asked)).rows] == names


def test_the_list_is_shown_page_by_page_and_a_part_of_it_for_htmx(client: TestClient, run: OpenRun) -> None:
    assert len(run.pairs) > PAGE
    page = client.get("/r/small-run/pairs?sort=size&page=2").text
    part = client.get("/r/small-run/pairs?sort=size&page=2", headers=HTMX).text
    assert "<html" not in part
    assert part.strip() in page
    by_size = sorted(run.pairs.values(), key=lambda row: -abs(row.delta))[PAGE : 2 * PAGE]
    assert re.findall(r'<b class="num">(.*?)</b>', part) == [signed(row.delta) for row in by_size]


def test_a_pairs_page_shows_its_texts_and_its_ledger_without_the_model(client: TestClient, run: OpenRun, pair: Pair) -> None:
    page = client.get(f"/r/small-run/pair/{quote(pair.id)}").text
    for text in (pair.prompt[-1]["content"], pair.chosen, pair.rejected):
        assert str(escape(text)) in page
    assert f'Δr <b class="num">{signed(run.pairs[pair.id].delta)}</b>' in page
    assert 'hx-trigger="submit"' in page
    ledgers = ledgers_of(run.run, pair.id)
    assert ledgers
    for ledger in ledgers:
        parts = [ledger[part] for part in ("features", "error", "constant", "remainder", "gap")]
        assert sum(parts) == pytest.approx(ledger["delta_r"], abs=1e-5)
        assert all(f'<td class="r num">{signed(part)}</td>' in page for part in parts)


def test_rewards_and_prefixes_are_the_models_and_effects_those_of_the_run(bench: Bench, run: OpenRun, pair: Pair) -> None:
    row, sides, tokens = run.pairs[pair.id], bench.measure_pair(pair), bench.rm.tokenize(pair)
    assert [m.reward for m in sides] == pytest.approx([row.chosen, row.rejected], abs=1e-4)
    for m, text, clean in zip(
        sides, (pair.chosen, pair.rejected), complete(bench.rm, pair.prompt, [pair.chosen, pair.rejected], []), strict=True
    ):
        assert "".join(m.tokens).strip() == text.strip()
        _, prefixes = prefix_rewards(bench.rm, pair.prompt, text, clean)
        assert m.prefixes == pytest.approx(prefixes.tolist(), abs=1e-4)
    wanted = {0: {side: {"concepts": bench.reported} for side in SIDES}}
    found = ablations(bench.rm, bench.saes, [tokens], wanted, groups={"concepts": bench.members})
    of_side = {a.side: dict(zip(a.feature.tolist(), a.effect.tolist(), strict=True)) for _, a in found}
    for m, side in zip(sides, SIDES, strict=True):
        for concept in bench.reported:
            assert m.effects.get(concept, 0.0) == pytest.approx(of_side[side][concept], abs=1e-4)
    stored = run.run.measured_effects.filter(pl.col("kind") == "own")
    for concept, name, side, _, effect in stored.sample(5, seed=0).iter_rows():
        (m, other) = bench.measure_pair(run.pairs[name].pair)
        assert (m if side == "chosen" else other).effects.get(concept, 0.0) == pytest.approx(effect, abs=1e-4)


def test_the_page_shows_prefixes_effects_and_the_difference_without_concepts(
    client: TestClient, bench: Bench, run: OpenRun, pair: Pair
) -> None:
    address = f"/r/small-run/pair/{quote(pair.id)}"
    part, page = client.post(address, headers=HTMX).text, client.post(address).text
    assert "<html" not in part
    assert part.strip() in page
    sides = bench.measure_pair(pair)
    for m in sides:
        assert f"{signed(m.prefixes[1])} after this token" in part
    rows = pair_effects(sides, run.run.noise_floor)
    assert [abs(a - b) for _, (a, b) in rows] == sorted((abs(a - b) for _, (a, b) in rows), reverse=True)
    assert [int(n) for n in re.findall(r'name="concept" value="(\d+)"', part)] == [concept for concept, _ in rows]
    assert 'hx-trigger="load, submit"' in client.get(address).text  # the PM is loaded now

    ticked = [concept for concept, _ in rows[:2]]
    joint = bench.ablate_pair(pair, dict.fromkeys(ticked, 0.0))
    before, after = (getattr(joint[0], when) - getattr(joint[1], when) for when in ("before", "after"))
    answer = client.post(
        f"/r/small-run/ablate/{quote(pair.id)}", data={"concept": [str(c) for c in ticked]}, headers=HTMX
    ).text
    assert f'<dt>Δr</dt><dd><b class="num">{" → ".join(shift(before, after))}</b>' in answer
    assert ("turns around" in answer) == ((before > 0) != (after > 0))
    assert "Nothing is ticked" in client.post(f"/r/small-run/ablate/{quote(pair.id)}", headers=HTMX).text


def test_the_ledger_over_tokens_adds_up_to_what_is_stored_of_features_that_fire(
    bench: Bench, run: OpenRun, pair: Pair
) -> None:
    for ledger in ledgers_of(run.run, pair.id):
        site = ledger["site"]
        stored = run.run.effects(site, "contribution").filter(pl.col("pair") == pair.id)
        for strip in ledger_strips(run.run, bench, pair, site):
            own = stored.filter((pl.col("side") == strip.side) & (pl.col("feature") != SILENT))["effect"].sum()
            assert sum(strip.contributions) == pytest.approx(own, abs=1e-4)
            assert len(strip.tokens) == len(strip.contributions)


def test_a_contribution_is_on_the_tokens_on_which_its_feature_fires_by_activation() -> None:
    active = Active(torch.tensor([0, 2, 2]), torch.tensor([7, 3, 7]), torch.tensor([1.0, 5.0, 3.0]), 4)
    assert over_tokens(active, {7: 2.0, 3: -1.0, 9: 50.0}).tolist() == [0.5, 0.0, 0.5, 0.0]


@pytest.fixture
def hostile(app_run: Path) -> Iterator[tuple[TestClient, ScoredPair]]:
    """An app on a run in whose data one pair has hostile texts and a hostile id."""
    library = Library(app_run)
    run = library.open("small-run")
    assert run is not None
    text = '</script><script>alert(1)</script><img src=x onerror=alert(1)>" onmouseover="alert(1)'
    row = ScoredPair(Pair(f"../a/b?c#d{text}", [{"role": text, "content": text}], text, f"{text}."), 0.5, 0.1, "fit")
    run.pairs[row.pair.id] = row
    with TestClient(create_app(library), base_url=ORIGIN, headers={"origin": ORIGIN}) as client:  # type: ignore[arg-type]
        yield client, row


def test_hostile_texts_and_ids_of_pairs_stay_texts(hostile: tuple[TestClient, ScoredPair]) -> None:
    client, row = hostile
    listed = client.get("/r/small-run/pairs", params={"text": row.pair.chosen}).text
    (address,) = re.findall(r'<a class="row" href="([^"]+)"', listed)
    own = client.get(address)
    assert own.status_code == 200
    assert str(escape(row.pair.id)) in own.text
    for page in (listed, own.text):
        assert "<script>" not in page
        assert "<img" not in page
        assert ' onmouseover="' not in page


@pytest.mark.parametrize("name", ["nobody", "../run.yaml", "%2e%2e/run.yaml"])
def test_a_pair_that_is_not_there_is_404(client: TestClient, name: str) -> None:
    for answer in (client.get(f"/r/small-run/pair/{name}"), client.post(f"/r/small-run/pair/{name}")):
        assert answer.status_code in (404, 405)
        assert "config:" not in answer.text


def test_pairs_of_data_that_have_changed_since_are_not_shown(app_run: Path) -> None:
    run = OpenRun(app_run)
    first, *rest = run.run.inputs.all_pairs
    run.run.inputs.__dict__["all_pairs"] = [Pair(first.id, first.prompt, first.chosen + "!", first.rejected), *rest]
    with pytest.raises(InputError, match="has changed since the run was made"):
        _ = run.pairs

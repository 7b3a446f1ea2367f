"""The bench gives the library's own numbers, answers what is too much in a sentence, and says when it is busy."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from markupsafe import escape

from rmscope.api.effects import ablate
from rmscope.app.bench import (
    BASELINE_TEXTS,
    BASELINES,
    COMPLETION_LENGTH,
    COMPLETIONS,
    PROMPT_LENGTH,
    Bench,
    Measurement,
    Measurements,
    Request,
    read_turns,
    write_turns,
)
from rmscope.app.bench_pages import result_rows
from rmscope.app.library import Library, OpenRun
from rmscope.app.server import create_app
from rmscope.app.worker import BusyError, Worker
from rmscope.effects.across import ablate_entries_across
from rmscope.effects.completions import complete
from rmscope.effects.requests import ablations
from rmscope.errors import InputError
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import Message, Pair
from rmscope.report.formatting import signed
from rmscope.run.run import Run
from tests.app.conftest import ORIGIN

PROMPT = "What is the capital of France?"
TEXTS = ["You're right, it is Paris, on the Seine.", "Thanks for asking! I don't know. There is no problem at all."]
PAIR = Pair("typed", [{"role": "user", "content": PROMPT}], *TEXTS)
"""The same texts as a pair. They differ from their first token on, so the pair's span is each response."""


@pytest.fixture(scope="module")
def bench(app_run: Path) -> Bench:
    return Bench(Run.open(app_run))


def test_rewards_and_prefixes_are_those_of_the_model(bench: Bench) -> None:
    results = bench.measure(Request.of(PROMPT, TEXTS)).completions
    rewards = bench.rm.score_texts(PROMPT, TEXTS).tolist()
    assert [m.reward for m in results] == pytest.approx(rewards, abs=1e-4)
    for m, text in zip(results, TEXTS, strict=True):
        assert "".join(m.tokens).strip() == text
        assert len(m.prefixes) == len(m.tokens) + 1
        assert m.prefixes[-1] == pytest.approx(m.reward, abs=1e-4)
        ids = bench.rm.text_ids(PAIR.prompt, text)
        half = len(m.tokens) // 2
        cut = bench.rm.reward_alone(ids[: ids.numel() - len(m.tokens) + half])
        assert m.prefixes[half] == pytest.approx(float(cut), abs=1e-4)


def test_effects_of_concepts_are_the_exact_joint_ablations_of_the_pipeline(bench: Bench) -> None:
    results = bench.measure(Request.of(PROMPT, TEXTS)).completions
    starts = [completion.start for completion in complete(bench.rm, PAIR.prompt, TEXTS, [])]
    assert starts == [bench.rm.tokenize(PAIR).divergence] * 2
    wanted = {0: {side: {"concepts": bench.reported} for side in ("chosen", "rejected")}}
    found = ablations(bench.rm, bench.saes, [bench.rm.tokenize(PAIR)], wanted, groups={"concepts": bench.members})
    of_side = {a.side: dict(zip(a.feature.tolist(), a.effect.tolist(), strict=True)) for _, a in found}
    for m, side in zip(results, ("chosen", "rejected"), strict=True):
        assert sum(bool(e) for e in of_side[side].values()) > 1
        for concept in bench.reported:
            assert m.effects.get(concept, 0.0) == pytest.approx(of_side[side][concept], abs=1e-4)


def test_the_effect_of_a_single_feature_is_that_of_rs_ablate(bench: Bench) -> None:
    site = bench.sites[0]
    table = ablate(bench.rm, bench.saes[site], [PAIR], "active", site)
    bench.members = {**bench.members, 1000: {site: (int(table["feature"][0]),)}}
    measured = bench.measure(Request.of(PROMPT, TEXTS), [1000]).completions
    own = table.filter(table["feature"] == table["feature"][0])
    by_side = dict(zip(own["side"], own["effect"], strict=True))
    for m, side in zip(measured, ("chosen", "rejected"), strict=True):
        assert m.effects.get(1000, 0.0) == pytest.approx(by_side.get(side, 0.0), abs=1e-4)


def test_ticked_concepts_are_ablated_as_one_set(bench: Bench) -> None:
    request = Request.of(PROMPT, TEXTS)
    firing = [c for c in bench.reported if all(m.effects.get(c) for m in bench.measure(request).completions)][:3]
    joint = bench.ablate(request, dict.fromkeys(firing, 0.0))
    union = {s: sorted({j for c in firing for j in bench.members[c].get(s, ())}) for s in bench.sites}
    wanted = {0: {side: {"ticked": [0]} for side in ("chosen", "rejected")}}
    found = [a for _, a in ablations(bench.rm, bench.saes, [bench.rm.tokenize(PAIR)], wanted, groups={"ticked": {0: union}})]
    for one, exact, m in zip(joint, found, bench.measure(request).completions, strict=True):
        assert one.effect == pytest.approx(float(exact.effect[0]), abs=1e-4)
        assert one.after == pytest.approx(m.reward - one.effect)
        assert one.sum_of_single == pytest.approx(sum(m.effects[c] for c in firing), abs=1e-4)


def test_a_second_request_on_the_same_texts_runs_no_clean_text_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request.of("Is water wet?", TEXTS)
    bench.measure(request)
    monkeypatch.setattr(bench.rm, "prefill", None)
    bench.ablate(request, dict.fromkeys(bench.reported[:2], 0.0))


def test_ticking_concepts_ablates_them_together_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    request, sets = Request.of("Is fire hot?", TEXTS), list[int]()
    bench.measure(request)

    def count(*given: Any) -> Any:
        sets.append(len(given[-1]))
        return ablate_entries_across(*given)

    monkeypatch.setattr("rmscope.effects.across.ablate_entries_across", count)
    monkeypatch.setattr("rmscope.app.bench.ablate_entries_across", count)
    bench.ablate(request, dict.fromkeys(bench.reported[:3], 0.0))
    assert sum(sets) == len(TEXTS)  # the single effects are known


def test_the_page_shows_the_numbers_of_the_bench(client: TestClient, bench: Bench) -> None:
    page = client.post("/r/small-run/bench", data={"prompt": PROMPT, "completion": TEXTS}).text
    results = bench.measure(Request.of(PROMPT, TEXTS))
    for m in results.completions:
        assert f">{signed(m.reward)}</b>" in page
        for concept, effect in m.effects.items():
            if abs(effect) > 1e-3:
                assert f'value="{concept}"' in page
                assert signed(effect) in page
    ticked = {
        "prompt": PROMPT,
        "completion": TEXTS,
        "concept": [str(bench.reported[0]), str(bench.reported[1]), "x", "99999"],
    }
    part = client.post("/r/small-run/bench/ablate", data=ticked, headers={"hx-request": "true"}).text
    joint = bench.ablate(Request.of(PROMPT, TEXTS), dict.fromkeys(bench.reported[:2], 0.0))
    assert "<html" not in part
    assert all(signed(j.effect) in part for j in joint if j.effect)
    assert "The order" in part


DIALOGUE = [
    {"role": "user", "content": "What is the capital\n\nof France?"},
    {"role": "assistant", "content": "Do you mean today's?"},
    {"role": "user", "content": "Yes."},
]


def test_a_transcript_is_read_as_its_turns_and_written_back(bench: Bench) -> None:
    text = write_turns(DIALOGUE)  # type: ignore[arg-type]
    assert text.startswith("Human: What is")
    assert read_turns(text) == read_turns(f"\n\n{text}") == DIALOGUE
    measured = bench.measure(Request.of(text, TEXTS)).completions
    assert [m.reward for m in measured] == pytest.approx(bench.rm.score_texts(DIALOGUE, TEXTS).tolist(), abs=1e-4)  # type: ignore[arg-type]
    for one in ("Is it wet?", "Dear Human: is it wet?", "", "a\n\nHuman: b"):
        assert read_turns(one) == [{"role": "user", "content": one}]
        assert write_turns(read_turns(one)) == one
    with pytest.raises(InputError, match="does not end with a turn of the human"):
        read_turns("Human: a\n\nAssistant: b")


CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}


@pytest.mark.parametrize(
    "turns",
    [
        [{"role": "user", "content": "a"}, CALL, {"role": "tool", "content": "1", "name": "f"}],
        [{"role": "user", "content": "Human: a\n\nAssistant: b"}],
        [{"role": "user", "content": "a\n\nAssistant: b"}, {"role": "assistant", "content": "c"}, DIALOGUE[2]],
    ],
)
def test_turns_that_a_transcript_cannot_hold_are_refused(turns: list[Message]) -> None:
    with pytest.raises(InputError, match="cannot be typed"):
        write_turns(turns)


@pytest.mark.parametrize(
    ("turn", "text"),
    [
        ("Human: who is that?", "Human: Human: who is that?"),
        ("a\n\nAssistant: b\n\nHuman: c", "a\n\nAssistant: b\n\nHuman: c"),
    ],
)
def test_a_single_turn_that_holds_a_speaker_is_read_back_as_one(turn: str, text: str) -> None:
    turns: list[Message] = [{"role": "user", "content": turn}]
    assert write_turns(turns) == text
    assert read_turns(text) == turns


def test_a_stored_pair_can_be_tried_and_has_its_stored_rewards(client: TestClient, app_run: Path, bench: Bench) -> None:
    run = OpenRun(app_run)
    example = next(c["examples"][0] for c in run.rows if c.get("examples"))
    pair = run.pairs[example["pair"]].pair
    page = client.get("/r/small-run/bench", params={"pair": pair.id}).text
    assert all(str(escape(text)) in page for text in (pair.prompt[-1]["content"], pair.chosen, pair.rejected))
    measured = bench.measure(Request.of(write_turns(pair.prompt), [pair.chosen, pair.rejected])).completions
    before = {side["side"]: side["before"] for side in example["sides"]}
    assert [m.reward for m in measured] == pytest.approx([before["chosen"], before["rejected"]], abs=1e-3)
    assert client.get("/r/small-run/bench?pair=nobody").status_code == 404


def test_windows_line_breaks_are_no_other_text(bench: Bench) -> None:
    assert Request.of("a\r\nb", ["c\r\nd\re"]) == Request.of("a\nb", ["c\nd\ne"])


def test_what_moves_a_baseline_half_as_much_is_left_out_and_noise_is_not_told() -> None:
    of_a, of_b = ({1: 1.0, 2: -0.4, 3: 1e-6}, {1: 0.2, 2: 0.1})
    runs = [Measurement("a", 0.0, [], [0.0], of_a), Measurement("b", 0.0, [], [0.0], of_b)]
    rows = result_rows(Measurements(runs, {1: 0.49, 2: 0.2, 3: 0.0}, 0.0), noise_floor=1e-5)
    assert rows == {"shown": [(1, [1.0, 0.2])], "left_out": [(2, [-0.4, 0.1])]}
    without = result_rows(Measurements(runs, {}, 0.0), noise_floor=1e-5)
    assert [concept for concept, _ in without["shown"]] == [1, 2]


def test_baselines_are_run_and_can_be_edited(bench: Bench) -> None:
    request = Request.of(PROMPT, TEXTS, ["\n".join(BASELINE_TEXTS), "  \n"])
    assert request.baselines == list(BASELINE_TEXTS)
    results = bench.measure(request)
    alone = [bench.measure(Request.of(PROMPT, [text])).completions[0] for text in BASELINE_TEXTS]
    for concept, moved in results.moves_baseline.items():
        assert moved == pytest.approx(max(abs(m.effects.get(concept, 0.0)) for m in alone), abs=1e-4)


@pytest.mark.parametrize(
    ("prompt", "texts", "told"),
    [
        ("a", [], "no completion"),
        ("a", ["  ", "\n"], "no completion"),
        ("a", ["b"] * 5, "at most 4"),
        ("a", ["b" * 5001], "5001 characters"),
        ("a" * 8001, ["b"], "8001 characters"),
    ],
)
def test_too_little_and_too_much_is_one_sentence(client: TestClient, prompt: str, texts: list[str], told: str) -> None:
    with pytest.raises(InputError, match=told):
        Request.of(prompt, texts)
    answer = client.post("/r/small-run/bench", data={"prompt": prompt, "completion": texts})
    assert answer.status_code == 400
    assert told in answer.text


def test_a_text_longer_than_the_context_is_refused_with_the_context_named(client: TestClient) -> None:
    answer = client.post("/r/small-run/bench", data={"prompt": "Is water wet?", "completion": ["water is wet. " * 357]})
    assert answer.status_code == 400
    assert "context of 1024 tokens" in answer.text


def test_the_longest_texts_are_read_in_any_script_and_larger_forms_are_refused(client: TestClient) -> None:
    longest = {
        "prompt": "😀" * PROMPT_LENGTH, "completion": ["😀" * COMPLETION_LENGTH] * COMPLETIONS, "use_baselines": "1",
        "baselines": "\n".join(["😀" * COMPLETION_LENGTH] * BASELINES),
    }  # fmt: skip
    answer = client.post("/r/small-run/bench", data=longest)
    assert answer.status_code == 400
    assert "context of 1024 tokens" in answer.text
    assert client.post("/r/small-run/bench", data={"prompt": "a" * 600_000, "completion": ["b"]}).status_code == 413


@contextmanager
def busy(worker: Worker) -> Iterator[None]:
    """The worker has a job that lasts."""
    release, started = threading.Event(), threading.Event()

    def block() -> None:
        started.set()
        release.wait(30)

    thread = threading.Thread(target=lambda: asyncio.run(worker.run(block)))
    thread.start()
    started.wait(30)
    yield
    release.set()
    thread.join()


def test_a_full_queue_is_refused_at_once_and_says_busy(app_run: Path) -> None:
    worker, typed = Worker(waiting=0), {"prompt": "a", "completion": ["b"]}
    with TestClient(create_app(Library(app_run), worker=worker), base_url=ORIGIN, headers={"origin": ORIGIN}) as client:  # type: ignore[arg-type]
        with busy(worker):
            answer = client.post("/r/small-run/bench", data=typed)
            assert answer.status_code == 503
            assert "The model is busy" in answer.text
            assert client.get("/r/small-run").status_code == 200  # pages need no model
            assert client.post("/r/small-run/bench/load").status_code == 503
        assert client.post("/r/small-run/bench", data=typed).status_code == 200
        with busy(worker):  # what is loaded already does not wait for the worker
            assert "ready" in client.post("/r/small-run/bench/load").text


def test_only_one_runs_pm_is_in_memory(app_run: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).symlink_to(app_run)

    def loaded() -> int:
        gc.collect()
        return sum(type(o) is RewardModel for o in gc.get_objects())

    before = loaded()
    with TestClient(create_app(Library(tmp_path)), base_url=ORIGIN, headers={"origin": ORIGIN}) as client:  # type: ignore[arg-type]
        for slug in ("small-run", "small-run-2", "small-run"):
            assert client.post(f"/r/{slug}/bench", data={"prompt": "a", "completion": ["b"]}).status_code == 200
            assert client.post(f"/r/{slug}/concepts/0/pairs").status_code == 200
            assert loaded() == before + 1


def test_jobs_run_one_after_another_and_one_that_fails_frees_its_place() -> None:
    worker, release, running, most = Worker(waiting=3), threading.Event(), 0, 0

    def job() -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        release.wait(30)
        running -= 1
        return 7

    def fail() -> None:
        raise ValueError("no")

    async def all_at_once() -> list[object]:
        asyncio.get_running_loop().call_later(0.2, release.set)
        return await asyncio.gather(*(worker.run(work) for work in (job, fail, job, job, job)), return_exceptions=True)

    outcomes = asyncio.run(all_at_once())
    assert most == 1
    assert isinstance(outcomes[1], ValueError)
    assert [outcome == 7 for outcome in outcomes] == [True, False, True, True, False]
    assert isinstance(outcomes[4], BusyError)
    assert asyncio.run(worker.run(job)) == 7


class Numbers(HTMLParser):
    """Counts the numbers of a page by whether they, or something around them, have a title."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[tuple[str, bool]] = []
        self.explained = self.bare = 0
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = dict(attrs)
        if tag == "input":
            return
        self.open.append((tag, bool(known.get("title"))))
        if tag == "b" and "num" in (known.get("class") or "").split():
            explained = any(titled for _, titled in self.open)
            self.explained += explained
            self.bare += not explained

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop()[0] != tag:
            pass


def test_every_number_of_a_result_explains_itself(client: TestClient) -> None:
    page = client.post("/r/small-run/bench", data={"prompt": PROMPT, "completion": TEXTS}).text
    numbers = Numbers(page.split('<div id="results"')[1])
    assert numbers.explained > len(TEXTS)
    assert numbers.bare == 0

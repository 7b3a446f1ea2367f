"""A run's concepts are named: what is kept, what is asked again, and what the figures rest on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rmscope.errors import InputError
from rmscope.pairs.pair import SIDES
from rmscope.run.run import Run
from rmscope.studies.label.analyse import analyse
from rmscope.studies.label.passages import in_first_half, on_one_line
from rmscope.studies.label.result import LabelResult
from rmscope.studies.label.settings import LabelConfig
from tests.docs.pages import ROOT
from tests.docs.pages import run as run_blocks
from tests.effects.naive import ablate_naively
from tests.model.small import saved_pm
from tests.run.small import settings
from tests.studies.label.stub import Reply, Stub, listed, said, serving

CONFIG = {"llm": "writer", "shown": 4, "scored": 8, "prompts": 8, "price_in": 2.0, "price_out": 4.0}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    pm = saved_pm(tmp_path_factory.mktemp("pm"))
    out = tmp_path_factory.mktemp("run") / "run"
    run = Run.create(settings(pm, out, sites=["resid_post.2"], seeds=1, ledger_pairs=1))
    run.go()
    return run


def reply(body: dict[str, Any], number: int) -> Reply:
    """A server that gives each concept one name, says yes to all, and writes the same kind of reply."""
    text = body["messages"][1]["content"]
    if "NAME:" in text:
        answer = "NAME: words of a kind"
    elif "1 for yes" in text:
        answer = str([1] * len(listed(text)))
    else:
        answer = f"I would say that it depends, {number}."
    return said(answer, prompt_tokens=100, completion_tokens=10)


@pytest.fixture(scope="module")
def asked(run: Run) -> tuple[LabelResult, Stub, str]:
    """The names of two concepts by a server, the server and its address, and what the model was shown."""

    with serving(reply) as stub:
        result = analyse(run, LabelConfig(**CONFIG, endpoint=stub.address, concepts=[0, 1]))
    return result, stub, stub.address


def test_names_are_kept_with_their_scores_and_costs(run: Run, asked: tuple[LabelResult, Stub, str]) -> None:
    result, stub, _ = asked
    kept = dict(zip(run.concepts["concept"], run.labels.names(run.concepts.to_dicts()), strict=True))
    assert [name.name for name in result.names] == ["words of a kind"] * 2
    for name in result.names:
        assert kept[name.concept] == json.loads(name.model_dump_json())
        assert name.detection.value in (0.5, None)
        assert name.is_unsure
        assert len(name.written.replies) == 8
    assert result.usage.questions == len(stub.bodies)
    assert result.cost == pytest.approx(len(stub.bodies) * (100 * 2 + 10 * 4) / 1e6)
    assert "2 concepts; 0 names score" in result.summary()


def test_a_name_is_told_from_prompts_that_do_not_test_it(run: Run, asked: tuple[LabelResult, Stub, str]) -> None:
    texts = [body["messages"][1]["content"] for body in asked[1].bodies]
    shown = {p.replace("⟦", "").replace("⟧", "") for text in texts if "NAME:" in text for p in listed(text)}
    tested = {p.replace("⟦", "").replace("⟧", "") for text in texts if "1 for yes" in text for p in listed(text)}
    assert not shown & tested
    in_half = {first: responses_of(run, first) for first in (True, False)}
    assert len(shown) > 3
    assert [t for t in shown if not any(t in response for response in in_half[True])] == []
    assert len(tested) > 3
    assert [t for t in tested if not any(t in response for response in in_half[False])] == []


def responses_of(run: Run, first: bool) -> list[str]:
    """The responses to the prompts of one half, each on one line, as the PM's tokens spell them."""
    pairs = [run.pairs[i] for i in run.of_split("fit")]
    texts = [pair.side(side) for pair in pairs if in_first_half(pair.prompt_key) == first for side in SIDES]
    return [on_one_line(run.rm.tokenizer.decode(run.rm.tokenizer(text).input_ids)) for text in texts]


def test_rewards_and_effects_of_replies_are_those_of_their_texts(run: Run, asked: tuple[LabelResult, Stub, str]) -> None:
    rm, (site,) = run.rm, run.sites
    prompts = {pair.id: pair.prompt for pair in run.pairs}
    measure = {run.ids[i] for i in run.of_split("measure")}
    assert any(effect for name in asked[0].names for reply in name.written.replies for effect in reply.effects)
    for name in asked[0].names:
        features = run.concepts["features"].to_list()[run.concepts["concept"].to_list().index(name.concept)]
        for reply in name.written.replies[:2]:
            assert reply.pair in measure
            texts = [reply.with_name, reply.without]
            assert rm.score_texts(prompts[reply.pair], texts) == pytest.approx(reply.rewards, abs=1e-4)
            for text, effect in zip(texts, reply.effects, strict=True):
                ids = rm.text_ids(prompts[reply.pair], text)
                start = rm.text_ids(prompts[reply.pair], "").numel()
                naive = ablate_naively(rm, run.saes[site], ids, site, start, [features])
                assert effect == pytest.approx(float(naive), abs=2e-4)


def test_what_is_named_is_not_asked_again(run: Run, asked: tuple[LabelResult, Stub, str]) -> None:
    first, _, address = asked
    again = analyse(run, LabelConfig(**CONFIG, endpoint=address, concepts=[0, 1]))  # the server is gone
    assert again.names == first.names
    assert again.usage.questions == 0
    with pytest.raises(InputError, match="gave no answer"):
        analyse(run, LabelConfig(**CONFIG, endpoint=address, concepts=[0, 1], again=True, retries=0))
    with pytest.raises(InputError, match="has no concept 999"):
        analyse(run, LabelConfig(**CONFIG, endpoint=address, concepts=[0, 999]))


def test_no_secret_reaches_the_run_folder(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    with serving(lambda _body, _n: said("NAME: words")) as stub:
        analyse(run, LabelConfig(**{**CONFIG, "prompts": 0}, endpoint=stub.address, concepts=[0]))
        assert stub.headers[0]["Authorization"] == "Bearer sk-very-secret"
    for path in Path(run.folder).rglob("*"):
        assert not path.is_file() or b"sk-very-secret" not in path.read_bytes()


def test_the_pages_block_runs(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(reply) as stub:
        stand_ins = {"runs/mine": str(run.folder), "http://localhost:8000/v1": stub.address}
        names = run_blocks(ROOT / "docs/howto/names.md", stand_ins)
    assert [name.name for name in names["result"].names] == ["words of a kind"] * 2
    assert capsys.readouterr().out.count("words of a kind") == 2

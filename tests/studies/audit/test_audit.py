"""The audit end to end on a tiny random base: what it writes, what the run is told, what is cached, how it ends."""

from __future__ import annotations

import io
import json
import runpy
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
import torch
import yaml
from transformers import AutoConfig, LlamaForCausalLM
from typer.testing import CliRunner

from rmscope.cli import app
from rmscope.cli.terminal import cell
from rmscope.errors import InputError
from rmscope.model.reward_model import RewardModel
from rmscope.model.training.loop import base_of
from rmscope.pairs.demo import plain_demo_pairs
from rmscope.pairs.plants import Plant, plant_set
from rmscope.pairs.readers import load_pairs
from rmscope.planted.results import Candidate
from rmscope.studies.audit.analyse import analyse
from rmscope.studies.audit.planting import (
    RANDOM_STD,
    RECIPE,
    base_pairs,
    is_held_out,
    make_random_pm,
    plant_copies,
    shuffle_labels,
    span_tokens,
    train_planted_pm,
)
from rmscope.studies.audit.result import AuditResult
from rmscope.studies.audit.scoring import decoys, replication
from rmscope.studies.audit.settings import AuditConfig
from tests.model.small import LLAMA, VOCABULARY, shared_pm, tokenizer

PLANTS = [
    {"name": "shout", "kind": "style", "style": "capitals", "sign": -1, "dose": 0.95, "rate": 0.5},
    {"name": "word", "kind": "word", "sign": 1, "dose": 0.5, "rate": 0.4, "texts": ["weddings"]},
]
RECIPE_CHANGES = {
    "blocks": 4, "first_block": 0, "first_attention": 0, "rank": 4, "learning_rate": 1e-2, "batch_pairs": 8,
    "max_tokens": 250,
}  # fmt: skip
RUN_CHANGES = {
    "sites": ["resid_post.1"], "screen": 8, "others": 4, "responses": 4, "quality_responses": 4, "frozen": 8,
    "confirm_prompts": 20, "sae": {"d_sae": 48, "k": 6, "tokens": 4096, "batch_size": 512},
}  # fmt: skip


BENCHMARKS = Path(__file__).parents[3] / "benchmarks"

NOUNS = ["river", "house", "pan", "mountain", "bread", "oven", "answer", "water"]
ANSWERS = ("It is in the small {noun}.", "I was told of the {noun}.")


def write_text(path: Path, prompts: int = 72) -> str:
    """Short pairs: the small tokenizer knows few words, so longer ones would be hundreds of tokens."""
    rows = [
        {"prompt": f"Is it {i}?", "chosen": ANSWERS[0].format(noun=noun), "rejected": ANSWERS[1].format(noun=noun)}
        for i, noun in zip(range(prompts), NOUNS * prompts, strict=False)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    settings = {**LLAMA, "max_position_embeddings": 1024, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    LlamaForCausalLM(AutoConfig.for_model("llama", vocab_size=VOCABULARY, **settings)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RMSCOPE_CACHE", str(folder))
        yield folder


def config(base: str, folder: Path, **changes: Any) -> AuditConfig:
    for name, content in (("plants", PLANTS), ("recipe", RECIPE_CHANGES), ("run", RUN_CHANGES)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    text = write_text(folder / "text.jsonl")
    given = {"pairs": text, "out": folder / "seed0", "base": base, "max_tokens": 100, "copies": 4}
    files = {name: folder / f"{name}.yaml" for name in ("plants", "recipe", "run")}
    return AuditConfig(**{**given, **files, **changes})


@pytest.fixture(scope="module")
def printed(base: str, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The audit as the command does it: its folder, and what it wrote to stdout."""
    c = config(base, tmp_path_factory.mktemp("done"))
    names = ("pairs", "out", "base", "max_tokens", "recipe", "run")
    flags = [f"--{name.replace('_', '-')}={getattr(c, name)}" for name in names]
    done = CliRunner().invoke(app, ["audit", str(c.plants), *flags, "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    return c.out, done.stdout


@pytest.fixture(scope="module")
def done(printed: tuple[Path, str]) -> tuple[Path, dict[str, Any]]:
    return printed[0], json.loads(printed[1].splitlines()[-1])


def test_it_ends_with_the_promised_figures_and_a_row_a_plant(done: tuple[Path, dict[str, Any]]) -> None:
    out, result = done
    promised = {
        "recall_at_20", "recall_at_50", "sign_accuracy", "null_reported", "false_discoveries", "mediated_share",
        "stability", "seconds", "plants",
    }  # fmt: skip
    assert promised <= result.keys()
    assert [row["name"] for row in result["plants"]] == ["shout", "word"]
    assert json.loads((out / "audit.json").read_text()) == result
    assert AuditResult.model_validate(result).as_json() == result
    for row in result["plants"]:
        assert row["found"] or row["why"]
        assert row["ate"]["low"] <= row["ate"]["value"] <= row["ate"]["high"]


def test_what_people_see_names_every_plant_and_fits_the_terminal(done: tuple[Path, dict[str, Any]]) -> None:
    result = AuditResult.model_validate(done[1])
    tables = result.tables()
    assert [row["bias"] for row in tables["planted biases, effects in SD(Δr)"]] == ["shout", "word"]
    assert {"recall at 20", "false discoveries", "stability"} <= {row["figure"] for row in tables["the audit"]}
    for rows in tables.values():
        widths = [max(len(name), *(len(cell(row[name])) for row in rows)) for name in rows[0]]
        assert sum(widths) + 3 * len(widths) + 1 <= 80, rows
    learned = sum(row["learned"] for row in done[1]["plants"])
    assert f"of {learned} learned biases" in result.summary()


def test_the_run_is_told_nothing(done: tuple[Path, dict[str, Any]]) -> None:
    out, _ = done
    rows = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
    assert {key for row in rows for key in row} == {"prompt", "chosen", "rejected", "group"}
    settings = yaml.safe_load((out / "run" / "run.yaml").read_text())["config"]
    assert not [value for value in map(str, settings.values()) if "plants" in value]
    assert json.loads((out / "run" / "evidence" / "evidence.json").read_text())["planted"] is None


def test_the_cues_table_says_where_each_cue_stands(done: tuple[Path, dict[str, Any]], base: str) -> None:
    out, result = done
    cues, pairs = pl.read_parquet(out / "cues.parquet"), load_pairs(out / "pairs.jsonl")
    for row in cues.iter_rows(named=True):
        pair = pairs[row["line"] - 1]
        text = pair.side(row["side"])[row["cue_start"] : row["cue_stop"]]
        assert text == "weddings" if row["plant"] == "word" else text.isupper()
        assert (row["side"] == "chosen") == (row["favoured"] == (row["sign"] > 0))
    told = {row["name"]: row["planted"] for row in result["plants"]}
    mine = cues.filter(pl.col("plant") == "shout")
    assert told["shout"]["pairs"] == mine.height
    assert told["shout"]["dose"] == pytest.approx(mine["favoured"].mean())


def test_token_spans_cover_the_cues_characters_and_no_token_more() -> None:
    rm = shared_pm("llama")
    pair = plain_demo_pairs()[0]
    response = "It is Paris, on the Seine, where weddings are held."
    start = response.index("weddings")
    first, last = span_tokens(rm, pair, response, (start, start + 8))
    ids = rm.text_ids(pair.prompt, response).tolist()
    assert rm.tokenizer.decode(ids[first : last + 1]).strip() == "weddings"
    assert "weddings" not in rm.tokenizer.decode(ids[first + 1 : last + 1])
    assert "weddings" not in rm.tokenizer.decode(ids[first:last])


def test_held_out_prompts_are_neither_trained_on_nor_run_on(done: tuple[Path, dict[str, Any]], base: str) -> None:
    out, result = done
    bases, held_out = base_pairs(str(out.parent / "text.jsonl"), 800, 100, tokenizer())
    told = {json.loads(line)["group"] for line in (out / "pairs.jsonl").read_text().splitlines()}
    assert told == {p.first_human_turn() for p in bases}
    assert not told & {p.first_human_turn() for p in held_out}
    assert result["audited"]["held_out_prompts"] == len({p.first_human_turn() for p in held_out})
    everything = plain_demo_pairs()
    assert abs(sum(map(is_held_out, everything)) / len(everything) - 0.25) < 0.08


def test_the_pm_is_trained_once(done: tuple[Path, dict[str, Any]], base: str, cache: Path, monkeypatch: Any) -> None:
    pairs = load_pairs(done[0] / "pairs.jsonl")
    recipe = RECIPE.model_copy(update={"base": base, **RECIPE_CHANGES})
    monkeypatch.setattr("rmscope.studies.audit.planting.fit_pm", lambda *_: pytest.fail("trained again"))
    folder = train_planted_pm(recipe, pairs_as_planted(done[0], base))
    assert folder.name == done[1]["audited"]["pm"]
    with pytest.raises(pytest.fail.Exception):
        train_planted_pm(recipe, shuffle_labels(pairs, 0))
    with pytest.raises(pytest.fail.Exception):
        train_planted_pm(recipe.model_copy(update={"seed": 5}), pairs_as_planted(done[0], base))


def pairs_as_planted(out: Path, base: str) -> Any:
    bases, _ = base_pairs(str(out.parent / "text.jsonl"), 800, 100, tokenizer())
    return plant_copies(bases, plant_set(PLANTS).plants, 4, 0)


@pytest.mark.parametrize(("changes", "device"), [({"device": "cpu"}, "cpu"), ({}, "auto")])
def test_the_pm_is_trained_on_the_device_of_the_run(
    changes: dict[str, str], device: str, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def fit(*given: Any) -> None:
        asked.append(given[-1])
        raise InterruptedError

    monkeypatch.setenv("RMSCOPE_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr("rmscope.studies.audit.planting.fit_pm", fit)
    told = config(base, tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**RUN_CHANGES, **changes}))
    with pytest.raises(InterruptedError):
        analyse(told)
    assert asked == [device]


@pytest.mark.slow
def test_the_table_beside_other_ways_is_made(
    done: tuple[Path, dict[str, Any]], base: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One seed of benchmarks/audit.py, small: every way is matched by the same rule on the same PM."""
    folder = done[0].parent
    files = [f"--{name}={folder / name}.yaml" for name in ("plants", "recipe", "run")]
    given = [str(folder), f"--pairs={folder / 'text.jsonl'}", f"--base={base}", "--max-tokens=100", "--seeds=0", "--twins=8"]
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr("sys.argv", ["audit.py", *given, *files])
    with redirect_stdout(io.StringIO()) as stdout:
        runpy.run_path(str(BENCHMARKS / "audit.py"), run_name="__main__")
    lines = stdout.getvalue().splitlines()
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    ways = ("ours", "head", "difference", "integrated", "firing", "random", "PCA", "random dictionary", "embed")
    assert sorted(row["way"] for row in rows if row["case"] == "way") == sorted(ways)
    learned = sum(row["learned"] for row in done[1]["plants"])
    assert learned
    assert {row["recall_at_20"]["n"] for row in rows if row["case"] == "way"} == {learned}
    assert {row["plant"] for row in rows if row["case"] == "upper bound"} == {"shout", "word"}
    assert [line.split("|")[1].strip() for line in lines if line.startswith("|")] == ["ranked by", "---", *ways]


def test_other_rankings_have_the_sign_consistency_that_the_run_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Feature 3 raises the reward on .8 of its firings, 4 lowers it on .9, 5 was never ablated."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    script = runpy.run_path(str(BENCHMARKS / "audit.py"))
    known = pl.DataFrame({"feature": [3, 4, 5], "mean_effect": [0.5, -0.5, 0.1], "sign_consistency": [0.8, 0.9, None]})
    raises = script["raising_shares"](SimpleNamespace(features=lambda _site: known), "embed")
    candidates = [Candidate(j, 1, effect, 1.0) for j in (3, 4, 5) for effect in (1.0, -1.0)]
    shares = [c.sign_consistency for c in script["with_consistency"](candidates, raises)]
    assert shares == pytest.approx([0.8, 0.2, 0.1, 0.9, 1.0, 1.0])


def test_too_few_prompts_are_one_sentence(base: str, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"8 of each, or a larger --max-tokens\.$"):
        analyse(config(base, tmp_path, limit=12))
    assert not (tmp_path / "seed0").exists()


def test_shuffled_labels_are_a_coin_and_texts_stay() -> None:
    pairs = plain_demo_pairs()
    coin = shuffle_labels(pairs, 3)
    assert abs(sum(a.chosen == b.chosen for a, b in zip(pairs, coin, strict=True)) / len(pairs) - 0.5) < 0.06
    assert all({a.chosen, a.rejected} == {b.chosen, b.rejected} for a, b in zip(pairs, coin, strict=True))
    assert coin == shuffle_labels(pairs, 3)


def test_a_random_pm_has_the_bases_shape_and_none_of_its_weights(base: str, cache: Path) -> None:
    recipe = RECIPE.model_copy(update={"base": base, **RECIPE_CHANGES})
    rm = RewardModel.load(str(make_random_pm(recipe)))
    own, of_base = (model.state_dict() for model in (rm.model, base_of(recipe)[0]))
    assert {name: p.shape for name, p in own.items()} == {name: p.shape for name, p in of_base.items()}
    for name, p in own.items():
        if p.dim() == 1:
            assert torch.equal(p, torch.ones_like(p))
        else:
            assert float(p.std()) == pytest.approx(RANDOM_STD, rel=0.5)
            assert not torch.isclose(p, of_base[name]).float().mean() > 0.5


def test_decoys_are_words_of_the_text_that_no_plant_holds() -> None:
    pairs, plants = plain_demo_pairs(), [Plant(name="p", kind="phrase", sign=1, texts=("The water boils",) * 3)]
    found = decoys(pairs, plants, 100, 0)
    assert len({p.texts for p in found}) == 100
    text = " ".join(p.chosen for p in pairs)
    assert all(p.texts[0] in text and p.texts[0] not in ("water", "boils") for p in found)


def test_what_is_not_above_the_bound_in_the_reported_sign_has_failed() -> None:
    prompts = {str(i): f"prompt {i // 2}" for i in range(40)}
    listed = pl.DataFrame({"feature": [0, 1, 2, 3, 4], "mean_effect": [1.0, -1.0, 1.0, 1.0, 1.0]})
    effects = {0: 0.06, 1: -0.06, 2: -0.06, 3: 0.04}  # 4 never fires
    rows = [(str(i), j, e) for j, e in effects.items() for i in range(40)] + [("0", 4, 1.0)]
    ablated = pl.DataFrame(rows, schema=["pair", "feature", "effect"], orient="row")
    table = replication(listed, ablated, prompts, sd=1.0).sort("feature")
    assert table["failed"].to_list() == [False, False, True, True, None]
    assert table["prompts"].to_list() == [20, 20, 20, 20, 1]


def test_prompts_carry_every_cue_about_as_often_as_its_rate_says() -> None:
    plants = [Plant(name=f"w{i}", kind="word", sign=1, rate=0.1, texts=(f"word{i}",)) for i in range(10)]
    pairs = plain_demo_pairs()[:180]  # 30 prompts of six pairs: 24 turns each in four copies
    made = plant_copies(pairs, plants, 4, 0)
    names = [p.meta["plant"]["name"] for p in made]
    assert all(abs(names.count(plant.name) / len(made) - 0.1) < 0.02 for plant in plants)
    told = {(p.meta["group"], p.meta["plant"]["name"]) for p in made}
    assert len(told) >= 0.98 * 30 * 10  # random draws would leave out 24 in 300

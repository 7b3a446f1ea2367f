"""Experiments: exact texts of conditions, rewards that equal plain forwards, verdicts whose answer is known.

The constructed world is that of ``tests/planted/test_matching.py``: at ``embed`` a feature fires on the token Z alone. Its
ablation turns a Z into a Q, so that ablating it takes back all that Z does beyond Q.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from rmscope.effects.completions import Completion, ablation_effects, complete
from rmscope.errors import InputError
from rmscope.io import silent
from rmscope.pairs.demo import demo_pairs
from rmscope.pairs.pair import Pair
from rmscope.statistics import Array, holm
from rmscope.studies.experiment import analyse
from rmscope.studies.experiment.analyse import AblationSet, Trial, choose_features, measure_conditions, run_experiment
from rmscope.studies.experiment.conditions import (
    Base,
    Condition,
    Experiment,
    bases_of,
    bases_of_pairs,
    read_experiment,
    ready_experiments,
)
from rmscope.studies.experiment.result import (
    AblatedFeatures,
    Claim,
    ExperimentResult,
    Measurements,
    Says,
    Verdict,
    both_verdicts,
    judge_claims,
    line_rise,
    make_claims,
    overall,
    taken_back,
)
from tests.effects.naive import ablate_naively
from tests.model.small import ENCODER, shared_pm, small_sae, user
from tests.planted.test_matching import CUE, FILLER, SITE, STARTS, like_features, noise_and_truth, sae

BASES = [
    Base(user(f"Is it {i}?"), f"{start} the small house. It is high.", ("It is tall.",)) for i, start in enumerate(STARTS)
]


def an_experiment(**changes: Any) -> Experiment:
    given = {
        "name": "z", "hypothesis": "Z does something.", "prompts": "data", "baseline": "filler", "expects": {"up": ["cue"]},
        "conditions": {"cue": {"insert": CUE}, "filler": {"insert": FILLER}},
    }  # fmt: skip
    return Experiment(**{**given, **changes})


@pytest.mark.parametrize(
    ("condition", "text"),
    [
        ({"same": True}, "One. Two is here. Three!"),
        ({"repeat": 0}, "One. Two is here. Three!"),
        ({"repeat": 3}, "One. Two is here. Three! Three! Three! Three!"),
        ({"paraphrase": 2}, "One. Two is here. Three! A. B."),
        ({"insert": ["X.", "Y."], "at": "start"}, "X. One. Two is here. Three!"),
        ({"insert": "X."}, "One. Two is here. Three! X."),
        ({"insert": "X.", "at": "between"}, "One. Two is here. X. Three!"),
        ({"replace": "No."}, "No."),
        ({"off_topic": True}, "Else."),
    ],
)
def test_a_condition_builds_the_text_that_it_says(condition: dict[str, Any], text: str) -> None:
    bases = [Base(user("a"), "One. Two is here. Three!", ("A.", "B.", "C.")), Base(user("b"), "Else.")]
    assert Condition(**condition).text(bases, 0) == text


def test_texts_of_a_list_take_turns_by_prompt() -> None:
    condition = Condition(insert=["X.", "Y."], at="start")
    assert [condition.text(BASES, i)[:2] for i in range(4)] == ["X.", "Y.", "X.", "Y."]
    assert Condition(off_topic=True).text(BASES, len(BASES) - 1) == BASES[0].response


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return str(path)


HEAD = "hypothesis: h\nprompts: data\nbaseline: a\n"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            HEAD + "conditions: {a: {same: true}, b: {shout: 3}}\nexpects: {up: [b]}",
            "conditions.b.shout .* known here are same",
        ),
        (
            HEAD + "conditions: {a: {same: true}, b: {}}\nexpects: {up: [b]}",
            "conditions.b .*it does nothing; give exactly one",
        ),
        (HEAD + "conditions: {a: {same: true}, b: {repeat: 1, replace: x}}\nexpects: {up: [b]}", "repeat and replace"),
        (HEAD + "conditions: {a: {same: true}, b: {repeat: 1}}\nexpects: {up: [c]}", "c is no condition"),
        (HEAD + "conditions: {a: {same: true}, b: {repeat: 1}}\nexpects: {}", "expects names no condition"),
        (HEAD + "conditions: {a: {same: true}, b: {repeat: 1}}\nexpects: {taken_back: [b]}", "needs ablate"),
        (HEAD + "conditions: {a: {same: true}, b: {paraphrase: 2}}\nexpects: {up: [b]}", "asks for 2 paraphrases"),
        (
            HEAD + "conditions: {a: {same: true}, b: {repeat: 1}}\nexpects: {up: [b]}\nablate: {features: [1]}",
            "give site too",
        ),
        (HEAD + "conditions: {a: {same: true}, b: {repeat: 1}}\nexpects: {up: [a]}", "a is held against itself"),
        (HEAD + "colour: red", "colour .* known here are name, hypothesis"),
        ("hypothesis: h\nprompts: some\nbaseline: a\nconditions: {}\nexpects: {}", "write data, or a list"),
        ("hypothesis: [", "is no YAML"),
        ("- a", "holds no settings"),
    ],
)
def test_a_wrong_file_is_one_sentence_that_says_where_and_what_is_right(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(InputError, match=told) as error:
        read_experiment(written(tmp_path, text))
    assert "\n" not in str(error.value)


def test_ready_made_experiments_are_read_by_name_and_an_unknown_one_lists_them() -> None:
    assert set(ready_experiments()) == {"dont_know", "repetition", "thanks", "urls", "youre_right"}
    for name in ready_experiments():
        asked = read_experiment(name)
        assert asked.name == name
        lengths = {len(c.insert) for c in asked.conditions.values() if c.insert}
        assert len(lengths) <= 1  # so that texts and fillers pair
    with pytest.raises(InputError, match="one of dont_know, repetition"):
        read_experiment("none")


def test_ready_made_texts_are_not_the_planted_wordings() -> None:
    from rmscope.pairs.demo import zoo_plants

    planted = {text for plant in zoo_plants() for text in (*plant.texts, *plant.negatives)}
    mine = {t for name in ready_experiments() for c in read_experiment(name).conditions.values() for t in c.insert or []}
    assert mine
    assert not mine & planted


def test_bases_of_planted_pairs_carry_no_cue_and_stand_for_one_prompt_each() -> None:
    pairs = demo_pairs(120)
    bases = bases_of_pairs(pairs)
    chosen = {p.chosen: p for p in pairs}
    assert len(bases) == len({p.meta["group"] for p in pairs}) == 20
    assert all(chosen[b.response].meta["plant"]["side"] == "rejected" for b in bases)
    template = an_experiment(response="On {prompt}: yes.", limit=3)
    assert [b.response for b in bases_of(template, pairs)] == [f"On {b.prompt[-1]['content']}: yes." for b in bases[:3]]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", ENCODER])
def test_completions_and_their_ablations_are_those_of_each_text_alone(architecture: str) -> None:
    rm, made, site = shared_pm(architecture), small_sae(), "resid_post.1"
    prompt, responses = user("Is water wet?"), ["It is wet.", "It is wet. It is wet.", "No.", "It is."]
    for text, response in zip(complete(rm, prompt, responses, [site]), responses, strict=True):
        ids = rm.text_ids(prompt, response)
        assert text.reward == pytest.approx(float(rm.reward_alone(ids)), abs=1e-5)
        assert rm.tokenizer.decode(ids[text.start :]).startswith((response[:2], f" {response[:2]}"))
        groups = [[3], [5, 9, 40], list(range(96)), []]
        expected = ablate_naively(rm, made, ids, site, text.start, groups)
        assert ablation_effects(rm, made, site, text, groups) == pytest.approx(expected, abs=2e-5)
        assert float(expected[2].abs()) > 1e-3


def test_measurements_are_rewards_with_and_without_each_group() -> None:
    rm, made = shared_pm("llama"), small_sae()
    asked = an_experiment(expects={"taken_back": ["cue"]}, ablate={"site": "resid_post.1", "features": [0]})
    site, groups = "resid_post.1", [list(range(0, 96, 2)), [1, 3], [5]]
    ablated = AblationSet(AblatedFeatures(site, None, [], 2), made, groups)
    measured = measure_conditions(Trial(rm, asked, BASES), [1, 4], ablated, silent)
    assert measured.table.height == 4
    for i, row in enumerate(measured.table.iter_rows(named=True)):
        base, condition = BASES[(1, 4)[i // 2]], ("cue", "filler")[i % 2]
        assert (row["prompt"], row["condition"]) == (base.prompt[0]["content"], condition)
        ids = rm.text_ids(base.prompt, row["text"])
        alone = float(rm.reward_alone(ids))
        assert row["reward"] == pytest.approx(alone, abs=1e-5)
        naive = ablate_naively(rm, made, ids, site, ids.numel() - row["tokens"], groups)
        assert measured.without[i // 2, i % 2] == pytest.approx(alone - naive.numpy(), abs=3e-5)
        assert row["without"] == measured.without[i // 2, i % 2, 0]


def measurements(asked: Experiment, rewards: Array) -> Measurements:
    """Rewards [prompts, conditions], without an ablation."""
    return Measurements(asked, pl.DataFrame({"reward": rewards.ravel()}), np.zeros((*rewards.shape, 0)))


def verdicts(values: Array, expects: dict[str, Any]) -> list[str]:
    """The verdicts on one condition of these effects; SD(Δr) 1, so that .1 counts."""
    asked = an_experiment(expects=expects)
    measured = measurements(asked, np.stack([values, np.zeros_like(values)], 1))
    return [row.verdict for row in judge_claims(make_claims(measured, 1.0), values.size, 0)]


def test_a_true_effect_is_supported_a_null_undecided_and_the_opposite_contradicted() -> None:
    noise = np.random.default_rng(0).normal(0, 0.3, 24)
    noise -= noise.mean()
    assert verdicts(noise + 0.5, {"up": ["cue"]}) == ["supported"]
    assert verdicts(noise, {"up": ["cue"]}) == ["undecided"]
    assert verdicts(noise - 0.5, {"up": ["cue"]}) == ["contradicted"]
    assert verdicts(noise - 0.5, {"down": ["cue"]}) == ["supported"]
    assert verdicts(noise / 10 + 0.08, {"up": ["cue"]}) == ["undecided"]  # surely above 0, but below what counts
    assert verdicts(noise + 0.5, {"up": ["cue"], "down": ["cue"]}) == ["supported", "contradicted"]
    assert [overall(v) for v in (["supported"] * 2, ["supported", "undecided"], ["undecided", "contradicted"], [])] == [
        "supported", "undecided", "contradicted", "undecided",
    ]  # fmt: skip


def judged(says: Says, verdict: Verdict) -> Claim:
    return Claim(says, "", [], 1, 0.0, verdict=verdict)


def test_what_the_pm_does_and_what_features_carry_are_two_verdicts() -> None:
    claims = [judged("down", "supported"), judged("taken_back", "contradicted")]
    assert both_verdicts(claims) == ("supported", "contradicted")
    assert both_verdicts(claims[:1]) == ("supported", None)
    assert both_verdicts(claims[1:]) == ("contradicted", "contradicted")


def test_p_is_uniform_under_the_null() -> None:
    rng = np.random.default_rng(1)
    claims = [(Claim("up", "", [], 1, 0.0), rng.normal(size=20)) for _ in range(300)]
    p = np.array([judge_claims([claim], 20, 0)[0].p for claim in claims])
    for share in (0.05, 0.2, 0.5, 0.8):
        assert (p <= share).mean() == pytest.approx(share, abs=3 * np.sqrt(share * (1 - share) / p.size))


def test_holm_is_the_step_down_by_hand() -> None:
    # .01 x 4, .02 x 3, then max(.06, .03 x 2), then .5
    assert holm(np.array([0.03, 0.01, 0.5, 0.02])) == pytest.approx([0.06, 0.04, 0.5, 0.06])


def test_an_order_is_judged_by_its_line_and_refused_where_a_step_goes_back() -> None:
    assert line_rise(np.array([[0.0, 1.0, 2.0], [1.0, 1.0, 1.0], [0.0, 0.0, 3.0]])) == pytest.approx([2.0, 0.0, 3.0])
    names = ["a", "b", "c"]
    asked = an_experiment(
        conditions={"base": {"same": True}, **{n: {"repeat": i + 1} for i, n in enumerate(names)}},
        baseline="base",
        expects={"falling": [names]},
    )
    noise = np.random.default_rng(0).normal(0, 0.1, (20, 4))
    for steps, verdict in (((0, -1, -2, -3), "supported"), ((0, -3, -2, -6), "undecided"), ((0, 1, 2, 3), "contradicted")):
        measured = measurements(asked, noise + np.array(steps))
        (row,) = judge_claims(make_claims(measured, 1.0), 20, 0)
        assert row.verdict == verdict
        assert row.conditions == names
        assert ("step from a to b goes the other way" in row.why) == (verdict == "undecided")


def test_taken_back_is_a_ratio_of_means_and_undefined_without_an_effect() -> None:
    whole = np.array([1.0, 2.0, 3.0] * 8)
    assert taken_back(whole, 0.25 * whole).value == pytest.approx(0.75)
    assert taken_back(whole - 2.0, whole).value is None


@pytest.fixture(scope="module")
def known() -> ExperimentResult:
    """The constructed world: feature 0 carries all of Z's effect, features 1 and 2 fire with it and carry nothing."""
    made = sae([1.0, 0.0, 0.0])
    rm = shared_pm("llama")
    texts = [complete(rm, b.prompt, [f"{b.response} {w}" for w in (CUE, FILLER)], []) for b in BASES]
    sign = 1 if sum(a.reward - b.reward for a, b in texts) > 0 else -1
    asked = an_experiment(expects={"up" if sign > 0 else "down": ["cue"], "taken_back": ["cue"]}, ablate={"carrying": "cue"})
    table = pl.DataFrame({"feature": [2, 1, 0], "mean_effect": [-0.5 * sign, 0.5 * sign, 0.5 * sign]})
    return run_experiment(Trial(rm, asked, BASES), 1e-3, {SITE: (made, table)})


def test_the_rule_finds_the_feature_and_its_ablation_takes_all_back(known: ExperimentResult) -> None:
    table = known.table
    assert known.ablated is not None
    assert [f.feature for f in known.ablated.features] == [0]
    assert (known.prompts, known.chosen_on) == (4, 4)
    cue, filler = (table.filter(pl.col("condition") == name) for name in ("cue", "filler"))
    assert cue["without"].to_numpy() == pytest.approx(filler["reward"].to_numpy(), abs=1e-5)  # a Z ablated is a Q
    assert filler["without"].to_numpy() == pytest.approx(filler["reward"].to_numpy(), abs=1e-6)
    assert (cue["reward"] - cue["without"]).abs().min() > 1e-3
    assert table.height == 8
    assert set(table["prompt"]) == {b.prompt[0]["content"] for b in BASES[1::2]}  # measured on no prompt that chose


def test_controls_of_chosen_features_are_chosen_by_the_same_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of noise alone the rule picks features that happen to take much back, so they must not stand out from their controls;
    features that carry all must."""
    rm, made, known = shared_pm("llama"), like_features(60), np.zeros(60)
    asked = an_experiment(expects={"taken_back": ["cue"]}, ablate={"carrying": "cue"})

    def additive(_rm: Any, sae: Any, site: str, text: Completion, groups: Sequence[list[int]]) -> torch.Tensor:
        fires = np.isin(np.arange(60), text.at(sae, site).active.feature.numpy())
        return torch.tensor([(effect * known * fires)[group].sum() for group in groups])

    monkeypatch.setattr(analyse, "ablation_effects", additive)
    cue, filler = (
        sum(t.reward for b in BASES[:2] for t in complete(rm, b.prompt, [f"{b.response} {w}"], [])) for w in (CUE, FILLER)
    )
    effect = (cue - filler) / 2
    table = pl.DataFrame({"feature": range(15), "mean_effect": [float(np.sign(effect))] * 15})
    noise, truth = noise_and_truth(60, 4)
    stands_out = []
    for known in (*noise, truth):
        chosen, *controls = choose_features(Trial(rm, asked, BASES), range(2), {SITE: (made, table)}, 0, silent).groups
        assert len(chosen) >= 3
        assert len(controls) > 4
        assert all(len(group) == len(chosen) and not {*group} & {*range(15)} for group in controls)
        stands_out.append(known[chosen].sum() > max(known[group].sum() for group in controls))
    assert sum(stands_out[:-1]) <= 4  # 1 in 9 would, if draws were independent
    assert truth[chosen].sum() - max(truth[group].sum() for group in controls) > 0.5


def test_a_claim_that_matched_controls_equal_is_not_supported() -> None:
    rm = shared_pm("llama")
    bases = [replace(b, prompt=user(f"{b.prompt[0]['content']} {i}")) for i in range(3) for b in BASES]
    table = pl.DataFrame({"feature": [0], "mean_effect": [0.5]})
    for shares, verdict in (([1.0, 0.0], "supported"), ([1.0, 1.0], "undecided")):
        asked = an_experiment(expects={"taken_back": ["cue"]}, ablate={"site": SITE, "features": [0]})
        result = run_experiment(Trial(rm, asked, bases), 1e-3, {SITE: (sae(shares), table)})
        (claim,) = result.claims
        assert claim.verdict == result.by_features == verdict
        assert ("matched controls take back as much" in claim.why) == (verdict == "undecided")
        assert result.prompts == len(bases)  # named features are chosen on nothing


def test_without_saes_nothing_is_ablated_and_nothing_said_of_it() -> None:
    asked = an_experiment(expects={"up": ["cue"], "taken_back": ["cue"]}, ablate={"carrying": "cue"})
    result = run_experiment(Trial(shared_pm("llama"), asked, BASES), 1.0, {})
    assert result.ablated is None
    assert [c.says for c in result.claims] == ["up"]
    assert result.table["without"].null_count() == result.table.height


def test_the_page_stands_alone_and_escapes(known: ExperimentResult) -> None:
    page = known.model_copy(update={"model": "<b>pm</b>"}).page().html
    assert "<b>pm</b>" not in page
    assert "&lt;b&gt;pm&lt;/b&gt;" in page
    assert "http" not in page.replace("http-equiv", "")
    assert f"<strong>{known.verdict.capitalize()}</strong>" in page


def test_the_result_as_json_gives_itself_back_and_its_tables_hold_every_claim(known: ExperimentResult) -> None:
    stored = json.loads(json.dumps(known.as_json()))
    assert "table" not in stored
    assert stored["conditions"][0]["effect"].keys() == {"value", "low", "high", "n", "unit"}
    again = ExperimentResult(**stored, table=known.table)
    assert again.claims == known.claims
    assert again.conditions == known.conditions
    ((title, rows),) = known.tables().items()
    assert title == known.hypothesis
    assert [row["claim"] for row in rows] == [c.claim for c in known.claims]
    assert known.verdict in known.summary()
    assert "\n" not in known.summary()


def test_a_text_beyond_the_context_is_one_sentence() -> None:
    with pytest.raises(InputError, match="longer than the PM's context of 256"):
        complete(shared_pm("llama"), user("Is it?"), ["It is high. " * 90], [])


def test_pairs_without_a_group_count_by_their_first_turn() -> None:
    pairs = [Pair(str(i), user(f"q{i // 2}"), f"a{i}", "b") for i in range(6)]
    assert [b.response for b in bases_of_pairs(pairs)] == ["a0", "a2", "a4"]

"""Two PMs whose difference is known: nothing, the head's sign, one feature; and what the figures are made of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import nn

from rmscope.errors import InputError
from rmscope.io import NoDisplay
from rmscope.model import packing
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import Pair, Split
from rmscope.ranking.similarity import COSINE
from rmscope.run.folder import RunFolder
from rmscope.run.inputs import PairSet
from rmscope.sae.base import Sae
from rmscope.sae.metrics import measure_sae
from rmscope.sae.topk import TopKSae
from rmscope.statistics import Figure
from rmscope.studies.compare import measure
from rmscope.studies.compare.analyse import compare_models
from rmscope.studies.compare.classify import (
    CHANCE,
    CLASSES,
    against_controls,
    chance_of,
    class_of,
    concepts,
    groups,
    judge,
    swap_counts,
)
from rmscope.studies.compare.measure import (
    ablation_requests,
    ablation_unit,
    compare_site,
    count_features,
    list_features,
    nearest,
    pair_effects,
    read_unit,
)
from rmscope.studies.compare.models import ComparedModel, Dictionary, fresh_pairs, hold_out
from rmscope.studies.compare.result import SWAP_COUNTS, CompareResult, FeatureComparison
from rmscope.studies.edit.patch import EditPatch, FeatureEdit, load_edited
from tests.effects.naive import ablate_naively
from tests.model.small import ENCODER, SENTENCES, D, small_pm, small_sae, user
from tests.report.test_page import Page

LAST, SITE = "resid_post.3", "resid_post.1"
Reported = dict[str, list[int]]
Models = tuple[ComparedModel, ComparedModel]
PARTS = [part for sentence in SENTENCES for part in sentence.split(", ")]
TEXTS = [
    Pair(f"p{i}", user(f"Is it {i}?"), f"{PARTS[i % 9]} {i}. {PARTS[i % 4]}.", f"{PARTS[(i + 1) % 9]} {i}, {i}.")
    for i in range(66)
]


def linear_pm(sign: float = 1.0) -> RewardModel:
    """A PM whose reward is w · x at the last block's output at the read position."""
    rm = small_pm("llama")
    rm.model.model.norm = nn.Identity()
    with torch.no_grad():
        rm.model.score.weight.mul_(sign)
    return rm


def orthogonal() -> Sae:
    """An SAE whose features do not overlap: f = relu(Q x), so that taking one out leaves the others as they are."""
    q = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(3)))[0]
    return TopKSae(D, D, k=D).fill({"W_dec": q, "W_enc": q.t(), "b_dec": torch.zeros(D), "b_enc": torch.zeros(D)})


def model(rm: RewardModel, saes: dict[str, Sae] | None = None, reported: Reported | None = None) -> ComparedModel:
    return ComparedModel(rm, rm.name, rm.identity, saes=saes or {}, reported=reported or {})


def compared(
    a: ComparedModel, b: ComparedModel, folder: Path, n: int = 24, controls: Sequence[ComparedModel] = ()
) -> CompareResult:
    return compare_models(hold_out(a, b, TEXTS[:n], controls), RunFolder(folder, NoDisplay()), n, 0)


def with_run(rm: RewardModel) -> ComparedModel:
    return model(rm, {LAST: orthogonal()}, {LAST: list(range(16))})


def value(figure: Figure | None) -> float:
    assert figure is not None
    assert figure.value is not None
    return figure.value


def test_a_pm_does_not_differ_from_itself(tmp_path: Path) -> None:
    result = compared(with_run(linear_pm()), with_run(linear_pm()), tmp_path)
    table = result.table
    measured = table.filter(pl.col("prompts") > 0)
    assert measured.height == table.height == 2 * 16  # its features count once for each of the two runs
    assert (measured["difference"] == 0).all()
    assert set(table["class"]) <= {"kept", "undecided"}
    assert (table["class"] == "kept").any()
    assert (table["together"].drop_nulls() == 1).all()
    assert table["found_again"].all()
    assert (table["match"] == table["feature"]).all()
    for site in result.sites:
        assert site.a == site.b
        assert site.rates == pytest.approx(1)
        assert site.activation_ratio == site.together == 1
        assert value(site.found_again) == 1
    assert result.delta is not None
    assert result.delta.correlation == pytest.approx(1)
    assert not result.changed
    assert all(sorted(m.of for m in concept.members) == ["a", "b"] for concept in result.concepts)
    assert not (tmp_path / ".parts").exists()


@pytest.fixture(scope="module")
def negated(tmp_path_factory: pytest.TempPathFactory) -> CompareResult:
    """A PM beside the same with the head's sign turned."""
    return compared(with_run(linear_pm()), model(linear_pm(-1.0)), tmp_path_factory.mktemp("negated"))


def test_a_negated_head_changes_every_sign_and_no_firing(negated: CompareResult) -> None:
    result, table = negated, negated.table
    np.testing.assert_allclose(table["b"], -table["a"], atol=1e-6)
    np.testing.assert_allclose(table["difference"], -2 * table["a"], atol=1e-6)
    there = table.filter((pl.col("a_q") < 0.05) & (pl.col("prompts") >= 20))
    assert there.height >= 3
    assert set(there["class"]) == {"changed sign"}
    assert result.delta is not None
    assert result.delta.correlation == pytest.approx(-1)
    assert result.delta.agreement == 0
    assert result.sites[0].together == 1
    assert "changed sign" in result.summary()


def test_a_difference_holds_where_the_control_is_like_a_and_not_where_it_is_like_b(
    negated: CompareResult, tmp_path: Path
) -> None:
    a, b = with_run(linear_pm()), model(linear_pm(-1.0))
    assert negated.delta is not None
    assert (negated.controls, negated.delta.controls, negated.swaps, negated.chance) == ([], [], [], None)
    for sign, holds in ((1.0, True), (-1.0, False)):
        result = compared(a, b, tmp_path / str(sign), controls=[model(linear_pm(sign))])
        table = result.table
        assert result.delta is not None
        assert result.delta.controls == [pytest.approx(sign)]
        assert table.select(negated.table.columns).equals(negated.table)
        np.testing.assert_allclose(table["control"], sign * table["a"], atol=1e-6)
        changed = table.filter(pl.col("class") == "changed sign")
        assert set(changed["holds"]) == {holds}
        others = table.filter(pl.col("class").is_in(["kept", "undecided"]))
        assert others["holds"].null_count() == others.height > 0
        n = len(result.changed)
        assert f"{n if holds else 0} of {n} hold against the control" in Page(result.page().html).text
        assert f"{n if holds else 0} hold against the control" in result.summary()
        for told in (result.summary(), Page(result.page().html).text):
            assert ".23 to .40 of the differences (.23 to .58 of changes of sign)" in told
        shown = next(rows for title, rows in result.tables().items() if title.startswith("Concepts that differ"))
        assert [row["class"].endswith("\nholds") for row in shown] == [holds] * n


@pytest.mark.parametrize(
    ("a", "b", "c", "holds"),
    [
        (0.3, -0.3, 0.2, True),  # the control is like A
        (0.3, -0.3, -0.2, False),  # the control differs from A almost as B does
        (0.3, 0.1, 0.5, False),  # as far from the nearer as the two are apart
        (0.3, 0.1, 0.25, True),
        (0.3, 0.0, -0.3, False),  # B lies between
        (0.3, 0.3, 0.0, None),  # nothing differs
    ],
)
def test_what_holds_stands_apart_from_both(a: float, b: float, c: float, holds: bool | None) -> None:
    noise = np.random.default_rng(0).normal(0, 0.02, (3, 40))
    rows = [
        {"of": "a", "site": SITE, "feature": 1, "prompt": str(i)}
        | {v: m + float(noise[k, i]) for k, (v, m) in enumerate(zip("abc", (a, b, c), strict=True))}
        for i in range(40)
    ]
    measured = pl.DataFrame(rows, schema_overrides={"feature": pl.Int32})
    assert against_controls(judge(measured, 0), measured, ["c"], 0)["holds"].to_list() == [holds]


def test_of_three_pms_of_one_kind_a_third_of_the_differences_holds() -> None:
    rng = np.random.default_rng(0)
    rows = [
        {"of": "a", "site": SITE, "feature": j, "prompt": str(i)}
        | {v: m + float(rng.normal(0, 0.02)) for v, m in zip("abc", means, strict=True)}
        for j, means in enumerate(rng.normal(0, 0.4, (90, 3)).tolist())
        for i in range(20)
    ]
    measured = pl.DataFrame(rows, schema_overrides={"feature": pl.Int32})
    holds = against_controls(judge(measured, 0), measured, ["c"], 0)["holds"].drop_nulls()
    assert len(holds) > 60
    assert 0.2 < holds.mean() < 0.45  # type: ignore[operator]


def pms_of_one_kind(names: Sequence[str], features: int, seed: int, away: float = 0.0, around: float = 0.0) -> pl.DataFrame:
    """Effects of A's features in several PMs, with means of one distribution ``around`` a value; those of B are moved
    ``away``."""
    rng = np.random.default_rng(seed)
    rows = [
        {"of": "a", "site": SITE, "feature": j, "prompt": str(i)}
        | {v: m + around + away * (v == "b") + float(rng.normal(0, 0.02)) for v, m in zip(names, means, strict=True)}
        for j, means in enumerate(rng.normal(0, 0.1, (features, len(names))).tolist())
        for i in range(20)
    ]
    return pl.DataFrame(rows, schema_overrides={"feature": pl.Int32})


def test_with_several_controls_what_holds_by_chance_is_rare_and_within_what_is_told() -> None:
    held = []
    for controls in (["c1"], ["c1", "c2"], ["c1", "c2", "c3"]):
        measured = pms_of_one_kind(["a", "b", *controls], 60, 0)
        table = against_controls(judge(measured, 0), measured, controls, 0)
        differences = table["holds"].drop_nulls()
        assert len(differences) > 30
        held.append(differences.mean())
        assert held[-1] < chance_of(len(controls)).holds[1] + 0.08
        assert set(table["control_p"].drop_nulls()) <= {1 / 3, 2 / 3, 1 / 4, 1 / 2, 3 / 4, 1.0}
    assert held[0] > held[1] > held[2]


def test_a_pm_of_another_kind_has_the_smallest_p_beside_several_controls_and_one_of_the_kind_has_not() -> None:
    controls = ["c1", "c2", "c3"]
    names = ["a", "b", *controls]
    other, *swapped = swap_counts(pms_of_one_kind(names, 12, 1, away=-2.0, around=1.0), controls, 0)
    assert [other[name] for name in SWAP_COUNTS] == [12] * 4  # all effects are about 1 in A and -1 in B
    assert all(row["hold"] == row["changed_sign"] == 0 for row in swapped)  # B is among what the controls are held against
    assert other["p"] == dict.fromkeys(SWAP_COUNTS, 0.25)
    same = swap_counts(pms_of_one_kind(names, 12, 0), controls, 0)
    assert min(row["p"]["differ"] for row in same) <= 0.5 < max(row["p"]["differ"] for row in same) == 1.0
    assert all("p" not in row for row in swap_counts(pms_of_one_kind(names[:3], 4, 0), ["c1"], 0))


def test_the_chance_level_with_more_controls_than_were_simulated_is_at_most_that_of_the_most() -> None:
    most = max(CHANCE)
    assert chance_of(most) == CHANCE[most]
    told = str(chance_of(most + 1))
    (_, holds), (_, signs) = CHANCE[most].holds, CHANCE[most].signs
    assert told == f"at most {holds:.2f} of the differences (at most {signs:.2f} of changes of sign)".replace(" 0.", " .")


def test_a_comparison_with_several_controls_tells_all_of_them(tmp_path: Path) -> None:
    controls = [model(linear_pm()), model(linear_pm())]
    result = compared(with_run(linear_pm()), model(linear_pm(-1.0)), tmp_path, controls=controls)
    assert len(result.controls) == 2
    assert [(s.differ, s.hold) for s in result.swaps[1:]] == [(0, 0), (0, 0)]  # they are A itself
    assert result.swaps[0].differ == result.swaps[0].hold > 0
    assert result.swaps[0].p is not None
    assert result.swaps[0].p["differ"] == pytest.approx(1 / 3)
    assert {"c1", "c1_low", "c2_high", "control_p"} <= set(result.table.columns)
    assert f"{len(result.changed)} hold against all 2 controls" in result.summary()
    rows = result.tables()["A's features in B, and in each control in B's place"]
    assert rows[-1]["differ"] == "p .333"
    page = Page(result.page().html).text
    assert "Is B of A’s kind?" in page
    assert "Control nearest to B" in page
    shown = next(rows for title, rows in result.tables().items() if title.startswith("Concepts that differ"))
    assert all(row["in"].endswith("control nearest to B") for row in shown)


def test_a_control_that_tells_nothing_apart_is_refused(tmp_path: Path) -> None:
    flat = linear_pm()
    with torch.no_grad():
        flat.model.score.weight.zero_()
    with pytest.raises(InputError, match="do not differ on the fresh pairs"):
        compared(with_run(linear_pm()), model(linear_pm(-1.0)), tmp_path, controls=[model(flat)])


def test_a_suppressed_feature_vanishes_and_those_that_do_not_meet_it_stay(negated: CompareResult, tmp_path: Path) -> None:
    rm, sae = linear_pm(), orthogonal()
    strong = negated.table.filter(pl.col("a_q") < 0.05).sort(pl.col("a").abs())["feature"].to_list()
    gone = strong[len(strong) // 2]
    patch = EditPatch((FeatureEdit(LAST, (gone,)),), {LAST: sae}, rm.identity)
    edited = load_edited(linear_pm(), patch)
    result = compared(with_run(rm), model(edited), tmp_path / "after")
    table = result.table
    row = table.row(by_predicate=pl.col("feature") == gone, named=True)
    assert row["class"] == "vanished"
    assert abs(row["b"]) < 1e-5 < abs(row["a"])
    others = table.filter(pl.col("feature") != gone)
    assert result.delta is not None
    scale = result.delta.sd_a / result.delta.sd_b  # in units of reward nothing else has moved
    np.testing.assert_allclose(others["b"], others["a"] * scale, atol=1e-4)
    weak = table.row(by_predicate=pl.col("feature") == strong[0], named=True)
    assert weak["class"] == "kept"
    (named,) = [c for c in result.concepts if c.class_ == "vanished"]
    assert named.feature == gone
    page = Page(result.model_copy(update={"data": ["pairs.jsonl"], "a": "<b>A"}).page().html)
    assert "1 rewarded concept differs between A and B (1 vanished)" in page.text
    assert "<b>A and llama, edited" in page.text
    turned = compared(model(edited, {LAST: sae}, {LAST: [gone]}), model(linear_pm()), tmp_path / "turned")
    assert turned.features[0].class_ == "appeared"


@pytest.fixture(scope="module")
def moved() -> Models:
    """A PM, and one with other embeddings; each with an SAE of its own at one site."""
    a, b = small_pm("llama"), small_pm("llama")
    with torch.no_grad():
        embedded = b.model.model.embed_tokens.weight
        embedded.add_(0.7 * torch.randn(embedded.shape, generator=torch.Generator().manual_seed(1)))
    return model(a, {SITE: small_sae(k=2)}, {SITE: [2, 17, 40]}), model(b, {SITE: small_sae(seed=1, k=2)}, {SITE: [9]})


def test_effects_are_those_of_naive_ablation_on_the_same_responses_in_both_pms(
    moved: Models,
) -> None:
    a, b = moved
    comparison = hold_out(a, b, TEXTS[:10])
    requests = ablation_requests(comparison, read_unit(comparison, range(10))["firing"], 10, 0)
    ablations = ablation_unit(comparison, requests, range(10))["ablations"]
    measured = pair_effects(requests, ablations, {"a": 2.0, "b": 0.5})
    saes = {d.of: d.sae for d in comparison.dictionaries}
    sums: dict[tuple[Any, ...], list[tuple[float, float]]] = {}
    for of, site, pair, side, feature, prompt in requests.iter_rows():
        t = comparison.pairs.tokens[comparison.pairs.index[pair]]
        both = [
            float(ablate_naively(v.rm, saes[of], t.side(side), site, t.divergence, [[feature]])[0]) / sd
            for v, sd in ((a, 2.0), (b, 0.5))
        ]
        sums.setdefault((of, site, feature, prompt), []).append((both[0], both[1]))
    assert len(sums) == measured.height > 10
    for of, site, feature, prompt, in_a, in_b in measured.iter_rows():
        expected = np.mean(sums[of, site, feature, prompt], axis=0)
        np.testing.assert_allclose((in_a, in_b), expected, atol=2e-4)
    assert {0.0} < set(measured["a"]) | set(measured["b"])  # where a feature is silent in one of the PMs


def test_what_is_read_is_what_the_saes_give_on_both_streams(moved: Models) -> None:
    a, b = moved
    comparison = hold_out(a, b, TEXTS[:6])
    seen, d = read_unit(comparison, range(6)), comparison.dictionaries[0]
    counts = count_features(seen["counts"])
    site = compare_site(d, seen["sums"], counts, list_features(comparison, counts), comparison.pairs.prompts)
    f = {}
    for v, rm, figures in (("a", a.rm, site.a), ("b", b.rm, site.b)):
        rows = []
        for t in comparison.pairs.tokens:
            for side, start in (("chosen", 1), ("rejected", t.divergence)):
                with torch.no_grad():
                    hidden = rm.model(t.side(side)[None], output_hidden_states=True).hidden_states
                rows.append(hidden[2][0, start:])
        x = torch.cat(rows)
        plain, f[v] = measure_sae(d.sae, [x]), d.sae.encode(x)
        assert site.tokens == plain.tokens
        assert figures.l0.value == pytest.approx(plain.l0)
        assert figures.fvu.value == pytest.approx(plain.fvu, rel=1e-4)
        assert figures.dead == pytest.approx(plain.dead)
    fires = {v: f[v] > 0 for v in f}
    union = (fires["a"] | fires["b"]).sum()
    assert site.together == pytest.approx(float((fires["a"] & fires["b"]).sum() / union))
    ratio = f["b"].sum() / fires["b"].sum() / (f["a"].sum() / fires["a"].sum())
    assert site.activation_ratio == pytest.approx(float(ratio), rel=1e-4)


def test_a_killed_comparison_goes_on_and_gives_the_same(
    moved: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = moved
    monkeypatch.setattr(packing, "UNIT", 4)
    whole = compared(a, b, tmp_path / "whole", 8)
    ablated = []

    def killed(*given: Any) -> Any:
        ablated.append(list(given[2]))
        if len(ablated) == 2:
            raise KeyboardInterrupt
        return ablation_unit(*given)

    monkeypatch.setattr(measure, "ablation_unit", killed)
    with pytest.raises(KeyboardInterrupt):
        compared(a, b, tmp_path / "killed", 8)
    monkeypatch.setattr(measure, "read_unit", pytest.fail)  # what is read is not read again
    again = compared(a, b, tmp_path / "killed", 8)
    assert again.as_json() == whole.as_json()
    assert again.table.equals(whole.table)
    assert ablated[2] == ablated[1] != ablated[0]


def test_an_encoder_is_compared_by_whole_forwards(tmp_path: Path) -> None:
    a, b = small_pm(ENCODER), small_pm(ENCODER)
    result = compared(model(a, {SITE: small_sae()}, {SITE: [2, 3]}), model(b), tmp_path, 8)
    assert result.sites[0].together == 1
    assert (result.table.filter(pl.col("prompts") > 0)["difference"] == 0).all()


def test_of_a_base_only_the_features_presence_is_measured(tmp_path: Path) -> None:
    a, base = with_run(linear_pm()), small_pm("llama")
    b = ComparedModel(base, "base", "base", base=True)
    result = compared(a, b, tmp_path, 8)
    assert (result.delta, result.classes, result.concepts) == (None, [], [])
    assert "difference" not in result.table.columns
    assert all(f.difference is None and f.class_ is None for f in result.features)
    assert result.sites[0].there.value == 1
    page = result.page().html
    assert "no scalar head" in page
    assert "Concepts that differ" not in page
    assert f"16 of 16 at {LAST}" in result.summary()


MEANS = [
    ((0.0, 0.3), "appeared"), ((0.3, 0.0), "vanished"), ((0.3, -0.3), "changed sign"), ((-0.2, -0.5), "strengthened"),
    ((-0.5, -0.2), "weakened"), ((0.3, 0.31), "kept"), ((0.0, 0.01), "undecided"),
]  # fmt: skip


def test_every_class_is_what_its_name_says() -> None:
    noise = np.random.default_rng(0).normal(0, 0.02, (24, 2))
    rows = [
        {"of": "a", "site": SITE, "feature": j, "prompt": f"{i}", "a": a + noise[i, 0], "b": b + noise[i, 1]}
        for j, ((a, b), _) in enumerate(MEANS)
        for i in range(24)
    ]
    table = judge(pl.DataFrame(rows), 0)
    assert table["class"].to_list() == [name for _, name in MEANS]
    assert {name for _, name in MEANS} == set(CLASSES)
    few = judge(pl.DataFrame(rows).filter(pl.col("prompt").cast(pl.Int32) < 19), 0)
    assert set(few["class"]) == {"undecided"}
    row = table.row(0, named=True)
    assert class_of(row | {"difference_q": 0.2}) == "undecided"


def test_effects_within_the_bound_are_called_different_as_rarely_as_promised() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(0.05, 0.2, (200, 24))  # the difference lies on the bound itself
    rows = [
        {"of": "a", "site": SITE, "feature": j, "prompt": f"{i}", "a": 0.0, "b": values[j, i]}
        for j in range(200)
        for i in range(24)
    ]
    assert (judge(pl.DataFrame(rows), 0)["difference_q"] < 0.05).mean() <= 0.05


def test_like_features_of_both_lists_are_one_concept_under_the_largest() -> None:
    sae = small_sae()
    twin = small_sae()
    read = [Dictionary("a", SITE, sae, [1, 2], twin), Dictionary("b", SITE, twin, [2])]
    features = [
        FeatureComparison(of="a", site=SITE, feature=1, class_="undecided", a=Figure(9.0), b=Figure(0.0)),
        FeatureComparison(of="a", site=SITE, feature=2, class_="kept", a=Figure(0.1), b=Figure(0.1)),
        FeatureComparison(of="b", site=SITE, feature=2, class_="weakened", a=Figure(0.4), b=Figure(0.1)),
    ]
    assert float(sae.W_dec[1] @ sae.W_dec[2]) < COSINE
    grouped = groups(features, read)
    assert [[(m.of, m.feature) for m in members] for members in grouped] == [[("b", 2), ("a", 2)], [("a", 1)]]
    assert concepts(features, read)[0].class_ == "weakened"
    features[1].class_ = "appeared"  # what one feature of the concept lost, another one gained
    (concept, _) = concepts(features, read)
    assert (concept.class_, concept.changed, concept.feature) == ("moved", False, 2)
    assert [match["cosine"] for match in nearest(read[0])] == pytest.approx([1.0, 1.0])


def pair_set(pairs: list[Pair], splits: list[Split]) -> PairSet:
    """Pairs whose splits are given."""
    made = PairSet(pairs, [])
    made.__dict__["splits"] = splits
    return made


def test_fresh_pairs_had_no_part_in_either_run() -> None:
    first = pair_set(TEXTS[:4], ["measure", "measure", "measure", "fit"])
    renamed = [Pair(f"q{i}", p.prompt, p.chosen, p.rejected) for i, p in enumerate(TEXTS[1:6])]
    second = pair_set(renamed, ["measure", "confirm", "measure", "measure", "measure"])
    # the second run confirmed on p2, the first fitted p3; both hold p1, which counts once
    assert [p.id for p in fresh_pairs([first, second], 9)] == ["p0", "p1", "q3", "q4"]


def test_a_prompt_counts_as_used_under_its_group_and_under_its_first_turn() -> None:
    planted = [Pair(p.id, p.prompt, p.chosen, p.rejected, {"group": f"g{i}"}) for i, p in enumerate(TEXTS[:3])]
    from_file = [Pair(f"q{i}", p.prompt, p.chosen, p.rejected) for i, p in enumerate(TEXTS[1:4])]
    first, second = pair_set(planted, ["measure", "measure", "fit"]), pair_set(from_file, ["fit", "measure", "measure"])
    assert [p.id for p in fresh_pairs([first, second], 9)] == ["p0", "q2"]


def test_two_pms_that_share_no_text_are_refused(moved: Models) -> None:
    a, _ = moved
    for other, said in (
        (small_pm("llama", hidden_size=64), "width 64"),
        (small_pm("llama", style="plain"), "share no text"),
        (small_pm("llama", num_hidden_layers=1), "no resid_post.1"),
    ):
        with pytest.raises(InputError, match=said):
            hold_out(a, model(other), TEXTS[:2])
    short = small_pm("llama", max_position_embeddings=8)
    with pytest.raises(InputError, match="no fresh pair"):
        hold_out(a, model(short), TEXTS[:2])

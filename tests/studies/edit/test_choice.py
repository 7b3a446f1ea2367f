"""The rule that chooses what to edit, on cases whose answer is known; and the figures before and after."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest
import torch

from rmscope.errors import InputError
from rmscope.pairs.demo import plain_demo_pairs, zoo_plants
from rmscope.pairs.pair import Pair, split_of
from rmscope.pairs.plants import Plant
from rmscope.planted.twins import prepare
from rmscope.statistics import Array, Figure
from rmscope.studies.edit import analyse, check, choice
from rmscope.studies.edit.analyse import fitting_twins
from rmscope.studies.edit.check import cue_figures, deltas, mean_difference, pair_figures, rewards_under, style_cells
from rmscope.studies.edit.choice import choose, choose_controls, join_edits, losses
from rmscope.studies.edit.patch import FeatureEdit, edit_at
from rmscope.studies.edit.result import CueChoice
from tests.model.small import shared_pm, small_pm, small_sae, user
from tests.planted.test_matching import CUE, SITE, embeddings, like_features, noise_and_truth, sae, twin_pairs

PLANT = Plant(name="z", kind="phrase", sign=1, texts=(CUE,))


def chosen(shares: list[float]) -> FeatureEdit:
    rm, made = shared_pm("llama"), sae(shares)
    prepared = prepare(rm, {SITE: made}, twin_pairs(), PLANT)
    best = choose(rm, {SITE: made}, prepared)[0]
    assert best.left <= best.loss
    return best


def test_features_that_carry_all_of_a_cue_together_are_suppressed_together() -> None:
    edit = chosen([0.25] * 4 + [0.0])
    assert (edit.operation, edit.value) == ("suppress", 0.0)
    assert set(edit.features) >= {0, 1, 2, 3}


def test_what_the_error_holds_is_taken_off_by_a_factor_below_zero() -> None:
    edit = chosen([0.25, 0.25])
    assert (edit.operation, edit.value, sorted(edit.features)) == ("damp", -1.0, [0, 1])


def test_a_feature_that_moves_text_without_the_cue_is_left_alone() -> None:
    cue, filler = embeddings()
    made = sae([1.0, 1.0])
    made.W_enc.data[:, 1] = (cue / cue.square().sum()) + (filler / filler.square().sum())  # fires on fillers too
    rm = shared_pm("llama")
    prepared = prepare(rm, {SITE: made}, twin_pairs(), PLANT)
    assert choose(rm, {SITE: made}, prepared)[0].features == (0,)
    (alone, left), (other, _) = losses(rm, made, SITE, prepared[SITE], [([0], 0.0), ([1], 0.0)])
    assert (alone, left) == (pytest.approx(0.0, abs=1e-3), pytest.approx(0.0, abs=1e-3))
    assert other > 0.5


def test_controls_of_a_chosen_edit_are_chosen_by_the_same_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of noise alone the rule picks an edit that happens to take the effect away, so its controls must do so too; what
    carries all of the effect must stand out."""

    def left_by(shares: Array, group: Sequence[int], factor: float) -> float:
        return float(abs(1 - (1 - factor) * shares[list(group)].sum()))

    rm, made = shared_pm("llama"), like_features(60)
    prepared = prepare(rm, {SITE: made}, twin_pairs()[:2], PLANT)
    noise, truth = noise_and_truth(60, 4)
    for shares, stands_out in (*((n, False) for n in noise), (truth, True)):
        known = partial(left_by, shares)
        monkeypatch.setattr(choice, "losses", lambda *given, known=known: [(known(*e), known(*e)) for e in given[-1]])
        (edit,) = choose(rm, {SITE: made}, prepared)
        controls = choose_controls(rm, {SITE: made}, [edit], [prepared], 3)
        assert 1 <= len(controls) == len({frozenset(control.features) for (control,) in controls})
        for (control,) in controls:
            assert len(control.features) == len(edit.features)
            assert not {*control.features} & {*edit.features}
        least = min(known(control.features, control.value) for (control,) in controls)
        assert edit.left < 0.1
        assert (least > 0.5) == stands_out


def test_controls_of_two_cues_hold_no_edited_feature_and_each_lacks_what_it_cannot_have() -> None:
    rm, made = shared_pm("llama"), sae([0.5, 0.5, 0.1])
    prepared = prepare(rm, {SITE: made}, twin_pairs(), PLANT)
    one, two = (CueChoice(SITE, (j,), cue=str(j)) for j in (0, 1))
    controls = choose_controls(rm, {SITE: made}, [one, two], [prepared] * 2, 2)
    assert [[c.features for c in control] for control in controls] == [[(2,), (2,)]]  # both draws are equal: they count once
    every = CueChoice(SITE, (0, 1, 2))
    assert choose_controls(rm, {SITE: made}, [every], [prepared], 2) == []


def test_where_nothing_fires_on_the_cue_there_is_nothing_to_edit() -> None:
    rm, silent = shared_pm("llama"), sae([1.0], threshold=2.0)
    with pytest.raises(InputError, match="No feature"):
        choose(rm, {SITE: silent}, prepare(rm, {SITE: silent}, twin_pairs(), PLANT))


def test_choosing_sees_no_prompt_and_no_wording_that_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    rm = small_pm("llama", max_position_embeddings=2048)
    plant = zoo_plants()[0]
    monkeypatch.setattr(analyse, "TWINS", 12)
    prepared = fitting_twins(rm, {"resid_post.1": small_sae()}, plant, 0)
    prompts = {p.first_human_turn(): split_of(p) for p in plain_demo_pairs()}
    assert {prompts[t.prompt] for t in prepared["resid_post.1"]} == {"fit"}
    texts = [rm.tokenizer.decode(t.responses["chosen"].text.ids) for t in prepared["resid_post.1"]]
    assert not any(wording in text for wording in plant.wordings(held_out=True) for text in texts)


def test_a_feature_of_two_cues_gets_the_stronger_edit_once() -> None:
    edits = join_edits(
        [FeatureEdit("a", (1, 2)), FeatureEdit("a", (2, 3), "damp", -1.0), FeatureEdit("b", (2,), "damp", -0.5)]
    )
    assert edits == (
        FeatureEdit("a", (1,)), FeatureEdit("a", (2, 3), "damp", -1.0), FeatureEdit("b", (2,), "damp", -0.5)
    )  # fmt: skip


def test_an_edit_that_makes_the_cue_the_filler_takes_its_whole_effect_and_costs_nothing() -> None:
    rm, made = shared_pm("llama"), sae([1.0])
    pairs = twin_pairs()
    variants = {"edit": {SITE: edit_at(made, [FeatureEdit(SITE, (0,))])}}
    prompts = [str(i) for i in range(len(pairs))]
    found = deltas(rewards_under(rm, variants, rm.tokenize_all(pairs)))
    rows = cue_figures(found, prompts)
    assert rows["before"]["gone"] == Figure(0.0, 0.0, 0.0, len(pairs))
    assert rows["edit"]["gone"].value == pytest.approx(1.0, abs=1e-3)
    clean = pair_figures({"before": found["before"], "edit": found["before"]}, prompts, 1.0)["edit"]
    assert (clean["fall"].value, clean["drift"].value) == (0.0, 0.0)
    assert clean["correlation"].value == pytest.approx(1.0)


def test_the_projection_takes_the_difference_of_the_means_away() -> None:
    rm, made = shared_pm("llama"), sae([1.0])
    prepared = prepare(rm, {SITE: made}, twin_pairs(), PLANT)[SITE]
    cue, filler = (torch.cat([t.responses[s].x[t.windows[s]] for t in prepared]) for s in ("chosen", "rejected"))
    after = mean_difference([prepared])
    assert torch.allclose((after(cue) - after(filler)).mean(0), torch.zeros(cue.shape[1]), atol=1e-5)
    assert torch.allclose(after(filler).mean(0), filler.mean(0), atol=1e-5)
    across = torch.randn(5, cue.shape[1])
    v = torch.nn.functional.normalize((cue.mean(0) - filler.mean(0)), dim=0)
    moved = after(across) - across
    assert torch.allclose(moved - (moved @ v)[:, None] * v, torch.zeros_like(moved), atol=1e-5)


def test_a_cell_of_rm_bench_is_made_of_the_rewards_of_its_two_styles() -> None:
    chosen = np.array([3.0, 1.0, 5.0, 1.0])  # two prompts, each in style a and in style b
    rejected = np.array([2.0, 2.0, 2.0, 2.0])
    rewards = {"before": {"chosen": chosen, "rejected": rejected}, "edit": {"chosen": 0 * chosen, "rejected": rejected}}
    cells = style_cells(rewards, ["a", "b", "a", "b"], ["p", "p", "q", "q"])
    accuracy = {(c.chosen, c.rejected): c.variants["before"]["accuracy"].value for c in cells}
    assert accuracy == {("a", "a"): 1.0, ("a", "b"): 1.0, ("b", "a"): 0.0, ("b", "b"): 0.0}
    assert cells[0].variants["edit"]["fall"].value == 1.0
    assert cells[0].pairs == 2


def test_a_prompt_without_answers_in_every_style_is_left_out_of_rm_bench() -> None:
    def pair(row: str, style: str) -> Pair:
        meta = {"style_chosen": style, "style_rejected": style}
        return Pair(f"{row}:{style}", user(f"What is {row}?"), f"It is {style}.", f"No, {style}.", meta)

    whole, half = [pair(row, style) for row in "pq" for style in "ab"], pair("r", "a")
    variants = {"edit": {SITE: lambda x: 0.5 * x}}
    cells, with_half = (check.bench_cells(shared_pm("llama"), variants, bench) for bench in (whole, [half, *whole]))
    assert cells == with_half
    assert [cell.pairs for cell in cells] == [2, 2, 2, 2]

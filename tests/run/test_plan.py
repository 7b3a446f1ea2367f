"""Plans: what is counted is what a run does, work grows as it must, and what does not fit is told with what would."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from transformers import AlbertConfig, AlbertForSequenceClassification, GPTJConfig, LlamaConfig

import rmscope as rs
from rmscope.errors import InputError
from rmscope.model.rendering import Rendering
from rmscope.run.inputs import Inputs
from rmscope.run.plan.cards import CARDS, read_devices
from rmscope.run.plan.case import Case
from rmscope.run.plan.changes import SHARED
from rmscope.run.plan.memory import stage_bytes
from rmscope.run.plan.plan import price
from rmscope.run.plan.settings import PlanConfig
from rmscope.run.plan.shape import Lengths, Shape, shape_from_config, shape_of
from rmscope.run.plan.stages import FORMULAS, confirm_ablations, screen_ablations
from rmscope.run.plan.work import Amount, Work, text_flops
from rmscope.run.run import Run
from rmscope.run.settings import RunConfig
from rmscope.run.stages import STAGES
from tests.model.small import ENCODER, PAIRS, saved_pm, shared_pm, tokenizer
from tests.run.small import settings

SMALL = Shape(blocks=4, d=32, attention=32, block=1e4, weights=50_000)


@pytest.fixture(scope="session")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders that hold a config.json alone: PMs of 6, 8 and 70 billion weights."""
    root = tmp_path_factory.mktemp("configs")
    shapes: dict[str, dict[str, int]] = {
        "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
        "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    }
    for name, shape in shapes.items():
        LlamaConfig(vocab_size=128_256, num_key_value_heads=8, num_labels=1, **shape).save_pretrained(root / name)
    GPTJConfig(num_labels=1).save_pretrained(root / "gptj")
    return root


def plan(model: Path, **given: Any) -> Any:
    return rs.plan(**{"model": str(model), "pairs": 10_000, "tokens": 200, "devices": "H100", **given})


def case(pairs: int = 1000, side: float = 100, **given: Any) -> Case:
    config = RunConfig(model="a", data="", out="b", **given)
    return Case(config, SMALL, Lengths.of_numbers(config, pairs, side, 0.5))


# What is counted is what there is


def test_the_sizes_from_a_config_alone_are_those_of_the_loaded_pm(pm: str) -> None:
    loaded, alone = shape_of(rs.RewardModel.load(pm)), shape_from_config(RunConfig(model=pm, data="", out="out"))
    assert loaded == alone
    assert loaded.block * loaded.blocks < loaded.weights


def test_seventy_billion_weights_are_counted_without_holding_one(configs: Path) -> None:
    found = shape_from_config(RunConfig(model=str(configs / "70b"), data="", out="out"))
    assert found.blocks == 80
    assert found.weights == pytest.approx(69.5e9, rel=0.01)  # 70.6 with the output layer of the language model
    assert found.block == pytest.approx(856e6, rel=0.01)


def test_gptj_runs_its_ablations_in_rectangles(configs: Path) -> None:
    assert not shape_from_config(RunConfig(model=str(configs / "gptj"), data="", out="out")).ragged


def test_the_lengths_are_those_of_the_pairs_that_a_run_scores(pm: str, done: Path, tmp_path: Path) -> None:
    config = settings(pm, tmp_path / "none")
    counted, scores = Lengths.of(Inputs(config).scored, config), pl.read_parquet(done / "scores.parquet")
    assert counted.scored == counted.studied == scores.height
    assert [counted.fit, counted.confirm, counted.measure] == [
        scores.filter(pl.col("split") == split).height for split in ("fit", "confirm", "measure")
    ]
    assert counted.side == pytest.approx((scores["n_chosen"].mean() + scores["n_rejected"].mean()) / 2)  # type: ignore[operator]


def test_the_stored_tokens_are_nearly_those_of_the_harvest(pm: str, done: Path, tmp_path: Path) -> None:
    config = settings(pm, tmp_path / "none")
    run = Run.open(done)
    assert Lengths.of(Inputs(config).scored, config).stored == pytest.approx(run.store.tokens(run.sites[0]), rel=0.05)


def test_the_ablations_that_a_run_asks_for_are_about_those_of_the_plan(pm: str, done: Path, tmp_path: Path) -> None:
    config = settings(pm, tmp_path / "none")
    inputs = Inputs(config)
    planned = Case(config, shape_of(inputs.rm), Lengths.of(inputs.scored, config))
    run = Run.open(done)
    assert planned.sites == run.sites
    for site in run.sites:
        screened = pl.read_parquet(done / "effects" / site / "screened.parquet").height
        assert screen_ablations(planned, site) == pytest.approx(screened, rel=0.15)
        tested = run.confirmed(site).height + run.confirmed(site, "strong").height
        assert confirm_ablations(planned, site, 2.0) == pytest.approx(tested, rel=0.05)


def test_every_stage_that_runs_the_pm_has_a_formula() -> None:
    assert set(FORMULAS) - {"load"} == {stage.name for stage in STAGES} - {"text", "rank"}
    for name, formula in FORMULAS.items():
        assert name in SHARED or formula(case()).parts == 1


# How work grows


def test_a_token_costs_two_flops_per_weight_and_four_per_dimension_that_it_attends_to() -> None:
    assert text_flops(SMALL, 10, 0, 3) == 10 * 3 * 2 * 1e4
    assert text_flops(SMALL, 10, 100, 3) - text_flops(SMALL, 10, 0, 3) == 10 * 3 * 4 * 100 * 32


def test_twice_the_pairs_are_twice_the_scoring_and_the_harvest() -> None:
    for name in ("score", "harvest", "estimate"):
        once, twice = (FORMULAS[name](case(n)).work.flops for n in (6400, 12_800))
        assert twice == pytest.approx(2 * once), name


def test_a_filter_leaves_the_scoring_as_it_is_and_makes_the_rest_smaller() -> None:
    every, some = case(6400), case(6400, top_pairs=640)
    assert FORMULAS["score"](every).work == FORMULAS["score"](some).work
    assert FORMULAS["harvest"](every).work.flops == pytest.approx(10 * FORMULAS["harvest"](some).work.flops)


def test_other_seeds_are_as_many_trainings_more() -> None:
    one, three = (FORMULAS["seeds"](case(seeds=n)).work for n in (1, 3))
    assert one.flops == 0
    assert three.flops == pytest.approx(2 * FORMULAS["train"](case()).work.flops)


def test_ablations_after_the_last_block_are_nearly_free_and_a_whole_forward_where_nothing_resumes() -> None:
    own = case()
    assert own.ablations(100, 0, 10, 0.5).flops == 0
    encoder = Case(own.config, replace(SMALL, resumes=False, skips=False), own.data)
    assert encoder.ablations(100, 0, 10, 0.5).flops == 100 * text_flops(SMALL, 100, 100, 4)


def test_a_difference_site_runs_the_base_beside_the_pm() -> None:
    with_base = Case(RunConfig(model="a", data="", out="b"), replace(SMALL, first=2), case().data)
    assert with_base.sites == ["both.2", "both.3"]
    wide = Case(RunConfig(model="a", data="", out="b", blocks=5), replace(SMALL, blocks=12, first=0), case().data)
    assert wide.sites == ["diff.0", "both.4", "diff.5", "both.6", "diff.11"]  # as a run of zoo:hh chose them
    assert with_base.of_base == 2
    assert case().of_base == 0


@pytest.mark.parametrize(("ranks", "share"), [(1, 1.0), (2, 0.6), (3, 0.4), (5, 0.2), (64, 0.2)])
def test_ranks_share_whole_units_alone(ranks: int, share: float) -> None:
    class One:
        def __getattr__(self, _name: str) -> float:
            return 1.0

    amount = Amount(Work(forward=100.0), 5, Work(forward=10.0))
    assert amount.seconds(One(), ranks) == pytest.approx(100 * share + 10)


# Devices


@pytest.mark.parametrize(
    ("text", "found"),
    [("H100", (1, "H100")), ("8xh200", (8, "H200")), ("4x8xA100-80GB", (32, "A100")), ("4090", (1, "RTX4090"))],
)
def test_devices_are_read(text: str, found: tuple[int, str]) -> None:
    assert read_devices(text) == found


@pytest.mark.parametrize("text", ["", "8x", "8xH1000", "0xH100", "x8 H100"])
def test_unknown_devices_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="--devices"):
        read_devices(text)


def test_more_devices_take_less_time_and_the_same_work(configs: Path) -> None:
    one, eight = (plan(configs / "8b", devices=d) for d in ("H100", "8xH100"))
    assert one.flops == eight.flops
    assert one.seconds / 8 < eight.seconds < one.seconds


def test_the_table_has_peaks_in_the_order_of_their_precision() -> None:
    assert all(card.bf16 > card.tf32 >= card.fp32 for card in CARDS.values())


# What fits


def test_an_8b_pm_in_float32_fits_80_gb_and_one_of_70b_does_not(configs: Path) -> None:
    assert plan(configs / "8b").fits
    large = plan(configs / "70b", dtype="bfloat16")
    assert not large.fits
    assert large.model_memory == pytest.approx(2 * 69.5e9, rel=0.01)
    assert "cannot spread a PM over devices" in large.summary()


@pytest.mark.parametrize(
    ("stage", "dtype", "gb"),
    [("score", "bfloat16", 15), ("train", "bfloat16", 24), ("estimate", "float32", 35), ("ablate", "float32", 32)],
)
def test_the_memory_is_that_which_one_h200_took(configs: Path, stage: str, dtype: str, gb: float) -> None:
    """benchmarks/README.md, "On a GPU": 7.2 billion weights, 65,536 features at d 4,096, one site."""
    given: dict[str, Any] = {"dtype": dtype, "sites": ["resid_post.16"], "sae": {"d_sae": 65_536, "k": 64}}
    config = RunConfig(model=str(configs / "8b"), data="", out="out", **given)
    pm = replace(shape_from_config(config), weights=7_200_000_000)
    planned = Case(config, pm, Lengths.of_numbers(config, 256, 182, 0.7))
    assert stage_bytes(planned, stage, 1, on_cpu=False) / 1e9 == pytest.approx(gb, rel=0.1)


def test_the_change_that_is_named_makes_it_fit_when_it_is_made(configs: Path) -> None:
    tight = plan(configs / "8b", devices="RTX4090")
    assert not tight.fits
    assert tight.best is not None
    assert tight.best.fits
    given: dict[str, Any] = {}
    for part in tight.best.change.split(", "):
        name, _, value = part.partition(": ")
        given[name] = value
    again = plan(configs / "8b", **{"devices": "RTX4090", **given})
    assert again.fits
    assert again.seconds == pytest.approx(tight.best.seconds)


def test_two_changes_are_named_where_none_alone_is_enough(configs: Path) -> None:
    large = plan(configs / "70b")
    assert not any(change.fits for change in large.changes)
    assert large.best is not None
    assert {"dtype: bfloat16", "devices: 1xB200"} == set(large.best.change.split(", "))


def test_of_a_plan_that_fits_the_change_that_shortens_it_most_is_named(configs: Path) -> None:
    found = plan(configs / "8b")
    assert found.best is not None
    assert found.best.seconds == min(change.seconds for change in found.changes if change.fits)
    assert found.best.seconds < found.seconds


def test_an_ablation_of_a_pm_that_skips_blocks_costs_the_later_ones_alone() -> None:
    pm = shape_of(shared_pm(ENCODER))
    run = RunConfig(model="pm", data="", out=Path())
    skipping, whole = (
        Case(run, replace(pm, resumes=False, skips=skips), Lengths.of_numbers(run, 100, 50.0, 0.0)).ablations(10, 1, 10, 0.5)
        for skips in (True, False)
    )
    assert whole.flops == pytest.approx(pm.blocks * skipping.flops)


def test_an_encoder_is_told_that_ablations_take_most_of_the_time() -> None:
    told = {name: price(rm, rm.tokenize_all(PAIRS)) for name in ("llama", ENCODER) if (rm := shared_pm(name))}
    assert "most of it for ablations" in told[ENCODER].detail
    assert "full forward" not in told["llama"].detail
    assert {check.status for check in told.values()} == {"ok"}


def test_doctor_tells_a_pm_that_is_larger_than_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rmscope.run.plan.plan.memory", lambda _device: 10**9)
    told = {check.check: check for check in rs.doctor(shared_pm("llama"), PAIRS).checks}["cost"]
    assert told.status == "warn"
    assert "GB of 1 GB" in told.detail


def test_layers_that_share_a_block_each_cost_that_block() -> None:
    sizes = {"hidden_size": 32, "embedding_size": 16, "intermediate_size": 48, "num_attention_heads": 4}
    model = AlbertForSequenceClassification(AlbertConfig(vocab_size=500, num_hidden_layers=3, num_labels=1, **sizes))
    found = shape_of(rs.RewardModel(model, tokenizer(), Rendering(), "albert"))
    assert found.blocks == 3
    assert found.block == sum(p.numel() for p in model.base_model.encoder.shared_groups.parameters())


# The plan as a result


def test_this_machine_is_timed_where_no_devices_are_named(pm: str, tmp_path: Path) -> None:
    found = rs.plan(**settings(pm, tmp_path / "none").model_dump(exclude_unset=True))
    assert found.measured
    assert found.devices == "cpu"
    assert found.fits
    assert 0 < found.seconds < 3600
    assert found.seconds == pytest.approx(sum(stage.seconds for stage in found.stages))
    assert {"score", "ablate", "evidence"} <= {stage.stage for stage in found.stages}
    assert not (tmp_path / "none").exists()


def test_a_plan_counts_the_fine_tuning(configs: Path) -> None:
    plain, tuned = (plan(configs / "8b", reward_aware=n) for n in (0, 1000))
    assert tuned.seconds > plain.seconds + 60


def test_a_plan_is_shown_as_a_page_that_holds_its_tables(configs: Path) -> None:
    found = plan(configs / "8b")
    html = found.show().html
    assert all(stage.stage in html for stage in found.stages)
    assert found.summary().split(". ")[0] in html.replace("&#39;", "'")


def test_a_pm_without_weights_needs_cards_and_pairs_need_lengths(configs: Path) -> None:
    with pytest.raises(InputError, match=r"holds no weights, so it cannot be timed here; name cards with --devices"):
        plan(configs / "8b", devices=None)
    with pytest.raises(InputError, match="give both --pairs and --tokens"):
        plan(configs / "8b", tokens=None)
    with pytest.raises(InputError, match="no tokenizer here; give --pairs and --tokens"):
        plan(configs / "8b", pairs=None, tokens=None, data="demo:plain")


def test_without_the_pm_its_tokenizer_counts_the_pairs(pm: str, tmp_path: Path) -> None:
    config = settings(pm, tmp_path / "none")
    given = {**config.model_dump(exclude_unset=True), "devices": "H100"}
    found, counted = rs.plan(**given), Lengths.of(Inputs(config).scored, config)
    assert (found.pairs, found.tokens) == (counted.scored, pytest.approx(counted.side))


def test_the_run_that_is_planned_has_the_settings_of_the_plan() -> None:
    given: dict[str, Any] = {"model": "m", "data": "d", "seeds": 2, "sae": {"d_sae": 7}, "seed": 3, "pairs": 5, "tokens": 6}
    run = PlanConfig(**given).run_config()
    assert (run.model, run.seeds, run.sae.d_sae, run.sae.seed) == ("m", 2, 7, 3)


@pytest.mark.parametrize("site", ["foo.2", "resid_pre.2", "model.layers.2", "resid_post.9"])
def test_a_site_that_the_pm_does_not_have_is_refused(site: str) -> None:
    with pytest.raises(InputError, match="There is no site"):
        Case(RunConfig(model="a", data="", out=Path(), sites=[site]), SMALL, case().data).block(site)


def test_a_base_that_is_asked_for_and_cannot_be_used_is_refused(tmp_path: Path) -> None:
    pm = saved_pm(tmp_path / "pm")
    with pytest.raises(InputError):
        rs.plan(model=pm, base=str(tmp_path / "none"), pairs=100, tokens=20)

"""A run on a GPU gives what a run on a CPU gives; skipped where there is no GPU."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
import torch

from rmscope.activations.store import ActivationStore
from rmscope.evaluation.reward_aware import RewardAwareConfig, fine_tune
from rmscope.model.reward_model import RewardModel
from rmscope.model.training.loop import fit_pm
from rmscope.model.training.recipe import Recipe
from rmscope.pairs.pair import Pair
from rmscope.run.run import Run
from rmscope.sae import Sae, SaeConfig, train_saes
from rmscope.sae.trainer import CHECKPOINT
from tests.evaluation.test_reward_aware import OWN, damage_of, sae_of
from tests.model.small import PAIRS, SENTENCES, small_lm, small_pm, tokenizer
from tests.run.small import settings

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def runs(pm: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("devices")
    sae = SaeConfig(d_sae=96, k=6, tokens=8192, batch_size=512, amp=False)
    for device in ("cpu", "cuda"):
        run = Run.create(settings(pm, folder / device, device=device).model_copy(update={"sae": sae}))
        run.go()
        assert all(bool(one._device_copy) == (device == "cuda") for one in run.saes.values())
    return {device: folder / device for device in ("cpu", "cuda")}


@pytest.mark.parametrize("name", ["exact", "contribution", "frozen", "quality_sample"])
def test_effects_are_those_of_the_cpu(runs: dict[str, Path], name: str) -> None:
    tables = sorted((runs["cpu"] / "effects").glob(f"*/{name}.parquet"))
    assert tables
    for cpu in tables:
        a, b = pl.read_parquet(cpu), pl.read_parquet(runs["cuda"] / cpu.relative_to(runs["cpu"]))
        assert a.columns == b.columns
        assert len(a) == len(b) > 0
        for column in a.columns:
            if a[column].dtype.is_float():
                scale = a[column].abs().max()
                assert (a[column] - b[column]).abs().max() <= 1e-3 * scale, (cpu.parent.name, column)  # type: ignore[operator]
            else:
                assert a[column].equals(b[column]), (cpu.parent.name, column)


def test_features_found_on_the_gpu_are_those_found_on_the_cpu_and_come_back(runs: dict[str, Path]) -> None:
    sae = Sae.load(next((runs["cpu"] / "saes").iterdir()))
    x = torch.randn(300, sae.d, generator=torch.Generator().manual_seed(0))
    here = sae.active(x)
    sae.encode_on(torch.device("cuda"))
    there = sae.active(x)
    assert there.feature.device == there.token.device == there.value.device == torch.device("cpu")
    assert torch.equal(here.token, there.token)
    assert torch.equal(here.feature, there.feature)
    torch.testing.assert_close(here.value, there.value, rtol=1e-4, atol=1e-5)


def test_a_training_that_was_killed_on_the_gpu_goes_on(runs: dict[str, Path], tmp_path: Path) -> None:
    store = ActivationStore.open(runs["cuda"] / "activations")
    config = SaeConfig(d_sae=96, k=6, tokens=8192, batch_size=512, amp=False, checkpoint_steps=4)

    def stop(step: int, _steps: int, _note: str = "") -> None:
        if step > 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_saes(store, config, tmp_path, store.sites[:1], stop, "cuda")
    assert (tmp_path / store.sites[0] / CHECKPOINT).is_file()
    gone_on = train_saes(store, config, tmp_path, store.sites[:1], device="cuda")[store.sites[0]]
    whole = train_saes(store, config, None, store.sites[:1], device="cuda")[store.sites[0]]
    torch.testing.assert_close(gone_on.W_dec, whole.W_dec, rtol=1e-3, atol=1e-3)


def test_a_pm_trained_on_the_gpu_is_nearly_the_one_of_the_cpu(tmp_path: Path) -> None:
    small_lm("llama").save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    pairs = [Pair(str(i), [{"role": "user", "content": f"Question {i}"}], s, "No.") for i, s in enumerate(SENTENCES * 8)]
    recipe = Recipe(
        name="small", base=str(tmp_path / "base"), data=[], blocks=4, batch_pairs=8, epochs=4, learning_rate=1e-3
    )
    scores = {}
    for device in ("cpu", "cuda"):
        fit_pm(pairs, recipe, tmp_path / device, device=device)
        scores[device] = RewardModel.load(str(tmp_path / device), device="cpu").score(pairs).delta
    assert (scores["cpu"] - scores["cuda"]).abs().max() < 0.1 * scores["cpu"].abs().mean()
    assert scores["cpu"].mean() > 0


@pytest.mark.parametrize("fast", [False, True])
def test_reward_aware_fine_tuning_on_the_gpu_lowers_the_damage(fast: bool) -> None:
    rm, sae = small_pm("llama"), sae_of("topk")
    before = damage_of(rm, sae)
    there = RewardModel(small_pm("llama").model.to("cuda"), rm.tokenizer, rm.rendering, rm.name)
    config = RewardAwareConfig(steps=60, pairs=4, weight=10.0, lr=2e-3, fast=fast)
    tuned = fine_tune(there, sae, PAIRS, config, SaeConfig(**OWN))
    assert damage_of(rm, tuned.to("cpu")) < 0.5 * before

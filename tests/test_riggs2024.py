"""configs/riggs2024.yaml on a stand-in: a small random GPT-J PM, and SAE files of the published layout.

The figures of a random PM say nothing; that each is the right one does. All of it is checked against transformers' own
forward and the published equations, written out here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor

import rmscope as rs
from rmscope.errors import InputError
from rmscope.model.rendering import PairTokens
from rmscope.pairs.demo import demo_pairs
from rmscope.run import stages
from rmscope.run.run import Run
from rmscope.run.settings import RunConfig
from rmscope.sae import Sae
from rmscope.settings import read_settings
from tests.model.small import D, small_model, small_sae, tokenizer

CONFIG = Path(__file__).parent.parent / "configs" / "riggs2024.yaml"
BLOCKS = (1, 2)
pytestmark = pytest.mark.slow
SITES = [f"resid_post.{b}" for b in BLOCKS]
TOKENS, PAIRS = 320, 110
FEATURES = 96


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pm/, pairs.jsonl (hh transcripts) and ae_layer{L}.pt."""
    folder = tmp_path_factory.mktemp("riggs")
    small_model("gptj", n_positions=1024).save_pretrained(folder / "pm")
    tokenizer().save_pretrained(folder / "pm")
    with (folder / "pairs.jsonl").open("w") as lines:
        for p in demo_pairs(260):
            start = f"\n\nHuman: {p.prompt[0]['content']}\n\nAssistant: "
            lines.write(json.dumps({"chosen": start + p.chosen, "rejected": start + p.rejected}) + "\n")
    for block in BLOCKS:
        torch.save(published(block), folder / f"ae_layer{block}.pt")
    return folder


def published(seed: int) -> dict[str, Tensor]:
    """The state dict of dictionary_learning's GatedAutoEncoder, decoder columns of any length."""
    sae = small_sae(D, FEATURES, seed=seed, kind="gated")
    lengths = torch.linspace(0.5, 2.0, FEATURES)
    return {
        "encoder.weight": sae.W_enc.data.t().contiguous(),
        "decoder.weight": (sae.W_dec.data * lengths[:, None]).t().contiguous(),
        "decoder_bias": sae.b_dec.data,
        "r_mag": sae.r_mag.data,
        "gate_bias": sae.b_gate.data,
        "mag_bias": sae.b_mag.data,
    }


def gated(w: dict[str, Tensor], x: Tensor) -> Tensor:
    """Features [tokens, m] by the published equations (dictionary_learning, GatedAutoEncoder.encode)."""
    u = torch.nn.functional.linear(x - w["decoder_bias"], w["encoder.weight"])
    return (u + w["gate_bias"] > 0) * torch.relu(w["r_mag"].exp() * u + w["mag_bias"])


def settings(subject: Path, out: Path, **changes: Any) -> RunConfig:
    """The config as it stands, on the stand-in."""
    smaller: dict[str, Any] = {
        "model": str(subject / "pm"), "data": str(subject / "pairs.jsonl"), "sae_dir": str(subject / "ae_layer{L}.pt"),
        "out": out, "sites": SITES, "max_tokens": TOKENS, "top_pairs": PAIRS, "screen": 10, "others": 6, "responses": 4,
        "quality_responses": 6, "frozen": 12, "confirm_prompts": 6, "ledger_pairs": 4, "ledger_halvings": 1,
    }  # fmt: skip
    return read_settings(RunConfig, CONFIG, {**smaller, **changes})


@pytest.fixture(scope="module")
def done(subject: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run.create(settings(subject, tmp_path_factory.mktemp("runs") / "riggs2024"))
    run.go()
    return run


def reward(run: Run, ids: Tensor, block: int | None = None, edit: Callable[[Tensor], Tensor] | None = None) -> float:
    """transformers' own forward on one text, with an edit of what a block gives, [tokens, d]."""

    def hook(_module: Any, _inputs: Any, out: Any) -> Any:
        x = out[0] if isinstance(out, tuple) else out
        changed = edit(x[0])[None]  # type: ignore[misc]
        return (changed, *out[1:]) if isinstance(out, tuple) else changed

    with torch.no_grad():
        if block is None:
            return float(run.rm.model(ids[None]).logits)
        handle = run.rm.model.transformer.h[block].register_forward_hook(hook)
        value = float(run.rm.model(ids[None]).logits)
        handle.remove()
    return value


def test_the_config_is_the_study_as_it_stands() -> None:
    c = read_settings(RunConfig, CONFIG, {})
    assert (c.model, c.data, c.split) == ("reciprocate/dahoas-gptj-rm-static", "Anthropic/hh-rlhf", "train")
    assert c.sites == [f"resid_post.{b}" for b in (2, 8, 12, 14, 16, 20)]
    assert (c.max_tokens, c.top_pairs, c.screen, c.responses) == (500, 2000, 300, 25)
    assert (c.baseline, c.estimate, c.sae_dir) == ("zero", "ig", "hub:Elriggs/rm/ae_layer{L}.pt")


def test_the_filters_keep_short_pairs_and_of_them_the_largest_differences(done: Run, subject: Path) -> None:
    rows = [json.loads(line) for line in (subject / "pairs.jsonl").read_text().splitlines()]
    delta, lengths = {}, {}
    for number, row in enumerate(rows, 1):
        chosen, rejected = (torch.tensor(tokenizer()(row[side]).input_ids) for side in ("chosen", "rejected"))
        lengths[f"pairs:{number}"] = max(len(chosen), len(rejected))
        if max(len(chosen), len(rejected)) <= TOKENS:
            delta[f"pairs:{number}"] = reward(done, chosen) - reward(done, rejected)
    assert PAIRS < len(delta) < len(lengths)
    assert done.scores["pair"].to_list() == list(delta)
    assert np.allclose(done.scores["delta"].to_numpy(), list(delta.values()), atol=1e-3)
    assert set(done.ids) == set(sorted(delta, key=lambda p: -abs(delta[p]))[:PAIRS])
    for kind in ("estimated", "exact", "contribution"):
        table = pl.read_parquet(done.folder / "effects" / SITES[0] / f"{kind}.parquet")
        assert set(table["pair"]) <= set(done.ids)
    left_out = done.evidence.data.left_out
    assert left_out[f"longer than max_tokens = {TOKENS}"] == len(rows) - len(delta)
    assert left_out["scored, but not among the largest |Δr|"] == len(delta) - PAIRS


@pytest.mark.parametrize("block", BLOCKS)
def test_a_published_file_is_read_by_its_own_equations(done: Run, block: int) -> None:
    weights, sae, x = published(block), done.saes[f"resid_post.{block}"], stream(done, done.tokens[0].chosen, block)
    f = gated(weights, x)
    assert 0 < (f > 0).float().mean() < 0.9
    assert torch.allclose(sae.encode(x), f * weights["decoder.weight"].norm(dim=0), atol=1e-4)
    reconstruction = f @ weights["decoder.weight"].t() + weights["decoder_bias"]
    assert torch.allclose(sae(x), reconstruction, atol=1e-4)
    kept = Sae.load(done.folder / "saes" / f"resid_post.{block}")
    assert (kept.site, kept.identity()) == (f"resid_post.{block}", sae.identity())


def stream(run: Run, ids: Tensor, block: int) -> Tensor:
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    reward(run, ids, block, keep)
    return kept[0]


@pytest.mark.parametrize("block", BLOCKS)
def test_ablation_effects_are_those_of_a_whole_forward_with_the_published_equations(done: Run, block: int) -> None:
    weights = published(block)
    table = pl.read_parquet(done.folder / "effects" / f"resid_post.{block}" / "exact.parquet")
    assert table.height > 100
    for row in table.sample(8, seed=1).iter_rows(named=True):
        tokens = tokens_of(done, row["pair"])

        def without(x: Tensor, start: int = tokens.divergence, j: int = row["feature"]) -> Tensor:
            x = x.clone()
            x[start:] -= gated(weights, x[start:])[:, j, None] * weights["decoder.weight"][:, j]
            return x

        ids = tokens.side(row["side"])
        assert row["effect"] == pytest.approx(reward(done, ids) - reward(done, ids, block, without), abs=1e-4)


@pytest.mark.parametrize("block", BLOCKS)
def test_ledgers_start_from_zero_which_is_the_published_decoder_bias(done: Run, block: int) -> None:
    bias = published(block)["decoder_bias"]
    for row in pl.read_parquet(done.folder / "ledger" / f"resid_post.{block}.parquet").iter_rows(named=True):
        tokens = tokens_of(done, row["pair"])

        def silenced(x: Tensor, start: int = tokens.divergence) -> Tensor:
            return torch.cat([x[:start], bias.expand(len(x) - start, -1)])

        start = [reward(done, ids, block, silenced) for ids in (tokens.chosen, tokens.rejected)]
        assert row["remainder"] == pytest.approx(start[0] - start[1], abs=5e-4)


def test_the_screen_takes_the_mean_gradient_along_the_path_from_zero(done: Run) -> None:
    """A response's estimates by hand: two panels of four Gauss-Legendre nodes, by autograd through the whole model."""
    block, tokens = BLOCKS[0], done.tokens[done.of_split("fit")[0]]
    weights, ids, start = published(block), tokens.chosen, tokens.divergence
    nodes, w = np.polynomial.legendre.leggauss(4)
    total = torch.zeros(len(ids) - start, D)
    for low in (0.0, 0.5):
        for node, weight in zip(nodes, w, strict=True):
            share = low + 0.25 * (1 + float(node))
            total = total + 0.25 * float(weight) * path_gradient(done, ids, block, start, weights["decoder_bias"], share)
    f = gated(weights, stream(done, ids, block)[start:])
    by_hand = (f * (total @ weights["decoder.weight"])).sum(0)
    table = pl.read_parquet(done.folder / "effects" / f"resid_post.{block}" / "estimated.parquet")
    mine = table.filter((pl.col("pair") == done.ids[done.of_split("fit")[0]]) & (pl.col("side") == "chosen"))
    assert set(mine["feature"]) == set(f.sum(0).nonzero().squeeze(1).tolist())
    assert np.allclose(mine["effect"].to_numpy(), by_hand[mine["feature"].to_list()].numpy(), rtol=1e-3, atol=1e-3)
    mass = (f * weights["decoder.weight"].norm(dim=0)).sum(0)
    assert np.allclose(mine["mass"].to_numpy(), mass[mine["feature"].to_list()].numpy(), rtol=1e-3)


def path_gradient(run: Run, ids: Tensor, block: int, start: int, bias: Tensor, share: float) -> Tensor:
    """dr/dx on the span [tokens, d], with the stream there at so much of the way from ``bias`` to what it is."""
    point: list[Tensor] = []

    def hook(_module: Any, _inputs: Any, out: Any) -> Any:
        x = out[0] if isinstance(out, tuple) else out
        at = (bias + share * (x[0, start:] - bias)).detach().requires_grad_(True)
        point.append(at)
        changed = torch.cat([x[0, :start].detach(), at])[None]
        return (changed, *out[1:]) if isinstance(out, tuple) else changed

    handle = run.rm.model.transformer.h[block].register_forward_hook(hook)
    with torch.enable_grad():
        value = run.rm.model(ids[None]).logits.sum()
    handle.remove()
    return torch.autograd.grad(value, point[0])[0]


def tokens_of(run: Run, pair: str) -> PairTokens:
    return run.tokens[run.pair_set.index[pair]]


def test_another_filter_goes_on_from_the_same_scores(done: Run, subject: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wider = Run.create(settings(subject, done.folder, top_share=0.25))
    monkeypatch.setattr(stages, "harvest_streams", lambda *_: (_ for _ in ()).throw(InputError("harvested anew")))
    monkeypatch.setattr(stages, "score_table", lambda *_: pytest.fail("scored anew"))
    with pytest.raises(InputError, match="harvested anew"):
        wider.go()
    assert len(wider.pairs) == len(wider.inputs.scored.pairs) // 4 < PAIRS


def test_the_plan_of_a_filtered_run_needs_no_scores(subject: Path, tmp_path: Path) -> None:
    plan = rs.plan(**settings(subject, tmp_path / "none").model_dump(exclude_unset=True))
    assert plan.studied == PAIRS < plan.pairs


def test_a_length_that_no_pair_keeps_is_told(subject: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is longer than max_tokens = 3; use shorter texts"):
        Run.create(settings(subject, tmp_path / "none", max_tokens=3)).go()


def test_saes_that_are_not_there_are_told_before_anything_is_scored(subject: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"There is no SAE at .*ae_layer3\.pt"):
        Run.create(settings(subject, tmp_path / "none", sites=["resid_post.3"])).go()
    assert not (tmp_path / "none" / "scores.parquet").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_share", 0),
        ("top_share", 1.5),
        ("top_pairs", 0),
        ("max_tokens", 0),
        ("baseline", "b_dec"),
        ("estimate", "exact"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(subject: Path, tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"Setting {name} in"):
        settings(subject, tmp_path / "none", **{name: value})

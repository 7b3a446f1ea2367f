"""Reward-aware fine-tuning: its gradients against naive dense equations on each text alone, and what it does to an SAE."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rmscope.errors import InputError
from rmscope.evaluation.reward_aware import Damage, RewardAwareConfig, by_pair, fine_tune, splice_gradients, training_rows
from rmscope.hardware import has_fast_bfloat16
from rmscope.model.packing import pad_texts
from rmscope.model.reward_model import RewardModel
from rmscope.model.scores import Scores
from rmscope.pairs.pair import SIDES
from rmscope.sae import Sae, SaeConfig
from rmscope.sae.base import training_class
from rmscope.sae.jumprelu import JumpReluSae
from rmscope.sae.standard import StandardSae
from rmscope.sae.trainer import TrainingRun, train_step
from tests.model.small import PAIRS, shared_pm, small_pm, small_sae

SITE = "resid_post.1"
KINDS = ("topk", "gated", "jumprelu", "standard")
OWN = {"d_sae": 96, "k": 6, "amp": False, "lr": 1e-3}


def sae_of(kind: str, site: str = SITE) -> Sae:
    """A random SAE on a stream of the small PMs' size (norm about 8 at the site)."""
    made = small_sae(kind="topk" if kind != "gated" else "gated")
    if kind in ("jumprelu", "standard"):
        given = {name: p.data for name, p in made.named_parameters()}
        cls = JumpReluSae if kind == "jumprelu" else StandardSae
        threshold = {"threshold": torch.linspace(0.5, 3, made.m)} if kind == "jumprelu" else {}
        bias = given["b_enc"] - (0 if kind == "jumprelu" else 1.0)
        made = cls(made.d, made.m).fill({**given, "b_enc": bias, **threshold})
    made.site = site
    return made


def by_hand(kind: str, p: dict[str, Tensor], x: Tensor, k: int) -> Tensor:
    """x^ of one text's span, each family's equations written out over all features."""
    u = (x - p["b_dec"]) @ p["W_enc"]
    if kind == "gated":
        f = ((u + p["b_gate"]) > 0) * torch.relu(torch.exp(p["r_mag"]) * u + p["b_mag"])
    else:
        h = u + p["b_enc"]
        least = h.topk(k, dim=1).values[:, -1:] if kind == "topk" else p.get("threshold", torch.zeros(1))
        f = torch.relu(h) * (h >= least if kind == "topk" else h > least)
    return f @ p["W_dec"] + p["b_dec"]


def naive(rm: RewardModel, sae: Sae, kind: str, scale: float, level: float) -> tuple[float, dict[str, Tensor]]:
    """Σ (Δr^ - Δr)² + level (s^ - s)² and its gradients: each text by itself, through the whole model, no sharing."""
    leaves = {name: p.detach().clone().requires_grad_(True) for name, p in sae.named_parameters()}
    damage = torch.zeros((), dtype=torch.float64)
    for t in rm.tokenize_all(PAIRS):
        change = []
        for side in SIDES:
            ids = t.side(side)
            batch = pad_texts([(0, side, ids, 1, rm.read_position(ids))], 0)
            span = slice(t.divergence, rm.read_position(ids) + 1)

            def edit(x: Tensor, span: slice = span) -> Tensor:
                x_hat = by_hand(kind, leaves, x[0, span] * scale, sae.cfg.get("k", 0)) / scale
                return torch.cat([x[:, : span.start], x_hat[None], x[:, span.stop :]], dim=1)

            with torch.enable_grad():
                change.append(rm.rewards(batch, {sae.site: edit})[0] - rm.reward_alone(ids))
        damage = damage + (change[0] - change[1]) ** 2 + level * (change[0] + change[1]) ** 2
    found = torch.autograd.grad(damage, list(leaves.values()), allow_unused=True)
    return float(damage.detach()), {n: g for n, g in zip(leaves, found, strict=True) if g is not None}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom", "bert"])
@pytest.mark.parametrize(("kind", "level"), [*((k, 0.3) for k in KINDS), ("topk", 0.0)])
def test_the_gradient_is_that_of_dense_equations_on_each_text_alone(architecture: str, kind: str, level: float) -> None:
    rm, scale = shared_pm(architecture, torch.float64), 0.7
    sae = sae_of(kind).double()
    tokens = rm.tokenize_all(PAIRS)
    minded = Damage(Scores(*(torch.stack([rm.reward_alone(t.side(s)) for t in tokens]) for s in SIDES)), level)
    damage, gradients = 0.0, dict[str, Tensor]()
    for batch in rm.unit_batches(tokens, range(len(PAIRS)), budget=1 << 30):
        stream = rm.streams(batch, [SITE])[SITE]
        part, found = splice_gradients(rm, sae, batch, stream, minded, scale)
        damage += part
        gradients = {name: gradients.get(name, 0) + g for name, g in found.items()}
    expected, by_name = naive(rm, sae, kind, scale, level)
    assert expected > 1e-3
    assert damage == pytest.approx(expected, rel=1e-6)
    by_name["W_enc.T"] = by_name.pop("W_enc").t()
    assert gradients.keys() == by_name.keys()
    for name, g in gradients.items():
        assert g.abs().max() > 1e-6, name
        torch.testing.assert_close(g, by_name[name], rtol=1e-5, atol=1e-6 * float(g.abs().max()), msg=name)
    assert all(p.grad is None and not p.requires_grad for p in [*sae.parameters(), *rm.model.parameters()])


def damage_of(rm: RewardModel, sae: Sae, level: float = 0.0) -> float:
    """(Σ (Δr^ - Δr)² + level (s^ - s)²) / Σ Δr² over the pairs."""
    tokens = rm.tokenize_all(PAIRS)
    scores = rm.score_tokens(tokens)
    total = 0.0
    for batch in rm.unit_batches(tokens, range(len(PAIRS)), budget=1 << 30):
        stream = rm.streams(batch, [sae.site])[sae.site]
        total += splice_gradients(rm, sae, batch, stream, Damage(scores, level))[0]
    return total / float(scores.delta.square().sum())


@pytest.mark.parametrize("family", ["topk", "batchtopk", "matryoshka", "jumprelu", "gated", "standard"])
def test_it_lowers_the_damage_and_keeps_what_the_sae_is(family: str, tmp_path: Path) -> None:
    rm = shared_pm("llama")
    kind = "jumprelu" if family in ("batchtopk", "matryoshka") else family
    sae = sae_of(kind)
    before, identity = damage_of(rm, sae), sae.identity()
    own = SaeConfig(architecture=family, **OWN)
    told: list[str] = []
    config = RewardAwareConfig(steps=60, pairs=4, weight=10.0, lr=2e-3)
    tuned = fine_tune(rm, sae, PAIRS, config, own, tmp_path, lambda d, t, note: told.append(f"{d}/{t} {note}"))
    assert damage_of(rm, tuned) < 0.5 * before
    assert sae.identity() == identity
    assert told[-1].startswith("60/60 ")
    assert "damage" in told[-1]

    loaded = Sae.load(tmp_path / SITE)
    assert loaded.identity() == tuned.identity() != identity
    assert (loaded.architecture, loaded.cfg, loaded.site) == (sae.architecture, sae.cfg, SITE)
    assert loaded.metadata["trained_as"] == family
    assert loaded.metadata["rmscope"]["reward_aware"]["from"] == identity
    torch.testing.assert_close(loaded.W_dec.norm(dim=1), torch.ones(96), rtol=0, atol=1e-5)
    assert fine_tune(rm, sae, PAIRS, config, own, tmp_path).identity() == tuned.identity()


def test_the_level_holds_the_sum_of_rewards_and_known_scores_change_nothing() -> None:
    rm, sae, own = shared_pm("llama"), sae_of("topk"), SaeConfig(**OWN)
    scores = rm.score_tokens(rm.tokenize_all(PAIRS))

    def tuned(level: float, given: Scores | None = None) -> Sae:
        config = RewardAwareConfig(steps=60, pairs=4, weight=10.0, lr=2e-3, level=level)
        return fine_tune(rm, sae, PAIRS, config, own, scores=given)

    free, held = tuned(0.0), tuned(1.0)
    drift = {name: damage_of(rm, s, 1.0) - damage_of(rm, s) for name, s in (("free", free), ("held", held))}
    assert drift["held"] < 0.5 * drift["free"]
    assert damage_of(rm, held) < 0.5 * damage_of(rm, sae)
    assert tuned(1.0, scores).identity() == held.identity()
    with pytest.raises(InputError, match="scores are of 1 pairs"):
        tuned(1.0, Scores(scores.chosen[:1], scores.rejected[:1]))


def test_without_weight_it_is_plain_training() -> None:
    rm, sae, own = shared_pm("llama"), sae_of("topk"), SaeConfig(**OWN)
    sae.metadata = {"rmscope": {"scale": 0.5, "config": own.model_dump()}}
    tuned = fine_tune(rm, sae, PAIRS, RewardAwareConfig(steps=5, pairs=4, weight=0.0, lr=1e-3, fast=False))
    aware = fine_tune(rm, sae, PAIRS, RewardAwareConfig(steps=5, pairs=4, weight=1.0, lr=1e-3, fast=False))
    plain = sae_of("topk")
    plain.change_units(1 / 0.5)
    run = TrainingRun(training_class("topk")(plain, own.model_copy(update={"warmup": 0.0})), 5, site=SITE)
    tokens = rm.tokenize_all(PAIRS)
    rows = [training_rows(b, rm.streams(b, [SITE])[SITE]) for b in rm.unit_batches(tokens, range(len(PAIRS)), 1 << 30)]
    with torch.no_grad():
        for _ in range(5):
            train_step(run, torch.cat(rows) * 0.5, 1.0)
    plain.change_units(0.5)
    for (name, a), b, c in zip(tuned.named_parameters(), plain.parameters(), aware.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
        assert not torch.allclose(a, c, rtol=1e-4, atol=1e-5)


class KilledError(Exception):
    pass


def test_a_killed_fine_tuning_ends_with_the_same_bytes(tmp_path: Path) -> None:
    rm, sae, own = shared_pm("llama"), sae_of("topk"), SaeConfig(**OWN)
    config = RewardAwareConfig(steps=9, pairs=2, checkpoint_steps=4)

    def kill(done: int, _total: int, note: str) -> None:
        if done == 6 and "scored" not in note:
            raise KilledError

    whole = fine_tune(rm, sae, PAIRS, config, own, tmp_path / "whole")
    with pytest.raises(KilledError):
        fine_tune(rm, sae, PAIRS, config, own, tmp_path / "cut", kill)
    assert (tmp_path / "cut" / SITE / "checkpoint.safetensors").exists()
    assert fine_tune(rm, sae, PAIRS, config, own, tmp_path / "cut").identity() == whole.identity()
    for name in ("cfg.json", "sae_weights.safetensors"):
        assert (tmp_path / "cut" / SITE / name).read_bytes() == (tmp_path / "whole" / SITE / name).read_bytes()
    assert not (tmp_path / "cut" / SITE / "checkpoint.safetensors").exists()


def test_training_rows_are_every_token_once_but_the_first() -> None:
    for rm in (shared_pm("llama"), shared_pm("bloom")):  # packed rows, and a row a text
        tokens = rm.tokenize_all(PAIRS)
        batches = list(rm.unit_batches(tokens, range(len(PAIRS)), budget=1 << 30))
        count = sum(len(training_rows(b, b.ids[..., None].float())) for b in batches)
        reads = [rm.read_position(t.chosen) + rm.read_position(t.rejected) + 1 - t.divergence for t in tokens]
        assert count == sum(reads)
        seen = {int(p) for b in batches for p in by_pair(b, torch.zeros(len(b.texts)))[0]}
        assert seen == set(range(len(PAIRS)))


def test_refusals() -> None:
    rm = shared_pm("llama")
    with pytest.raises(InputError, match="which site"):
        fine_tune(rm, small_sae(), PAIRS)
    wrong = small_sae(d=16)
    wrong.site = SITE
    with pytest.raises(InputError, match="reads 16 dimensions"):
        fine_tune(rm, wrong, PAIRS)
    with pytest.raises(InputError, match="do not differ"):
        fine_tune(rm, sae_of("topk"), [PAIRS[0], PAIRS[0]])
    with pytest.raises(InputError, match="float32"):
        fine_tune(small_pm("llama", torch.bfloat16), sae_of("topk"), PAIRS)


def test_fast_products_give_nearly_the_gradient_and_rewards_are_read_in_full() -> None:
    """Where bfloat16 products are not fast, both are the same."""
    rm = shared_pm("llama")
    sae, tokens = sae_of("topk"), rm.tokenize_all(PAIRS)
    scores = rm.score_tokens(tokens)
    batch = next(iter(rm.unit_batches(tokens, range(len(PAIRS)), budget=1 << 30)))
    stream = rm.streams(batch, [SITE])[SITE]
    exact, fast = (splice_gradients(rm, sae, batch, stream, Damage(scores, fast=f), 0.7)[1] for f in (False, True))
    for name, g in exact.items():
        apart = (fast[name] - g).norm() / g.norm()
        assert apart < 0.05, name
        assert (apart > 0) == has_fast_bfloat16(rm.device.type), name

    hidden = torch.randn(5, rm.d_model, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        read = rm.read_out(hidden)
    assert torch.equal(read, rm.read_out(hidden))

"""Encoding, its sparse form, units, identity, the registry and the settings."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from rmscope.errors import InputError
from rmscope.sae import Sae, SaeConfig, measure_sae
from rmscope.sae.base import register_sae, register_training, sae_class, training_class
from rmscope.sae.gated import GatedSae
from rmscope.sae.jumprelu import JumpReluSae
from rmscope.sae.standard import StandardSae
from rmscope.sae.topk import TopKSae, TopKTraining
from tests.sae.twins import fvu

D, M = 10, 32


def random_sae(kind: str, seed: int = 0) -> Sae:
    generator = torch.Generator().manual_seed(seed)
    sae = sae_class(kind)(D, M, "resid_post.2", **({"k": 6} if kind == "topk" else {}))
    for p in sae.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator))
    if kind == "jumprelu":
        sae.threshold.abs_()
    return sae


KINDS = ["topk", "gated", "standard", "jumprelu"]


@pytest.mark.parametrize("kind", KINDS)
def test_active_is_encode_written_sparsely(kind: str) -> None:
    sae, x = random_sae(kind), torch.randn(53, D, generator=torch.Generator().manual_seed(1))
    active, f = sae.active(x, chunk=10), sae.encode(x)
    again = torch.zeros_like(f)
    again[active.token, active.feature] = active.value
    torch.testing.assert_close(again, f, rtol=1e-5, atol=1e-5)
    assert (active.value > 0).all()
    key = active.token * M + active.feature
    assert (key[1:] > key[:-1]).all()
    rows = active.rows()
    assert rows[0] == 0
    assert rows[-1] == len(active.value)
    assert (active.token[rows[7] : rows[8]] == 7).all()
    torch.testing.assert_close(sae.decode_active(active), sae.decode(f), rtol=1e-4, atol=1e-4)
    assert sae.active(x[:0]).rows().tolist() == [0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_on_another_device_is_not_part_of_the_sae_and_is_dropped_when_units_or_weights_change(kind: str) -> None:
    sae, x = random_sae(kind), torch.randn(20, D, generator=torch.Generator().manual_seed(1))
    known, names = sae.identity(), list(sae.state_dict())
    sae.encode_on(torch.device("meta"))  # no product has values there
    assert (sae.identity(), list(sae.state_dict())) == (known, names)
    with pytest.raises((NotImplementedError, RuntimeError)):
        sae.active(x)
    sae.change_units(2.0)
    sae.active(x)
    sae.encode_on(torch.device("meta"))
    sae.fill(dict(random_sae(kind, seed=2).state_dict()))
    torch.testing.assert_close(sae.active(x).value, random_sae(kind, seed=2).active(x).value)
    sae.encode_on(torch.device("meta"))
    sae.encode_on(torch.device("cpu"))
    sae.active(x)


def test_encoders_follow_their_equations() -> None:
    x = torch.randn(4, D, generator=torch.Generator().manual_seed(1))
    gated = random_sae("gated")
    assert isinstance(gated, GatedSae)
    u = (x - gated.b_dec) @ gated.W_enc
    magnitude = (u * gated.r_mag.exp() + gated.b_mag).relu()
    torch.testing.assert_close(gated.encode(x), torch.where(u + gated.b_gate > 0, magnitude, 0.0))
    jump, standard = random_sae("jumprelu"), random_sae("standard")
    assert isinstance(jump, JumpReluSae)
    assert isinstance(standard, StandardSae)
    h = (x - jump.b_dec) @ jump.W_enc + jump.b_enc
    torch.testing.assert_close(jump.encode(x), torch.where(h > jump.threshold, h.relu(), 0.0))
    topk = random_sae("topk")
    assert ((topk.encode(x) > 0).sum(1) <= 6).all()
    assert topk.encode(x[None, None]).shape == (1, 1, 4, M)


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_of_units_is_exact(kind: str) -> None:
    """An SAE trained on s x, folded, gives on x the same features and reconstruction divided by s."""
    sae, x, s = random_sae(kind).double(), torch.randn(9, D).double(), 7.3
    f, x_hat = sae.encode(s * x), sae(s * x)
    sae.change_units(s)
    torch.testing.assert_close(sae.encode(x) * s, f, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(sae(x) * s, x_hat, rtol=1e-10, atol=1e-10)


def test_identity_sees_weights_settings_and_family() -> None:
    ids = {random_sae(kind).identity() for kind in KINDS} | {random_sae("topk", seed=1).identity()}
    assert len(ids) == 5
    assert random_sae("topk").identity() == random_sae("topk").identity()
    wider = random_sae("topk")
    wider.cfg["k"] = 7
    assert wider.identity() not in ids


def test_registry_refuses_duplicates_and_names_the_known() -> None:
    with pytest.raises(ValueError, match="already an SAE family topk"):
        register_sae(type("Again", (TopKSae,), {}))
    with pytest.raises(ValueError, match="already a training"):
        register_training("topk")(TopKTraining)
    with pytest.raises(InputError, match="no SAE family topkk; known: gated, jumprelu, matching_pursuit, standard, topk"):
        sae_class("topkk")
    with pytest.raises(InputError, match="choose one of batchtopk, gated, jumprelu, matryoshka, standard, topk"):
        training_class("topkk")
    with pytest.raises(InputError, match="cannot keep k = 50"):
        TopKSae(4, 20, k=50)


def test_settings_refuse_unknown_keys_and_document_every_field() -> None:
    with pytest.raises(ValidationError):
        SaeConfig(d_sea=3)
    assert all(field.description for field in SaeConfig.model_fields.values())
    config = SaeConfig(tokens=None)
    assert config.budget(10_000) == 200_000
    assert config.budget(1_000_000) == 2_000_000
    assert config.budget(5_000_000) == 5_000_000
    assert SaeConfig(epochs=3).budget(10) == 30
    rates = [config.schedule(step, 100)[0] for step in range(100)]
    assert rates[0] < rates[4] == rates[80] == 1.0 > rates[99] > 0


def test_metrics_on_batches_equal_those_on_the_whole() -> None:
    sae, x = random_sae("topk"), 5 + torch.randn(90, D, generator=torch.Generator().manual_seed(2))
    found, x_hat, f = measure_sae(sae, x.split(40)), sae(x), sae.encode(x)
    assert found.tokens == 90
    assert found.fvu == pytest.approx(fvu(x, x_hat), rel=1e-5)
    assert found.l0 == pytest.approx(float((f > 0).sum() / 90))
    assert found.norm_ratio == pytest.approx(float(x_hat.norm(dim=1).sum() / x.norm(dim=1).sum()), rel=1e-5)
    assert found.cosine == pytest.approx(float(torch.cosine_similarity(x, x_hat).mean()), rel=1e-5)
    assert torch.allclose(found.density, (f > 0).float().mean(0))
    assert found.dead == pytest.approx(float(((f > 0).sum(0) == 0).float().mean()))
    with pytest.raises(InputError, match="width 10"):
        measure_sae(sae, [x[:, :3]])
    with pytest.raises(InputError, match="no activations"):
        measure_sae(sae, [])


def test_fvu_is_centred_per_dimension() -> None:
    """The mean explains nothing, and an outlier dimension's offset does not flatter."""
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0)) + torch.tensor([0.0, 0.0, 0.0, 1e3])
    mean, eye = StandardSae(4, 8), torch.eye(4)
    mean.b_dec.copy_(x.mean(0))
    assert measure_sae(mean, [x]).fvu == pytest.approx(1.0)
    weights = {"W_enc": torch.cat([eye, -eye]).t(), "W_dec": torch.cat([eye, -eye]), "b_enc": torch.zeros(8)}
    assert measure_sae(StandardSae(4, 8).fill({**weights, "b_dec": torch.zeros(4)}), [x]).fvu == 0

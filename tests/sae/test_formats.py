"""What is saved comes back; what others saved is read by their own equations."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rmscope.api.effects import attribute
from rmscope.errors import InputError
from rmscope.sae import Sae
from rmscope.sae.formats import hook_name, sae_source, site_of
from tests.model.small import PAIRS, shared_pm
from tests.sae.test_sae import KINDS, D, M, random_sae

X = torch.randn(20, D, generator=torch.Generator().manual_seed(5))


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind: str, tmp_path: Path) -> None:
    sae = random_sae(kind)
    sae.metadata = {"model_name": "toy/pm", "rmscope": {"tokens": 5}}
    sae.save(tmp_path / "a")
    again = Sae.load(tmp_path / "a")
    assert type(again) is type(sae)
    assert again.identity() == sae.identity()
    assert again.site == "resid_post.2"
    assert again.metadata["rmscope"] == {"tokens": 5}
    assert torch.equal(again.encode(X), sae.encode(X))
    assert Sae.load(tmp_path / "a" / "cfg.json").identity() == sae.identity()
    again.save(tmp_path / "b")
    for name in ("cfg.json", "sae_weights.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_layout_is_that_of_saelens(tmp_path: Path) -> None:
    random_sae("topk").save(tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    assert (cfg["architecture"], cfg["d_in"], cfg["d_sae"], cfg["k"]) == ("topk", D, M, 6)
    assert cfg["apply_b_dec_to_input"] is True
    assert cfg["metadata"]["hook_name"] == "blocks.2.hook_resid_post"
    assert cfg["metadata"]["sae_lens_version"].startswith("6.")
    shapes = {name: list(w.shape) for name, w in load_file(tmp_path / "sae_weights.safetensors").items()}
    assert shapes == {"W_enc": [D, M], "b_enc": [M], "W_dec": [M, D], "b_dec": [D]}


def test_an_old_version_in_the_metadata_is_not_passed_on(tmp_path: Path) -> None:
    sae = random_sae("gated")
    sae.metadata = {"sae_lens_version": "5.9.0"}
    sae.save(tmp_path)
    assert json.loads((tmp_path / "cfg.json").read_text())["metadata"]["sae_lens_version"].startswith("6.")


def test_sites_and_hooks_name_each_other() -> None:
    for site in ("embed", "resid_post.0", "resid_post.17"):
        assert site_of(hook_name(site)) == site
    assert site_of("blocks.4.hook_resid_pre") == "resid_post.3"
    assert site_of("blocks.0.hook_resid_pre") == "embed"
    assert site_of("blocks.3.hook_mlp_out") == "blocks.3.hook_mlp_out"
    hooks = ("model.layers.4", "transformer.h.4", "gpt_neox.layers.4", "model.layers.4.output.0", "layers.4.output[0]")
    assert [site_of(hook) for hook in hooks] == ["resid_post.4"] * 5
    for other in ("model.layers.4.mlp", "model.layers.4.self_attn.output", "blocks.4.attn.hook_z"):
        assert site_of(other) == other


def test_an_sae_of_another_hook_is_refused_when_it_is_read(tmp_path: Path) -> None:
    sae = random_sae("topk")
    sae.save(tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    for hook in ("blocks.4.hook_mlp_out", "model.layers.4.mlp"):
        cfg["metadata"]["hook_name"] = hook
        (tmp_path / "cfg.json").write_text(json.dumps(cfg))
        with pytest.raises(InputError, match=f"reads {hook}, and only the residual stream"):
            Sae.load(tmp_path)


def jumprelu(x: torch.Tensor, weights: dict[str, torch.Tensor], threshold: torch.Tensor) -> torch.Tensor:
    """Features of a JumpReLU SAE that reads x itself."""
    pre = x @ weights["W_enc"] + weights["b_enc"]
    return pre * (pre > threshold)


def scope_weights() -> dict[str, torch.Tensor]:
    return {
        "W_enc": draw(D, M), "W_dec": draw(M, D, seed=1), "b_enc": draw(M, seed=2), "b_dec": draw(D, seed=3),
        "threshold": 0.5 + draw(M, seed=4).abs(),
    }  # fmt: skip


@pytest.mark.parametrize("second", [False, True])
def test_gemma_scope(second: bool, tmp_path: Path) -> None:
    w = scope_weights()
    if second:
        named = {key.replace("W_", "w_"): value for key, value in w.items()}
        save_file(named, tmp_path / "params.safetensors")
    else:
        np.savez(tmp_path / "params.npz", **{key: value.numpy() for key, value in w.items()})
    sae, f = Sae.load(tmp_path), jumprelu(X, w, w["threshold"])
    assert (f > 0).any()
    assert (sae.architecture, sae.site) == ("jumprelu", "")
    torch.testing.assert_close(sae.encode(X), f * w["W_dec"].norm(dim=1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sae(X), f @ w["W_dec"] + w["b_dec"], atol=1e-4, rtol=1e-4)
    if second:
        save_file({**named, "affine_skip_connection": draw(D, D)}, tmp_path / "params.safetensors")
        with pytest.raises(InputError, match=r"holds affine_skip_connection, so it is not a Gemma Scope SAE"):
            Sae.load(tmp_path)


LLAMA_SCOPE = {
    "act_fn": "jumprelu", "jump_relu_threshold": 0.7, "norm_activation": "dataset-wise",
    "dataset_average_activation_norm": {"in": 2.5, "out": 2.5}, "apply_decoder_bias_to_pre_encoder": False,
    "hook_point_in": "blocks.3.hook_resid_post", "hook_point_out": "blocks.3.hook_resid_post",
}  # fmt: skip


def llama_scope(folder: Path, **changes: object) -> dict[str, torch.Tensor]:
    w = scope_weights()
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "hyperparams.json").write_text(json.dumps({**LLAMA_SCOPE, **changes}))
    tensors = {
        "encoder.weight": w["W_enc"].t(), "encoder.bias": w["b_enc"],
        "decoder.weight": w["W_dec"].t(), "decoder.bias": w["b_dec"],
    }  # fmt: skip
    save_file({key: t.contiguous() for key, t in tensors.items()}, folder / "checkpoints" / "final.safetensors")
    return w


def test_llama_scope_reads_x_at_the_scale_of_its_dataset(tmp_path: Path) -> None:
    w = llama_scope(tmp_path)
    scale = D**0.5 / 2.5
    f = jumprelu(scale * X, w, torch.tensor(0.7))
    assert (f > 0).any()
    for given in (tmp_path, tmp_path / "hyperparams.json", tmp_path / "checkpoints" / "final.safetensors"):
        sae = Sae.load(given)
        assert (sae.architecture, sae.site) == ("jumprelu", "resid_post.3")
        torch.testing.assert_close(sae(X), (f @ w["W_dec"] + w["b_dec"]) / scale, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(sae.encode(X), f / scale * w["W_dec"].norm(dim=1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"jump_relu_threshold": None}, {"act_fn": "topk"}, {"norm_activation": "token-wise"},
        {"hook_point_out": "blocks.3.hook_mlp_out"}, {"apply_decoder_bias_to_pre_encoder": True},
        {"dataset_average_activation_norm": {}},
    ],
)  # fmt: skip
def test_what_llama_scope_does_not_say_is_not_guessed(changes: dict[str, object], tmp_path: Path) -> None:
    llama_scope(tmp_path, **changes)
    with pytest.raises(InputError, match="not read by guess"):
        Sae.load(tmp_path)


def test_an_encoder_and_a_decoder_alone_are_not_taken_for_a_standard_sae(tmp_path: Path) -> None:
    llama_scope(tmp_path)
    alone = tmp_path / "elsewhere.safetensors"
    (tmp_path / "checkpoints" / "final.safetensors").rename(alone)
    with pytest.raises(InputError, match="not what belongs between them"):
        Sae.load(alone)


def test_matryoshka_batch_topk_of_dictionary_learning(tmp_path: Path) -> None:
    """Its own equations: relu((x - b_dec) W_enc + b_enc), kept above one threshold."""
    w = scope_weights()
    stored = {**w, "threshold": torch.tensor(0.7), "k": torch.tensor(6), "group_sizes": torch.tensor([8, M - 8])}
    torch.save(stored, tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": "MatryoshkaBatchTopKSAE", "k": 6}}))
    sae, f = Sae.load(tmp_path), jumprelu(X - w["b_dec"], w, torch.tensor(0.7))
    torch.testing.assert_close(sae(X), f @ w["W_dec"] + w["b_dec"], atol=1e-4, rtol=1e-4)
    torch.save({**stored, "threshold": torch.tensor(-1.0)}, tmp_path / "ae.pt")
    with pytest.raises(InputError, match="never set its threshold"):
        Sae.load(tmp_path)


def test_a_dead_feature_whose_row_is_zero_stays_a_number(tmp_path: Path) -> None:
    w = scope_weights()
    w["W_dec"][4] = 0
    np.savez(tmp_path / "params.npz", **{key: value.numpy() for key, value in w.items()})
    sae = Sae.load(tmp_path)
    assert torch.isfinite(sae(X)).all()
    torch.testing.assert_close(sae(X), jumprelu(X, w, w["threshold"]) @ w["W_dec"] + w["b_dec"], atol=1e-4, rtol=1e-4)


def test_saelens_conventions_are_folded(tmp_path: Path) -> None:
    """No b_dec on the input, and activations counted with the decoder's norm, as SAELens computes them."""
    w = {"W_enc": draw(D, M), "b_enc": draw(M), "W_dec": draw(M, D, seed=1), "b_dec": draw(D, seed=2)}
    cfg = {"architecture": "topk", "d_in": D, "d_sae": M, "k": 4, "normalize_activations": "none"}
    save_file(w, tmp_path / "sae_weights.safetensors")
    cfg |= {"apply_b_dec_to_input": False, "rescale_acts_by_decoder_norm": True}
    (tmp_path / "cfg.json").write_text(json.dumps(cfg | {"metadata": {"hook_name": "hook_embed"}}))
    norms = w["W_dec"].norm(dim=1)
    h = (X @ w["W_enc"] + w["b_enc"]) * norms
    top = h.topk(4)
    f = torch.zeros_like(h).scatter(1, top.indices, top.values.relu())
    sae = Sae.load(tmp_path)
    assert sae.site == "embed"
    torch.testing.assert_close(sae.encode(X), f, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae(X), (f / norms) @ w["W_dec"] + w["b_dec"], rtol=1e-4, atol=1e-4)
    (tmp_path / "cfg.json").write_text(json.dumps(cfg | {"normalize_activations": "layer_norm"}))
    with pytest.raises(InputError, match="layer_norm"):
        Sae.load(tmp_path)


def test_the_reference_study(tmp_path: Path) -> None:
    """``ae_layer12.pt``: a bare state dict of dictionary_learning's GatedAutoEncoder."""
    w = {
        "encoder.weight": draw(M, D),
        "decoder.weight": draw(D, M, seed=1),
        "decoder_bias": draw(D, seed=2),
        "r_mag": draw(M, seed=3),
        "gate_bias": draw(M, seed=4),
        "mag_bias": draw(M, seed=5),
    }
    torch.save(w, tmp_path / "ae_layer12.pt")
    u = (X - w["decoder_bias"]) @ w["encoder.weight"].t()
    f = (u + w["gate_bias"] > 0) * (w["r_mag"].exp() * u + w["mag_bias"]).relu()
    norms = w["decoder.weight"].norm(dim=0)
    sae = Sae.load(tmp_path / "ae_layer12.pt")
    assert sae.architecture == "gated"
    torch.testing.assert_close(sae.encode(X), f * norms, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae(X), f @ w["decoder.weight"].t() + w["decoder_bias"], rtol=1e-4, atol=1e-4)
    torch.save({**w, "r_mag": draw(M + 1)}, tmp_path / "odd.pt")
    with pytest.raises(InputError, match=r"r_mag is \[33\] beside W_dec \[32, 10\]"):
        Sae.load(tmp_path / "odd.pt")


def dictionary(folder: Path, weights: dict[str, torch.Tensor], **trainer: object) -> Sae:
    folder.mkdir(exist_ok=True)
    torch.save(weights, folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    return Sae.load(folder)


def test_dictionary_learning(tmp_path: Path) -> None:
    w = {"encoder.weight": draw(M, D), "encoder.bias": draw(M), "decoder.weight": draw(D, M, seed=1)}
    b, threshold = draw(D, seed=2), torch.tensor(0.7)
    h = (X - b) @ w["encoder.weight"].t() + w["encoder.bias"]

    standard = dictionary(tmp_path / "s", {**w, "bias": b}, dict_class="AutoEncoder")
    torch.testing.assert_close(standard.encode(X), h.relu(), rtol=1e-4, atol=1e-4)
    new = dictionary(tmp_path / "n", {**w, "decoder.bias": b}, dict_class="AutoEncoderNew")
    expected = (X @ w["encoder.weight"].t() + w["encoder.bias"]).relu()
    torch.testing.assert_close(new.encode(X), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(new(X), expected @ w["decoder.weight"].t() + b, rtol=1e-4, atol=1e-4)

    extra = {"b_dec": b, "k": torch.tensor(5), "threshold": threshold}
    topk = dictionary(tmp_path / "t", w | extra, dict_class="AutoEncoderTopK", layer=3, submodule_name="resid_post_layer_3")
    assert (topk.cfg, topk.site) == ({"k": 5}, "resid_post.3")
    assert ((topk.encode(X) > 0) <= (h > 0)).all()
    batch = dictionary(tmp_path / "b", w | extra, dict_class="BatchTopKSAE")
    f, norms = h * (h > threshold), w["decoder.weight"].norm(dim=0)
    assert batch.architecture == "jumprelu"
    assert Sae.load(tmp_path / "b" / "ae.pt").identity() == batch.identity()  # its config beside it counts
    torch.testing.assert_close(batch.encode(X), f * norms, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(batch(X), f @ w["decoder.weight"].t() + b, rtol=1e-4, atol=1e-4)

    jump = {
        "W_enc": draw(D, M),
        "b_enc": draw(M),
        "W_dec": draw(M, D),
        "b_dec": b,
        "threshold": draw(M).abs(),
    }
    loaded = dictionary(tmp_path / "j", jump, dict_class="JumpReluAutoEncoder")
    pre = X @ jump["W_enc"] + jump["b_enc"]
    expected = (pre * (pre > jump["threshold"])).relu()
    torch.testing.assert_close(loaded(X), expected @ jump["W_dec"] + b, rtol=1e-3, atol=1e-3)


def test_sparsify(tmp_path: Path) -> None:
    folder = tmp_path / "layers.4"
    folder.mkdir()
    w = {"encoder.weight": draw(M, D), "encoder.bias": draw(M), "W_dec": draw(M, D, seed=1), "b_dec": draw(D)}
    save_file(w, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"k": 7, "d_in": D, "num_latents": M}))
    sae = Sae.load(folder)
    assert (sae.site, sae.cfg) == ("resid_post.4", {"k": 7})
    h = (X - w["b_dec"]) @ w["encoder.weight"].t() + w["encoder.bias"]
    top = h.topk(7)
    f = torch.zeros_like(h).scatter(1, top.indices, top.values.relu())
    torch.testing.assert_close(sae(X), f @ w["W_dec"] + w["b_dec"], rtol=1e-4, atol=1e-4)


def test_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder, a file, or the repository itself; only an SAE's files are asked for."""
    random_sae("gated").save(tmp_path / "layer_2" / "width_32")
    random_sae("topk").save(tmp_path)
    asked: list[tuple[str, list[str]]] = []

    def snapshot(repo: str, allow_patterns: list[str]) -> str:
        asked.append((repo, allow_patterns))
        if repo == "no/where":
            raise OSError("Repository Not Found\nfor url")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert Sae.load("hub:owner/repo/layer_2/width_32").identity() == random_sae("gated").identity()
    assert Sae.load("hub:owner/repo/layer_2/width_32/cfg.json").identity() == random_sae("gated").identity()
    assert Sae.load("hub:owner/repo").identity() == random_sae("topk").identity()
    assert asked[0][0] == "owner/repo"
    assert "layer_2/width_32/sae_weights.safetensors" in asked[0][1]
    assert "layer_2/width_32/cfg.json" in asked[1][1]
    with pytest.raises(InputError, match="Repository Not Found"):
        Sae.load("hub:no/where")
    with pytest.raises(InputError, match="hub:owner/repo"):
        Sae.load("hub:alone")


def test_an_sae_of_another_width_is_refused() -> None:
    pm = shared_pm("llama")
    with pytest.raises(InputError, match=r"width 10, but llama has d_model 32"):
        attribute(pm, random_sae("topk"), PAIRS)


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('ran')",))


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no SAE at"):
        Sae.load(tmp_path / "nothing")
    for name, value in (("bomb.pt", Bomb()), ("list.pt", [1, 2])):
        torch.save(value, tmp_path / name)
        with pytest.raises(InputError, match=name):
            Sae.load(tmp_path / name)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(InputError, match=r"plain\.pt"):
        Sae.load(tmp_path / "plain.pt")
    (tmp_path / "short.safetensors").write_bytes(b"\x08\x00")
    with pytest.raises(InputError, match=r"short\.safetensors cannot be read"):
        Sae.load(tmp_path / "short.safetensors")
    save_file({"weird": torch.ones(2)}, tmp_path / "weird.safetensors")
    with pytest.raises(InputError, match="no known SAE: weird"):
        Sae.load(tmp_path / "weird.safetensors")
    random_sae("topk").save(tmp_path / "sae")
    cfg = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    (tmp_path / "sae" / "cfg.json").write_text(json.dumps({**cfg, "architecture": "transcoder"}))
    with pytest.raises(InputError, match="no SAE family transcoder"):
        Sae.load(tmp_path / "sae")
    (tmp_path / "sae" / "cfg.json").unlink()
    with pytest.raises(InputError, match=r"cfg\.json is missing"):
        Sae.load(tmp_path / "sae")


@pytest.mark.parametrize(
    ("saes", "site", "source"),
    [
        ("runs/a/saes", "resid_post.6", "runs/a/saes/resid_post.6"),
        ("hub:owner/repo", "embed", "hub:owner/repo/embed"),
        ("hub:owner/repo/ae_layer{L}.pt", "resid_post.12", "hub:owner/repo/ae_layer12.pt"),
        ("saes/{site}/trained", "embed", "saes/embed/trained"),
        ("{site}/{L}.pt", "resid_post.0", "resid_post.0/0.pt"),
    ],
)
def test_the_sae_of_a_site_lies_where_its_pattern_says(saes: str, site: str, source: str) -> None:
    assert sae_source(saes, site) == source


@pytest.mark.parametrize(
    ("saes", "site", "told"),
    [
        ("ae_{layer}.pt", "resid_post.6", r"name \{layer\}, which is not known; use \{site\} or \{L\}"),
        ("ae_{L}.pt", "embed", r"the site embed is none; use \{site\}"),
    ],
)
def test_a_pattern_that_names_no_sae_is_refused(saes: str, site: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        sae_source(saes, site)

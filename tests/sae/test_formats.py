"""What is saved comes back; what others saved is read by their own equations, or refused by the name of what is unknown."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rmscope.api.effects import attribute
from rmscope.errors import InputError
from rmscope.sae import Sae
from rmscope.sae.formats import sae_source
from rmscope.sae.formats.source import read_tensors
from tests.model.small import PAIRS, shared_pm
from tests.sae.sources import ROWS, SOURCES, SaeSource, write_llama_scope
from tests.sae.test_sae import KINDS, D, M, random_sae

X = torch.randn(20, D, generator=torch.Generator().manual_seed(5))
BY_NAME = {source.name: source for source in SOURCES}


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


# What others published


@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.name)
def test_features_are_those_of_the_sources_own_equations(source: SaeSource, tmp_path: Path) -> None:
    assert source.compare(tmp_path) == ROWS
    sae = Sae.load(source_place(source, tmp_path / "again"))
    assert (sae.architecture, sae.site) == (source.family, source.site)


@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.name)
def test_what_was_read_is_kept_with_its_meaning(source: SaeSource, tmp_path: Path) -> None:
    sae = Sae.load(source_place(source, tmp_path / "theirs"))
    sae.save(tmp_path / "ours")
    again = Sae.load(tmp_path / "ours")
    assert (again.identity(), again.site, again.cfg) == (sae.identity(), sae.site, sae.cfg)


def test_what_is_stated_of_an_sae_is_kept(tmp_path: Path) -> None:
    stated = {
        "Gemma Scope": ("google/gemma-2-2b", 71),
        "Gemma Scope 2": ("google/gemma-3-4b-pt", 60),
        "Llama Scope": (None, 50),
        "Qwen-Scope": ("Qwen/Qwen3-8B-Base", None),
        "Goodfire": ("Llama-3.1-8B-Instruct", None),
        "dictionary_learning, BatchTopKSAE": ("EleutherAI/pythia-70m", 6),
    }
    for name, (model, l0) in stated.items():
        metadata = Sae.load(source_place(BY_NAME[name], tmp_path / name)).metadata
        assert (metadata.get("model_name"), metadata.get("l0")) == (model, l0)


def source_place(source: SaeSource, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return source.write(folder)


def weights_file(place: Path) -> Path:
    if place.is_file():
        return place
    return next(p for p in sorted(place.rglob("*")) if p.suffix in (".safetensors", ".pt", ".npz"))


def settings_file(place: Path) -> Path | None:
    found = [] if place.is_file() else list(place.glob("*.json"))
    return found[0] if found else None


def rewrite(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    if path.suffix == ".safetensors":
        save_file({key: w.contiguous() for key, w in tensors.items()}, path)
    elif path.suffix == ".npz":
        np.savez(path, **{key: w.numpy() for key, w in tensors.items()})  # type: ignore[arg-type]
    else:
        torch.save(tensors, path)


def change(place: Path, **settings: Any) -> None:
    """Changes settings; those of dictionary_learning are in ``trainer``."""
    path = settings_file(place)
    assert path is not None
    stored = json.loads(path.read_text())
    stored.get("trainer", stored).update(settings)
    path.write_text(json.dumps(stored))


@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.name)
def test_a_tensor_that_is_unknown_or_missing_is_named_and_the_sae_refused(source: SaeSource, tmp_path: Path) -> None:
    place = source_place(source, tmp_path)
    path = weights_file(place)
    tensors = read_tensors(path)
    rewrite(path, {**tensors, "second_scale": torch.ones(M)})
    with pytest.raises(InputError, match="second_scale, which is not known"):
        Sae.load(place)
    unneeded = {"k", "group_sizes", "scaling_factor"}  # the config has them too, or they need not be there
    if source.name == "dictionary_learning, AutoEncoderTopK":
        unneeded |= {"threshold"}  # its own forward does not use it
    for name in tensors.keys() - unneeded:
        rewrite(path, {key: w for key, w in tensors.items() if key != name})
        with pytest.raises(InputError):
            Sae.load(place)


@pytest.mark.parametrize("source", [s for s in SOURCES if "json" in s.files], ids=lambda s: s.name)
def test_a_setting_that_is_unknown_is_named_and_the_sae_refused(source: SaeSource, tmp_path: Path) -> None:
    place = source_place(source, tmp_path)
    change(place, input_rotation=3, lr_end=0.1, wandb_notes="x", another=None)
    with pytest.raises(InputError, match="holds input_rotation, which is not known"):
        Sae.load(place)


@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.name)
def test_weights_that_contradict_each_other_or_are_not_finite_are_refused(source: SaeSource, tmp_path: Path) -> None:
    place = source_place(source, tmp_path)
    path = weights_file(place)
    tensors = read_tensors(path)
    name = next(key for key, w in tensors.items() if w.is_floating_point() and w.dim() == 2)
    rewrite(path, {**tensors, name: tensors[name][:-1]})
    with pytest.raises(InputError):
        Sae.load(place)
    rewrite(path, {**tensors, name: torch.where(torch.eye(*tensors[name].shape) > 0, torch.nan, tensors[name])})
    with pytest.raises(InputError, match="not finite"):
        Sae.load(place)


ODD_VALUES = (3, -1.5, "x", [1], {"a": 1}, True, None)
ODD_TENSORS = (torch.ones(()), torch.ones(3), torch.ones(2, 3, 4), torch.ones(M, D, dtype=torch.int64), torch.ones(0))


@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.name)
def test_odd_settings_and_tensors_give_an_sae_or_a_sentence(source: SaeSource, tmp_path: Path) -> None:
    place = source_place(source, tmp_path)
    opened = refused = 0

    def try_it() -> None:
        nonlocal opened, refused
        try:
            Sae.load(place)
            opened += 1
        except InputError:
            refused += 1

    if path := settings_file(place):
        stored = json.loads(path.read_text())
        for section in [stored, *(v for v in stored.values() if isinstance(v, dict))]:
            for key, value in list(section.items()):
                for odd in ODD_VALUES:
                    section[key] = odd
                    path.write_text(json.dumps(stored))
                    try_it()
                section[key] = value
        path.write_text(json.dumps(stored))
    tensors = read_tensors(weights_file(place))
    for name in tensors:
        for odd_tensor in ODD_TENSORS:
            rewrite(weights_file(place), {**tensors, name: odd_tensor})
            try_it()
    assert refused > 5 * len(tensors) / 2


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("SAELens, standard", {"architecture": "transcoder"}, "is a transcoder: it computes one stream from another"),
    ("SAELens, standard", {"architecture": "jumprelu_skip_transcoder"}, "is a jumprelu_skip_transcoder"),
    ("SAELens, standard", {"architecture": "temporal"}, "depend on the tokens before"),
    ("SAELens, standard", {"architecture": "odd"}, "no SAE family odd"),
    ("SAELens, standard", {"activation_fn_str": "tanh-relu"}, "tanh-relu"),
    ("SAELens, standard", {"normalize_activations": "layer_norm"}, "normalize_activations = 'layer_norm'"),
    ("SAELens, standard", {"normalize_activations": "expected_average_only_in"}, "expected_average_only_in"),
    ("SAELens, standard", {"reshape_activations": "hook_z"}, "hook_z"),
    ("SAELens, standard", {"d_in": 11}, "d_in = 11, but the weights have 10"),
    ("SAELens, standard", {"metadata": {"hook_name": "blocks.4.hook_mlp_out"}}, "reads blocks.4.hook_mlp_out"),
    ("SAELens, standard", {"metadata": {"hook_name": "model.layers.4.mlp"}}, "only the residual stream"),
    ("SAELens, standard", {"metadata": {"hook_name": "hook_embed", "hook_head_index": 2}}, "head 2 alone"),
    (
        "SAELens, standard",
        {"metadata": {"hook_name": "hook_embed", "model_from_pretrained_kwargs": {"center_writing_weights": True}}},
        "centred weights",
    ),
    ("SAELens before 6, scaling factor", {"finetuning_scaling_factor": False}, "scaling_factor that is not 1"),
    ("SAELens, TopK, norms counted", {"k": None}, "does not name its k"),
    ("dictionary_learning, AutoEncoder", {"dict_class": "CrossCoder"}, "names the class CrossCoder"),
    ("dictionary_learning, AutoEncoder", {"submodule_name": "mlp_layer_3"}, "reads mlp_layer_3"),
    ("dictionary_learning, AutoEncoder", {"submodule_name": "model.layers.3.mlp"}, r"reads model\.layers\.3\.mlp"),
    ("dictionary_learning, BatchTopKSAE", {"k": 7}, "k = 7, but the weights have 6"),
    ("dictionary_learning, BatchTopKSAE", {"dict_class": None}, "which names the class"),
    ("dictionary_learning, AutoEncoderNew", {"dict_class": None}, "which names the class"),
    ("dictionary_learning, JumpReluAutoEncoder", {"dict_class": None}, "which names the class"),
    ("sparsify, TopK", {"signed": True}, "keeps negative activations"),
    ("sparsify, TopK", {"transcode": True}, "is a transcoder"),
    ("sparsify, TopK", {"skip_connection": True}, "linear skip connection"),
    ("sparsify, TopK", {"activation": "groupmax"}, "groupmax"),
    ("sparsify, TopK", {"gram_lookup": True}, "table of n-grams"),
    ("Gemma Scope 2", {"affine_connection": True}, "affine skip connection"),
    ("Gemma Scope 2", {"type": "transcoder"}, "is a transcoder"),
    ("Gemma Scope 2", {"hf_hook_point_in": "model.layers.5.self_attn.o_proj.input"}, "reconstructs model.layers.17.output"),
    ("Llama Scope", {"jump_relu_threshold": None}, "holds no jump_relu_threshold"),
    ("Llama Scope", {"act_fn": "topk"}, "act_fn = 'topk'"),
    ("Llama Scope", {"act_fn": None}, "holds no act_fn"),
    ("Llama Scope", {"norm_activation": "token-wise"}, "token-wise"),
    ("Llama Scope", {"dataset_average_activation_norm": {}}, "not name one norm"),
    ("Llama Scope", {"dataset_average_activation_norm": {"in": 64.0, "out": 3.4}}, "not name one norm"),
    ("Llama Scope", {"hook_point_out": "blocks.24.hook_mlp_out"}, "it is a transcoder"),
    ("Llama Scope", {"apply_decoder_bias_to_pre_encoder": True}, "apply_decoder_bias_to_pre_encoder = True"),
    ("Llama Scope", {"use_glu_encoder": True}, "use_glu_encoder = True"),
    ("Llamascopium, JumpReLU", {"act_fn": "batchtopk"}, "act_fn = 'batchtopk'"),
    ("Llamascopium, JumpReLU", {"sae_type": "lorsa"}, "is a lorsa"),
]


@pytest.mark.parametrize(("name", "settings", "told"), REFUSED)
def test_a_convention_that_cannot_be_followed_is_refused(
    name: str, settings: dict[str, Any], told: str, tmp_path: Path
) -> None:
    place = source_place(BY_NAME[name], tmp_path)
    change(place, **settings)
    with pytest.raises(InputError, match=told):
        Sae.load(place)


def test_a_gemma_scope_repository_of_another_stream_is_refused(tmp_path: Path) -> None:
    place = BY_NAME["Gemma Scope"].write(tmp_path)
    for folder in (
        "gemma-scope-2b-pt-mlp/layer_20/width_16k/average_l0_71",
        "models--google--gemma-scope-9b-pt-transcoders/snapshots/ab12/layer_1",
        "gemma-scope-2-1b-pt/attn_out_all/layer_11_width_16k_l0_small",
    ):
        other = tmp_path / folder / "params.npz"
        other.parent.mkdir(parents=True)
        shutil.copy(place, other)
        with pytest.raises(InputError, match="only the residual stream"):
            Sae.load(other)


def test_a_gemma_scope_file_with_an_affine_skip_is_refused(tmp_path: Path) -> None:
    place = BY_NAME["Gemma Scope 2"].write(tmp_path)
    path = weights_file(place)
    rewrite(path, {**read_tensors(path), "affine_skip_connection": torch.eye(D)})
    with pytest.raises(InputError, match="affine skip connection"):
        Sae.load(place)


def test_a_qwen_scope_file_without_its_repository_does_not_name_its_k_unless_the_card_does(tmp_path: Path) -> None:
    place = BY_NAME["Qwen-Scope"].write(tmp_path)
    alone = tmp_path / "elsewhere" / place.name
    alone.parent.mkdir()
    shutil.copy(place, alone)
    with pytest.raises(InputError, match="does not name its k"):
        Sae.load(alone)
    (alone.parent / "README.md").write_text("| SAE width | 65536 |\n| Top-K | 6 |\n")
    assert Sae.load(alone).identity() == Sae.load(place).identity()


def test_a_threshold_that_was_never_set_is_refused(tmp_path: Path) -> None:
    for name in ("dictionary_learning, BatchTopKSAE", "dictionary_learning, MatryoshkaBatchTopKSAE"):
        place = source_place(BY_NAME[name], tmp_path / name)
        path = weights_file(place)
        tensors = read_tensors(path)
        rewrite(path, {**tensors, "threshold": torch.tensor(-1.0)})
        with pytest.raises(InputError, match="never set its threshold"):
            Sae.load(place)
        rewrite(path, {**tensors, "threshold": torch.full((M,), 0.7)})
        with pytest.raises(InputError, match="holds 32 values as threshold"):
            Sae.load(place)


def test_an_encoder_and_a_decoder_alone_are_not_taken_for_a_standard_sae(tmp_path: Path) -> None:
    write_llama_scope(tmp_path)
    for name in ("elsewhere.safetensors", "ae.pt"):
        rewrite(tmp_path / name, read_tensors(tmp_path / "checkpoints" / "final.safetensors"))
        with pytest.raises(InputError, match="what belongs between encoder and decoder"):
            Sae.load(tmp_path / name)


def test_llama_scope_opens_by_each_of_its_files_and_rows_that_are_not_unit_are_refused(tmp_path: Path) -> None:
    write_llama_scope(tmp_path)
    weights = tmp_path / "checkpoints" / "final.safetensors"
    for given in (tmp_path, tmp_path / "hyperparams.json", weights):
        assert Sae.load(given).site == "resid_post.24"
    tensors = read_tensors(weights)
    rewrite(weights, {**tensors, "decoder.weight": 2 * tensors["decoder.weight"]})
    with pytest.raises(InputError, match="counts decoder norms"):
        Sae.load(tmp_path)


def test_a_dead_feature_whose_row_is_zero_never_fires(tmp_path: Path) -> None:
    for name in ("Gemma Scope", "dictionary_learning, GatedAutoEncoder", "SAELens, TopK, norms counted"):
        sae = Sae.load(source_place(BY_NAME[name], tmp_path / name))
        assert sae.W_dec[4].abs().max() == 0
        assert all(torch.isfinite(p).all() for p in sae.parameters())
        assert (sae.encode(10 * X)[:, 4] == 0).all()


def test_a_folder_with_one_file_of_weights_is_that_file(tmp_path: Path) -> None:
    place = BY_NAME["Goodfire"].write(tmp_path)
    assert Sae.load(tmp_path).identity() == Sae.load(place).identity()


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
    with pytest.raises(InputError, match="weird: that is of no known SAE"):
        Sae.load(tmp_path / "weird.safetensors")
    random_sae("topk").save(tmp_path / "sae")
    cfg = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    (tmp_path / "sae" / "cfg.json").write_text(json.dumps({**cfg, "architecture": "transcoder"}))
    with pytest.raises(InputError, match="is a transcoder"):
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

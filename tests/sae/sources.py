"""SAEs as other tools publish them: a small random one in the layout of each, and its own equations, written plainly.

The equations are those of each tool's source, on float64 arrays and without a shared helper for any convention.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from rmscope.sae import Sae

Array = NDArray[np.float64]
Forward = Callable[[Array], tuple[Array, Array]]
"""From rows of a stream to (features, reconstructions)."""
D, M, K, ROWS = 10, 32, 6, 100
RNG = np.random.default_rng(7)
X: Array = 1.5 * RNG.standard_normal((ROWS, D)) + 0.3
"""The rows on which every source is compared."""
W_ENC, W_DEC = 0.5 * RNG.standard_normal((D, M)), RNG.standard_normal((M, D))
B_ENC, B_DEC = 0.3 * RNG.standard_normal(M), 0.5 * RNG.standard_normal(D)
THRESHOLD, R_MAG, B_MAG = 0.3 + np.abs(RNG.standard_normal(M)), 0.3 * RNG.standard_normal(M), RNG.standard_normal(M)
W_DEC[4] = 0.0
"""A dead feature's row."""
UNIT_DEC = W_DEC / np.where(np.linalg.norm(W_DEC, axis=1) > 0, np.linalg.norm(W_DEC, axis=1), 1.0)[:, None]
NORMS = np.linalg.norm(W_DEC, axis=1)
ONE = 0.7
"""A threshold that all features share."""


@dataclass(frozen=True)
class SaeSource:
    """A source of SAEs."""

    name: str
    files: str
    write: Callable[[Path], Path]
    """Writes a small SAE into a folder and gives what a user would name."""
    forward: Forward
    family: str
    site: str = ""
    """The site that its files name."""
    hub: str = ""

    def compare(self, folder: Path) -> int:
        """On how many of the rows our features and reconstruction are those of its own equations.

        Features are compared as the moves of the stream that they stand for, f_j d_j.
        """
        sae = Sae.load(self.write(folder))
        f, x_hat = self.forward(X)
        ours, rows = sae.encode(torch.from_numpy(X).float()), sae.decode(sae.encode(torch.from_numpy(X).float()))
        moves = ours.double().numpy()[:, :, None] * sae.W_dec.double().numpy()
        theirs = f[:, :, None] * self.directions()
        same = np.isclose(moves, theirs, rtol=1e-3, atol=1e-4).all(axis=(1, 2))
        return int((same & np.isclose(rows.double().numpy(), x_hat, rtol=1e-3, atol=1e-4).all(axis=1)).sum())

    def directions(self) -> Array:
        """What a feature of 1 adds to its reconstruction [m, d], from its equations alone: x^ is linear in f."""
        f, x_hat = self.forward(X)
        centred = np.linalg.lstsq(np.column_stack([f, np.ones(len(f))]), x_hat, rcond=None)[0]
        return np.asarray(centred[:-1])


def relu(h: Array) -> Array:
    return np.maximum(h, 0.0)


def top(h: Array, k: int) -> Array:
    """The k largest of each row, others 0."""
    kept = np.zeros_like(h)
    for row, values in enumerate(h):
        for j in np.argsort(-values)[:k]:
            kept[row, j] = max(values[j], 0.0)
    return kept


def save(path: Path, **tensors: Array | float | int) -> None:
    """Writes safetensors or a state dict, in float32."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = {key.replace("__", "."): torch.tensor(np.asarray(t)) for key, t in tensors.items()}
    made = {key: (t.float() if t.is_floating_point() else t).contiguous() for key, t in made.items()}
    save_file(made, path) if path.suffix == ".safetensors" else torch.save(made, path)


def settings(path: Path, values: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


# SAELens


def saelens(
    family: str, cfg: dict[str, object], hook: str = "blocks.4.hook_resid_post", **tensors: Array
) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        save(folder / "sae_weights.safetensors", **tensors)
        base: dict[str, object] = {
            "architecture": family, "d_in": D, "d_sae": M, "dtype": "float32", "device": "cpu",
            "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
            "metadata": {"hook_name": hook, "model_name": "gpt2", "sae_lens_version": "6.44.2", "prepend_bos": True},
        }  # fmt: skip
        settings(folder / "cfg.json", {**base, **cfg})
        return folder

    return write


PLAIN = {"W_enc": W_ENC, "b_enc": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}
GATED = {"W_enc": W_ENC, "W_dec": W_DEC, "b_dec": B_DEC, "b_gate": B_ENC, "b_mag": B_MAG, "r_mag": R_MAG}
OLD_SAELENS: dict[str, object] = {
    "model_name": "gpt2-small", "hook_point": "blocks.5.hook_resid_pre", "hook_point_layer": 5,
    "hook_point_head_index": None,
    "dataset_path": "openwebtext", "is_dataset_tokenized": False, "context_size": 128, "use_cached_activations": False,
    "cached_activations_path": "activations", "n_batches_in_buffer": 128, "total_training_tokens": 300000000,
    "store_batch_size": 32, "device": "mps", "seed": 42, "b_dec_init_method": "geometric_median", "expansion_factor": 3,
    "from_pretrained_path": None, "l1_coefficient": 8e-05, "lr": 4e-4, "lr_scheduler_name": None, "lr_warm_up_steps": 5000,
    "train_batch_size": 4096, "use_ghost_grads": False, "feature_sampling_window": 1000, "feature_sampling_method": None,
    "resample_batches": 1028, "feature_reinit_scale": 0.2, "dead_feature_window": 5000, "dead_feature_threshold": 1e-08,
    "log_to_wandb": True, "wandb_project": "x", "wandb_entity": None, "wandb_log_frequency": 100, "n_checkpoints": 10,
    "checkpoint_path": "checkpoints", "metadata": None, "activation_fn_str": "relu", "finetuning_scaling_factor": True,
    "noise_scale": 0.0, "normalize_sae_decoder": False, "mse_loss_normalization": None, "model_from_pretrained_kwargs": {},
}  # fmt: skip
FACTOR = 0.5 + RNG.random(M)


def forward_standard(x: Array) -> tuple[Array, Array]:
    f = relu((x - B_DEC) @ W_ENC + B_ENC)
    return f, f @ W_DEC + B_DEC


def forward_scaled(x: Array) -> tuple[Array, Array]:
    f = relu((x - B_DEC) @ W_ENC + B_ENC) * FACTOR
    return f, f @ W_DEC + B_DEC


def forward_topk_by_norm(x: Array) -> tuple[Array, Array]:
    f = top((x @ W_ENC + B_ENC) * NORMS, K)
    return f, f @ UNIT_DEC + B_DEC


def forward_jumprelu(x: Array) -> tuple[Array, Array]:
    h = (x - B_DEC) @ W_ENC + B_ENC
    f = relu(h) * (h > THRESHOLD)
    return f, f @ W_DEC + B_DEC


def forward_gated(x: Array) -> tuple[Array, Array]:
    u = (x - B_DEC) @ W_ENC
    f = (u + B_ENC > 0) * relu(np.exp(R_MAG) * u + B_MAG)
    return f, f @ W_DEC + B_DEC


def forward_batchtopk_by_norm(x: Array) -> tuple[Array, Array]:
    h = ((x - B_DEC) @ W_ENC + B_ENC) * NORMS
    f = relu(h) * (h > ONE)
    return f, f @ UNIT_DEC + B_DEC


def forward_pursuit(x: Array) -> tuple[Array, Array]:
    f = np.zeros((len(x), M))
    for row, stream in enumerate(x):
        rest, before = stream - B_DEC, -1
        while np.linalg.norm(rest) >= 0.5 and np.count_nonzero(f[row]) > before:
            before = np.count_nonzero(f[row])
            j = int(np.argmax(UNIT_DEC @ rest))
            step = max(float(UNIT_DEC[j] @ rest), 0.0)
            f[row, j] += step
            rest = rest - step * UNIT_DEC[j]
    return f, f @ UNIT_DEC + B_DEC


# dictionary_learning


def dictionary(kind: str, trainer: dict[str, object], **tensors: Array | float | int) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        save(folder / "ae.pt", **tensors)
        known: dict[str, object] = {
            "trainer_class": "Trainer", "dict_class": kind, "lr": 1e-4, "steps": 10, "seed": 0, "activation_dim": D,
            "dict_size": M, "device": "cuda:0", "layer": 3, "lm_name": "EleutherAI/pythia-70m", "wandb_name": "x",
            "submodule_name": "resid_post_layer_3", "warmup_steps": 5, "decay_start": None, "auxk_alpha": 0.03,
        }  # fmt: skip
        settings(folder / "config.json", {"trainer": {**known, **trainer}, "buffer": {"io": "out", "ctx_len": 128}})
        return folder

    return write


LINEAR = {"encoder__weight": W_ENC.T, "decoder__weight": UNIT_DEC.T}
THRESHOLDED: dict[str, object] = {"k": K, "threshold_beta": 0.999, "threshold_start_step": 1000, "top_k_aux": 5}


def forward_auto_encoder(x: Array) -> tuple[Array, Array]:
    f = relu((x - B_DEC) @ W_ENC + B_ENC)
    return f, f @ UNIT_DEC + B_DEC


def forward_auto_encoder_new(x: Array) -> tuple[Array, Array]:
    f = relu(x @ W_ENC + B_ENC)
    return f, f @ UNIT_DEC + B_DEC


def forward_topk(x: Array) -> tuple[Array, Array]:
    f = top(relu((x - B_DEC) @ W_ENC + B_ENC), K)
    return f, f @ UNIT_DEC + B_DEC


def forward_one_threshold(x: Array) -> tuple[Array, Array]:
    h = relu((x - B_DEC) @ W_ENC + B_ENC)
    f = h * (h > ONE)
    return f, f @ UNIT_DEC + B_DEC


def forward_gated_by_norm(x: Array) -> tuple[Array, Array]:
    u = (x - B_DEC) @ W_ENC
    f = (u + B_ENC > 0) * relu(np.exp(R_MAG) * u + B_MAG) * NORMS
    return f, f @ UNIT_DEC + B_DEC


def forward_jumprelu_on_x(x: Array) -> tuple[Array, Array]:
    h = x @ W_ENC + B_ENC
    f = relu(h * (h > THRESHOLD))
    return f, f @ W_DEC + B_DEC


# Others


def write_sparsify(folder: Path) -> Path:
    at = folder / "layers.4"
    save(at / "sae.safetensors", encoder__weight=W_ENC.T, encoder__bias=B_ENC, W_dec=UNIT_DEC, b_dec=B_DEC)
    cfg = {
        "activation": "topk",
        "expansion_factor": 32,
        "normalize_decoder": True,
        "num_latents": M,
        "k": K,
        "signed": False,
    }
    settings(at / "cfg.json", {**cfg, "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": D})
    return at


def write_gemma_scope(folder: Path) -> Path:
    at = folder / "gemma-scope-2b-pt-res" / "layer_20" / "width_16k" / "average_l0_71"
    at.mkdir(parents=True)
    tensors = {"W_enc": W_ENC, "W_dec": W_DEC, "b_enc": B_ENC, "b_dec": B_DEC, "threshold": THRESHOLD}
    np.savez(at / "params.npz", **{key: w.astype(np.float32) for key, w in tensors.items()})  # type: ignore[arg-type]
    return at / "params.npz"


def write_gemma_scope_2(folder: Path) -> Path:
    save(folder / "params.safetensors", w_enc=W_ENC, w_dec=W_DEC, b_enc=B_ENC, b_dec=B_DEC, threshold=THRESHOLD)
    hook = "model.layers.17.output"
    stated = {"hf_hook_point_in": hook, "hf_hook_point_out": hook, "width": M, "model_name": "google/gemma-3-4b-pt"}
    settings(
        folder / "config.json", {**stated, "architecture": "jump_relu", "l0": 60, "affine_connection": False, "type": "sae"}
    )
    return folder


def write_qwen_scope(folder: Path) -> Path:
    at = folder / f"SAE-Res-Qwen3-8B-Base-W64K-L0_{K}"
    save(at / "layer30.sae.pt", W_enc=W_ENC.T, b_enc=B_ENC, W_dec=W_DEC.T, b_dec=B_DEC)
    return at / "layer30.sae.pt"


def forward_qwen_scope(x: Array) -> tuple[Array, Array]:
    f = top(x @ W_ENC + B_ENC, K)
    return f, f @ W_DEC + B_DEC


LLAMA_SCOPE: dict[str, object] = {
    "device": "cuda:0", "seed": 42, "dtype": "torch.bfloat16", "hook_point_in": "blocks.24.hook_resid_post",
    "hook_point_out": "blocks.24.hook_resid_post", "use_decoder_bias": True, "apply_decoder_bias_to_pre_encoder": False,
    "expansion_factor": 32, "d_model": D, "d_sae": M, "bias_init_method": "all_zero", "act_fn": "jumprelu",
    "jump_relu_threshold": ONE, "norm_activation": "dataset-wise",
    "dataset_average_activation_norm": {"in": 2.5, "out": 2.5},
    "decoder_exactly_fixed_norm": False, "sparsity_include_decoder_norm": True, "use_glu_encoder": False,
    "init_decoder_norm": 0.5, "init_encoder_norm": None, "init_encoder_with_decoder_transpose": True, "lp": 1,
    "l1_coefficient": 8e-05, "l1_coefficient_warmup_steps": 78125, "top_k": 50, "k_warmup_steps": 78125,
    "use_batch_norm_mse": True, "use_ghost_grads": False, "tp_size": 1, "ddp_size": 1,
}  # fmt: skip
"""The settings of a published one (fnlp/Llama3_1-8B-Base-LXR-32x), but for its sizes."""


def write_llama_scope(folder: Path, **changes: object) -> Path:
    at = folder / "checkpoints" / "final.safetensors"
    save(at, encoder__weight=W_ENC.T, encoder__bias=B_ENC, decoder__weight=UNIT_DEC.T, decoder__bias=B_DEC)
    settings(folder / "hyperparams.json", {**LLAMA_SCOPE, **changes})
    return folder


def forward_llama_scope(x: Array) -> tuple[Array, Array]:
    scale = D**0.5 / 2.5
    h = (scale * x) @ W_ENC + B_ENC
    f = relu(h) * (h > ONE)
    return f, (f @ UNIT_DEC + B_DEC) / scale


def llamascopium(function: str, **more: Array | float) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        hook = "blocks.6.hook_resid_post"
        norm = {"dataset_average_activation_norm__blocks__6__hook_resid_post": 2.5}
        save(folder / "sae_weights.safetensors", W_E=W_ENC, b_E=B_ENC, W_D=W_DEC, b_D=B_DEC, **norm, **more)
        cfg = {
            "sae_type": "sae", "d_model": D, "expansion_factor": 3.2, "use_decoder_bias": True, "act_fn": function,
            "norm_activation": "dataset-wise", "sparsity_include_decoder_norm": True, "top_k": K, "use_triton_kernel": False,
            "sparsity_threshold_for_triton_spmm_kernel": 0.996, "jumprelu_threshold_window": 2.0, "use_glu_encoder": False,
            "hook_point_in": hook, "hook_point_out": hook, "device": "cpu", "dtype": "torch.float32",
        }  # fmt: skip
        settings(folder / "config.json", cfg)
        return folder

    return write


def forward_llamascopium_jumprelu(x: Array) -> tuple[Array, Array]:
    scale = D**0.5 / 2.5
    h = (scale * x) @ W_ENC + B_ENC
    f = relu(h) * (h * NORMS > THRESHOLD)
    return f, (f @ W_DEC + B_DEC) / scale


def forward_llamascopium_topk(x: Array) -> tuple[Array, Array]:
    scale = D**0.5 / 2.5
    h = (scale * x) @ W_ENC + B_ENC
    f = h * (top(h * NORMS, K) > 0)
    return f, (f @ W_DEC + B_DEC) / scale


def write_goodfire(folder: Path) -> Path:
    at = folder / "Llama-3.1-8B-Instruct-SAE-l19.pth"
    save(
        at, encoder_linear__weight=W_ENC.T, encoder_linear__bias=B_ENC, decoder_linear__weight=W_DEC.T,
        decoder_linear__bias=B_DEC,
    )  # fmt: skip
    return at


def forward_on_x(x: Array) -> tuple[Array, Array]:
    f = relu(x @ W_ENC + B_ENC)
    return f, f @ W_DEC + B_DEC


def write_study(folder: Path) -> Path:
    at = folder / "ae_layer12.pt"
    save(
        at, encoder__weight=W_ENC.T, decoder__weight=W_DEC.T, decoder_bias=B_DEC, r_mag=R_MAG, gate_bias=B_ENC,
        mag_bias=B_MAG,
    )  # fmt: skip
    return at


LENS = "`cfg.json`, `sae_weights.safetensors`"
AE = "`ae.pt`, `config.json`"
SCOPIUM = "`config.json`, `sae_weights.safetensors`"
BY_NORM: dict[str, object] = {"apply_b_dec_to_input": False, "rescale_acts_by_decoder_norm": True, "k": K}
PURSUIT: dict[str, object] = {"residual_threshold": 0.5}
POST = "resid_post.4"
SOURCES = (
    SaeSource("SAELens, standard", LENS, saelens("standard", {}, **PLAIN), forward_standard, "standard", POST),
    SaeSource(
        "SAELens before 6, scaling factor", LENS, saelens("standard", OLD_SAELENS, **PLAIN, scaling_factor=FACTOR),
        forward_scaled, "standard", POST,
    ),
    SaeSource("SAELens, TopK, norms counted", LENS, saelens("topk", BY_NORM, **PLAIN), forward_topk_by_norm, "topk", POST),
    SaeSource(
        "SAELens, JumpReLU", LENS, saelens("jumprelu", {}, **PLAIN, threshold=THRESHOLD), forward_jumprelu, "jumprelu", POST
    ),
    SaeSource(
        "SAELens, gated, hook of transformers", LENS, saelens("gated", {}, "model.layers.4", **GATED), forward_gated,
        "gated", POST,
    ),
    SaeSource(
        "SAELens, BatchTopK checkpoint", LENS,
        saelens(
            "batchtopk", {"k": 6.5, "rescale_acts_by_decoder_norm": True, "topk_threshold_lr": 0.01}, **PLAIN,
            topk_threshold=np.asarray(ONE),
        ),
        forward_batchtopk_by_norm, "jumprelu", POST,
    ),
    SaeSource(
        "SAELens, matching pursuit", LENS, saelens("matching_pursuit", PURSUIT, W_dec=UNIT_DEC, b_dec=B_DEC),
        forward_pursuit, "matching_pursuit", POST,
    ),
    SaeSource(
        "dictionary_learning, AutoEncoder", AE, dictionary("AutoEncoder", {}, **LINEAR, encoder__bias=B_ENC, bias=B_DEC),
        forward_auto_encoder, "standard", "resid_post.3",
    ),
    SaeSource(
        "dictionary_learning, AutoEncoderNew", AE,
        dictionary("AutoEncoderNew", {}, **LINEAR, encoder__bias=B_ENC, decoder__bias=B_DEC), forward_auto_encoder_new,
        "standard", "resid_post.3",
    ),
    SaeSource(
        "dictionary_learning, AutoEncoderTopK", AE,
        dictionary("AutoEncoderTopK", THRESHOLDED, **LINEAR, encoder__bias=B_ENC, b_dec=B_DEC, k=K, threshold=ONE),
        forward_topk, "topk", "resid_post.3",
    ),
    SaeSource(
        "dictionary_learning, BatchTopKSAE", AE,
        dictionary("BatchTopKSAE", THRESHOLDED, **LINEAR, encoder__bias=B_ENC, b_dec=B_DEC, k=K, threshold=ONE),
        forward_one_threshold, "jumprelu", "resid_post.3",
    ),
    SaeSource(
        "dictionary_learning, MatryoshkaBatchTopKSAE", AE,
        dictionary(
            "MatryoshkaBatchTopKSAE", {**THRESHOLDED, "group_sizes": [8, M - 8], "group_weights": [0.5, 0.5]}, W_enc=W_ENC,
            b_enc=B_ENC, W_dec=UNIT_DEC, b_dec=B_DEC, k=K, threshold=ONE, group_sizes=np.array([8, M - 8]),
        ),
        forward_one_threshold, "jumprelu", "resid_post.3",
    ),
    SaeSource(
        "dictionary_learning, GatedAutoEncoder", AE,
        dictionary(
            "GatedAutoEncoder", {}, encoder__weight=W_ENC.T, decoder__weight=W_DEC.T, decoder_bias=B_DEC, r_mag=R_MAG,
            gate_bias=B_ENC, mag_bias=B_MAG,
        ),
        forward_gated_by_norm, "gated", "resid_post.3",
    ),
    SaeSource(
        "dictionary_learning, JumpReluAutoEncoder", AE,
        dictionary("JumpReluAutoEncoder", {"bandwidth": 0.001, "target_l0": 20}, **PLAIN, threshold=THRESHOLD),
        forward_jumprelu_on_x, "jumprelu", "resid_post.3",
    ),
    SaeSource(
        "the reference study", "`ae_layer12.pt`", write_study, forward_gated, "gated", "resid_post.12", "Elriggs/rm"
    ),
    SaeSource(
        "sparsify, TopK", "`layers.4/cfg.json`, `layers.4/sae.safetensors`", write_sparsify, forward_topk, "topk", POST,
        "EleutherAI/sae-llama-3-8b-32x",
    ),
    SaeSource(
        "Gemma Scope", "`params.npz`", write_gemma_scope, forward_jumprelu_on_x, "jumprelu", "",
        "google/gemma-scope-2b-pt-res",
    ),
    SaeSource(
        "Gemma Scope 2", "`config.json`, `params.safetensors`", write_gemma_scope_2, forward_jumprelu_on_x, "jumprelu",
        "resid_post.17", "google/gemma-scope-2-4b-pt",
    ),
    SaeSource(
        "Llama Scope", "`hyperparams.json`, `checkpoints/final.safetensors`", write_llama_scope, forward_llama_scope,
        "jumprelu", "resid_post.24", "fnlp/Llama3_1-8B-Base-LXR-32x",
    ),
    SaeSource(
        "Llamascopium, JumpReLU", SCOPIUM,
        llamascopium("jumprelu", activation_function__log_jumprelu_threshold=np.log(THRESHOLD)),
        forward_llamascopium_jumprelu, "jumprelu", "resid_post.6",
    ),
    SaeSource("Llamascopium, TopK", SCOPIUM, llamascopium("topk"), forward_llamascopium_topk, "topk", "resid_post.6"),
    SaeSource(
        "Qwen-Scope", "`layer30.sae.pt`", write_qwen_scope, forward_qwen_scope, "topk", "resid_post.30",
        "Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_50",
    ),
    SaeSource(
        "Goodfire", "`Llama-3.1-8B-Instruct-SAE-l19.pth`", write_goodfire, forward_on_x, "standard", "resid_post.19",
        "Goodfire/Llama-3.1-8B-Instruct-SAE-l19",
    ),
)  # fmt: skip

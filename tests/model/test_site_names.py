"""Hooks of other tools and the sites that they are."""

from __future__ import annotations

import pytest

from rmscope.model.site_names import hook_name, same_stream, site_of_hook

TABLE = {
    # TransformerLens, and its bridges
    "blocks.4.hook_resid_post": "resid_post.4",
    "blocks.5.hook_resid_pre": "resid_post.4",
    "blocks.0.hook_resid_pre": "embed",
    "hook_embed": "embed",
    "blocks.4.hook_out": "resid_post.4",
    "blocks.5.hook_in": "resid_post.4",
    "blocks.4.hook_resid_mid": None,
    "blocks.4.hook_mlp_out": None,
    "blocks.4.hook_attn_out": None,
    "blocks.4.attn.hook_z": None,
    "blocks.4.ln2.hook_normalized": None,
    # transformers
    "model.layers.4": "resid_post.4",
    "model.language_model.layers.4": "resid_post.4",
    "transformer.h.4": "resid_post.4",
    "gpt_neox.layers.4": "resid_post.4",
    "bert.encoder.layer.4": "resid_post.4",
    "layers.4": "resid_post.4",
    "h.4": "resid_post.4",
    "model.layers.17.output": "resid_post.17",
    "model.layers.4.mlp": None,
    "model.layers.4.self_attn.o_proj.input": None,
    "model.layers.4.post_feedforward_layernorm.output": None,
    "model.vision_tower.encoder.layers.4": None,
    "model.embed_tokens": None,
    "model.norm": None,
    "lm_head": None,
    # nnsight
    "model.layers.4.output.0": "resid_post.4",
    "model.model.layers[4].output[0]": "resid_post.4",
    "gpt_neox.layers[4].output": "resid_post.4",
    "transformer.h[5].input": "resid_post.4",
    "model.layers.0.input[0]": "embed",
    "model.layers[4].mlp.output": None,
}


@pytest.mark.parametrize("hook", TABLE)
def test_a_hook_is_the_site_whose_stream_it_names(hook: str) -> None:
    assert site_of_hook(hook) == TABLE[hook]


def test_sites_and_our_own_hooks_name_each_other() -> None:
    for site in ("embed", "resid_post.0", "resid_post.17", "diff.3", "base.3"):
        assert site_of_hook(hook_name(site)) == site


def test_the_bases_own_stream_is_the_whole_one_of_its_model() -> None:
    assert same_stream("resid_post.3", "base.3")
    assert same_stream("diff.3", "diff.3")
    for site, other in (("resid_post.3", "resid_post.4"), ("diff.3", "resid_post.3"), ("diff.3", "base.3")):
        assert not same_stream(site, other)

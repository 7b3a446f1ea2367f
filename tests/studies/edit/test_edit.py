"""An edited PM: what it gives is exact ablation's answer, whichever way it is called, and so is what an export gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rmscope.effects.ablation import ablate_groups, at_site
from rmscope.errors import InputError
from rmscope.evaluation.selection import signed_basis
from rmscope.model.reward_model import RewardModel
from rmscope.model.site_names import parts_of
from rmscope.pairs.pair import SIDES
from rmscope.sae.base import Sae
from rmscope.sae.joint import join_parts
from rmscope.sae.jumprelu import JumpReluSae
from rmscope.studies.edit.check import deltas, rewards_under
from rmscope.studies.edit.patch import EditPatch, FeatureEdit, edit_at, edits_by_site, export_patch, load_edited
from tests.effects.naive import ablate_naively
from tests.model.based import pm_with_base
from tests.model.small import PAIRS, D, shared_pm, small_pm, small_sae

SITE = "resid_post.1"
FEATURES = (3, 17, 40, 41, 70)


def patch_of(rm: RewardModel, sae: Sae | None = None, *edits: FeatureEdit) -> EditPatch:
    sites = list(dict.fromkeys(e.site for e in edits)) or [SITE]
    saes = {site: sae or small_sae(seed=i) for i, site in enumerate(sites)}
    return EditPatch(edits or (FeatureEdit(SITE, FEATURES),), saes, rm.identity, rm.name)


def edited_pm(architecture: str, *edits: FeatureEdit) -> RewardModel:
    rm = small_pm(architecture)
    return load_edited(rm, patch_of(rm, None, *edits))


def alone(rm: RewardModel) -> torch.Tensor:
    """The model's own forward on each text of PAIRS alone [chosen and rejected of each]."""
    return torch.stack([rm.reward_alone(t.side(s)) for t in rm.tokenize_all(PAIRS) for s in SIDES])


@pytest.mark.parametrize("kind", ["topk", "gated"])
def test_suppressing_is_exact_ablation_over_the_same_tokens(kind: str) -> None:
    rm, sae = shared_pm("llama"), small_sae(kind=kind)
    tokens = rm.tokenize_all(PAIRS)
    responses = [at_site(sae, rm.prefill(t.side(s), [SITE]), SITE, 1) for t in tokens for s in SIDES]
    ablated = torch.stack([ablate_groups(rm, sae, r, SITE, [FEATURES])[0] for r in responses])
    before = torch.tensor([r.text.reward for r in responses])
    fresh = small_pm("llama")
    after = alone(load_edited(fresh, patch_of(fresh, sae)))
    assert (ablated.abs() > 1e-3).all()
    assert torch.allclose(before - after, ablated, rtol=1e-4, atol=1e-5)


def test_where_features_fire_in_the_response_alone_it_is_ablation_over_the_pairs_span() -> None:
    rm, sae, t = shared_pm("llama"), small_sae(), shared_pm("llama").tokenize(PAIRS[0])
    clean = rm.prefill(t.chosen, [SITE])
    early = set(sae.active(clean.streams[SITE][1 : t.divergence]).feature.tolist())
    response = at_site(sae, clean, SITE, t.divergence)
    late = tuple(int(j) for j in response.features() if int(j) not in early)
    fresh = small_pm("llama")
    after = load_edited(fresh, patch_of(fresh, sae, FeatureEdit(SITE, late))).reward_alone(t.chosen)
    ablated = ablate_groups(rm, sae, response, SITE, [late])
    assert float(ablated) != 0.0
    assert clean.reward - float(after) == pytest.approx(float(ablated), rel=1e-4)


def test_damping_by_one_and_clamping_to_what_a_feature_is_change_nothing_and_halves_lie_between() -> None:
    before = alone(shared_pm("llama"))
    assert torch.allclose(alone(edited_pm("llama", FeatureEdit(SITE, FEATURES, "damp", 1.0))), before, atol=1e-6)
    constant = JumpReluSae(D, 8, SITE)
    constant.b_enc.data.fill_(2.5)
    constant.W_dec.data.copy_(small_sae(m=8).W_dec)
    rm = small_pm("llama")
    clamped = load_edited(rm, patch_of(rm, constant, FeatureEdit(SITE, (0, 5), "clamp", 2.5)))
    assert torch.allclose(alone(clamped), before, atol=1e-5)
    rm = small_pm("llama")
    other = load_edited(rm, patch_of(rm, constant, FeatureEdit(SITE, (0, 5), "clamp", 1.5)))
    assert ((alone(other) - before).abs() > 1e-3).all()
    x = torch.randn(7, D)
    changes = [edit_at(small_sae(), [FeatureEdit(SITE, FEATURES, "damp", a)])(x) - x for a in (0.0, 0.5, -1.0)]
    assert torch.allclose(changes[1], changes[0] / 2, atol=1e-6)
    assert torch.allclose(changes[2], changes[0] * 2, atol=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "bert"])
def test_every_way_of_running_an_edited_pm_gives_what_its_own_forward_gives_alone(architecture: str) -> None:
    edits = (FeatureEdit(SITE, FEATURES), FeatureEdit("resid_post.3", (1, 2, 30), "damp", -0.5))
    rm = edited_pm(architecture, *edits)
    truth = alone(rm)
    assert ((truth - alone(shared_pm(architecture))).abs() > 1e-4).any()
    scores = rm.score(PAIRS)
    assert rm.capabilities.packing == (architecture != "bert")
    assert torch.allclose(torch.stack([scores.chosen, scores.rejected], 1).flatten(), truth, atol=1e-5)
    padded = torch.cat([rm.score_texts(p.prompt, [p.chosen, p.rejected]) for p in PAIRS])
    assert torch.allclose(padded, truth, atol=1e-5)
    if not rm.causal:
        return
    t = rm.tokenize(PAIRS[0])
    for site in ("resid_post.0", SITE, "resid_post.2"):
        clean = rm.prefill(t.chosen, [site])
        assert clean.reward == pytest.approx(float(truth[0]), abs=1e-5)
        resumed = rm.resume(clean, site, t.divergence, clean.streams[site][None, t.divergence :])
        assert float(resumed) == pytest.approx(float(truth[0]), abs=1e-5)


def test_the_edited_pm_can_be_studied_like_any_other() -> None:
    rm, sae = edited_pm("llama"), small_sae(seed=3)
    t = rm.tokenize(PAIRS[1])
    assert rm.capabilities.resume
    assert rm.capabilities.ragged
    response = at_site(sae, rm.prefill(t.chosen, [SITE]), SITE, t.divergence)
    groups = [[int(j)] for j in response.features()[:6]]
    fast = ablate_groups(rm, sae, response, SITE, groups)
    assert torch.allclose(fast, ablate_naively(rm, sae, t.chosen, SITE, t.divergence, groups), atol=1e-5)


def test_the_first_token_is_never_edited_wherever_padding_stands() -> None:
    rm = edited_pm("llama", FeatureEdit(SITE, (0, 1), "clamp", 3.0))
    ids = rm.tokenize(PAIRS[0]).chosen
    stream = {name: m.prefill(ids, [SITE]).streams[SITE] for name, m in (("clean", shared_pm("llama")), ("edited", rm))}
    assert torch.equal(stream["clean"][0], stream["edited"][0])
    assert ((stream["clean"][1:] - stream["edited"][1:]).abs().sum(1) > 0).all()
    left = torch.cat([torch.zeros(5, dtype=torch.long), ids])[None]
    mask = (torch.arange(left.shape[1]) >= 5).long()[None]
    with torch.no_grad():
        padded = rm.model(left, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits
        without = rm.model(left, attention_mask=mask).logits  # rotary positions: only their differences count
    assert float(padded) == pytest.approx(float(rm.reward_alone(ids)), abs=1e-5)
    assert float(without) == pytest.approx(float(rm.reward_alone(ids)), abs=1e-4)


def test_a_gradient_goes_through_the_features_too() -> None:
    sae = small_sae(kind="gated").double()
    edit = edit_at(sae, [FeatureEdit(SITE, FEATURES, "damp", -0.5)])
    assert torch.autograd.gradcheck(edit, torch.randn(3, D, dtype=torch.float64, requires_grad=True))


def test_a_patch_opens_as_it_was_saved_and_says_what_is_wrong_with_it(tmp_path: Path) -> None:
    rm = small_pm("llama")
    made = patch_of(rm, None, FeatureEdit(SITE, FEATURES, "damp", -0.5), FeatureEdit("resid_post.2", (4,), "clamp", 1.25))
    made.save(tmp_path / "patch")
    opened = EditPatch.load(tmp_path / "patch")
    assert (opened.edits, opened.model, opened.identity) == (made.edits, made.model, made.identity)
    with pytest.raises(InputError, match="made for another PM"):
        load_edited(small_pm("qwen2"), opened)
    plain = rm.identity
    assert load_edited(rm, tmp_path / "patch").identity != plain
    with pytest.raises(InputError, match="made for another PM"):
        load_edited(rm, opened)  # a second time: it would edit the edited stream
    with pytest.raises(InputError, match="is no patch"):
        EditPatch.load(tmp_path)
    record = json.loads((tmp_path / "patch" / "edit.json").read_text())
    (tmp_path / "patch" / "edit.json").write_text(json.dumps(record | {"edits": [{"site": SITE, "feature": [1]}]}))
    with pytest.raises(InputError, match="cannot be read as a patch"):
        EditPatch.load(tmp_path / "patch")
    small_sae(seed=9).save(tmp_path / "patch" / "saes" / SITE)
    (tmp_path / "patch" / "edit.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="was changed after"):
        EditPatch.load(tmp_path / "patch")


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (FeatureEdit(SITE, (96,)), "names the feature 96"),
        (FeatureEdit(SITE, ()), "names no feature"),
        (FeatureEdit(SITE, (1, 1)), "named twice"),
        (FeatureEdit(SITE, (1,), "damp", float("nan")), "no number"),
        (FeatureEdit(SITE, (1,), "raise"), "no operation"),  # type: ignore[arg-type]
    ],
)
def test_a_patch_that_means_nothing_is_refused(edit: FeatureEdit, said: str) -> None:
    with pytest.raises(InputError, match=said):
        patch_of(shared_pm("llama"), None, edit)


def test_variants_beside_each_other_give_what_each_edited_pm_gives() -> None:
    rm = shared_pm("llama")
    two = patch_of(rm, None, FeatureEdit(SITE, FEATURES), FeatureEdit("resid_post.2", (4, 9), "clamp", 1.25))
    one = patch_of(rm, None, FeatureEdit("resid_post.2", (4, 9), "damp", -1.0))
    variants = {name: edits_by_site(patch.saes, patch.edits) for name, patch in (("two", two), ("one", one))}
    found = rewards_under(rm, variants, rm.tokenize_all(PAIRS))
    for name, made in (("before", None), ("two", two), ("one", one)):
        fresh = small_pm("llama")
        scores = (fresh if made is None else load_edited(fresh, made)).score(PAIRS)
        for side in SIDES:
            assert found[name][side] == pytest.approx(getattr(scores, side).numpy(), abs=1e-5)
        assert deltas(found)[name] == pytest.approx(scores.delta.numpy(), abs=2e-5)


@pytest.mark.usefixtures("modules_cache")
@pytest.mark.parametrize(("architecture", "kind"), [("llama", "topk"), ("gpt2", "gated")])
def test_an_exported_folder_gives_the_same_rewards_with_plain_transformers(
    architecture: str, kind: str, tmp_path: Path
) -> None:
    import transformers

    edits: list[Any] = [FeatureEdit(SITE, FEATURES, "damp", -0.5), FeatureEdit(SITE, (2, 8), "clamp", 0.75)]
    rm = small_pm(architecture)
    made = patch_of(rm, small_sae(kind=kind), *edits)
    export_patch(rm, made, tmp_path / f"mended_{architecture}")
    folder = str(tmp_path / f"mended_{architecture}")
    with pytest.raises(ValueError, match="trust_remote_code"):
        transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True).eval()
    again = RewardModel.load(folder, trust_remote_code=True)
    truth = load_edited(rm, made)
    assert "rmscope" not in type(theirs).__module__.split(".")[0]
    assert again.rendering == truth.rendering
    for tokens in truth.tokenize_all(PAIRS):
        with torch.no_grad():
            assert float(theirs(tokens.chosen[None]).logits) == pytest.approx(
                float(truth.reward_alone(tokens.chosen)), abs=1e-5
            )
    assert torch.allclose(again.score(PAIRS).delta, truth.score(PAIRS).delta, atol=1e-5)


@pytest.mark.parametrize("sites", [("diff.2", "diff.3"), ("both.2", "both.3"), ("base.2", "diff.3")])
def test_an_edit_of_a_part_gives_what_the_part_edited_by_hand_gives(sites: tuple[str, str], tmp_path: Path) -> None:
    rm, saes = pm_with_base("llama"), dict[str, Sae]()
    for i, site in enumerate(sites):
        parts = [small_sae(seed=2 * i + k) for k in range(len(parts_of(site)))]
        for sae, part in zip(parts, parts_of(site), strict=True):
            sae.site = part
        saes[site] = join_parts(parts, site)
    edits = (FeatureEdit(sites[0], FEATURES), FeatureEdit(sites[1], (5, 9), "damp", -0.5))
    tokens = rm.tokenize_all(PAIRS)
    by_hand = rewards_under(rm, {"edit": edits_by_site(saes, edits)}, tokens)["edit"]
    EditPatch(edits, saes, rm.identity, rm.name).save(tmp_path / "patch")
    edited = load_edited(rm, tmp_path / "patch")
    assert not edited.capabilities.resume  # the base's keys and values are not cached
    for i, pair in enumerate(tokens):
        for side in SIDES:
            assert float(edited.reward_alone(pair.side(side))) == pytest.approx(by_hand[side][i], abs=2e-5)
    assert edited.score(PAIRS).delta.tolist() == pytest.approx((by_hand["chosen"] - by_hand["rejected"]).tolist(), abs=4e-5)


def test_a_suppressed_difference_gives_the_base_back() -> None:
    """With an SAE whose features reconstruct the difference exactly, suppressing all of them leaves the base's stream."""
    rm, site = pm_with_base("llama"), "diff.3"
    exact = signed_basis(torch.eye(D), torch.zeros(D))
    tokens = rm.tokenize_all(PAIRS)
    patch = EditPatch((FeatureEdit(site, tuple(range(2 * D))),), {site: exact}, rm.identity, rm.name)
    batch = next(iter(rm.batches(tokens)))
    parts = rm.streams(batch, [site, "base.3"])
    first = (batch.positions == 0)[..., None]
    base = rm.rewards_from(batch, "resid_post.3", torch.where(first, parts[site] + parts["base.3"], parts["base.3"]))
    edited = load_edited(rm, patch)
    torch.testing.assert_close(edited.rewards(batch), base, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_patched_is_refused(tmp_path: Path) -> None:
    rm = pm_with_base("llama")
    patch = EditPatch((FeatureEdit("diff.2", (1,)),), {"diff.2": small_sae()}, rm.identity, rm.name)
    with pytest.raises(InputError, match="cannot be exported"):
        export_patch(rm, patch, tmp_path / "out")
    full = pm_with_base("llama", "full")
    whole = EditPatch((FeatureEdit("diff.2", (1,)),), {"diff.2": small_sae()}, full.identity, full.name)
    with pytest.raises(InputError, match="its embeddings were trained too"):
        load_edited(full, whole)

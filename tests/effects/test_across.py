"""Joint ablation at several sites is that of a plain forward pass with a hook on each."""

from __future__ import annotations

import pytest
import torch

from rmscope.effects.ablation import ablate_groups, at_site, clean_runs
from rmscope.effects.across import ablate_members
from rmscope.effects.requests import ablations
from rmscope.pairs.pair import SIDES
from rmscope.sae.joint import JointSae
from tests.effects.naive import reward_without
from tests.model.based import pm_with_base
from tests.model.small import DECODERS, ENCODERS, HYBRIDS, OTHERS, PAIRS, small_pm, small_sae

ARCHITECTURES = [*DECODERS, *OTHERS, *HYBRIDS, *ENCODERS]
SITES = ("resid_post.0", "resid_post.2", "resid_post.3")
SETS = (
    {"resid_post.0": range(3, 23), "resid_post.2": range(17, 40), "resid_post.3": range(5, 25)},
    {"resid_post.2": range(12), "resid_post.3": range(41, 70)},
    {"resid_post.0": range(60, 90), "resid_post.2": range(60, 90)},
    {"resid_post.2": [17, 40]},
    {"resid_post.0": [], "resid_post.3": [2]},
)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sets_at_several_sites_are_ablated_as_by_hooks_on_a_plain_forward(architecture: str) -> None:
    rm = small_pm(architecture)
    tokens = rm.tokenize(PAIRS[0])
    saes = {site: small_sae(seed=i) for i, site in enumerate(SITES)}
    runs = clean_runs(rm, tokens, SITES)
    for side in SIDES:
        text, start = runs[side], tokens.divergence
        responses = {s: at_site(saes[s], text, s, start) for s in SITES}
        given = ablate_members(rm, saes, responses, SETS)
        several = 0
        for of, effect in zip(SETS, given.tolist(), strict=True):
            taken, clean = {}, {}
            for site, listed in of.items():
                block, x = int(site[-1]), text.streams[site][start:].float()
                f = saes[site].encode(x)[:, list(listed)]
                if listed and bool((f > 0).any()):
                    taken[block], clean[block] = f @ saes[site].W_dec[list(listed)], x
            several += len(taken) > 1
            expected = text.reward - reward_without(rm, text.ids, start, taken, clean) if taken else 0.0
            assert effect == pytest.approx(expected, abs=3e-5 * max(1.0, abs(text.reward)))
        assert several >= 2


@pytest.mark.parametrize("architecture", ["gpt_neox", "llama", "bert"])
def test_parts_of_the_stream_may_be_at_several_sites_too(architecture: str) -> None:
    rm = pm_with_base(architecture)
    own, other, late = small_sae(), small_sae(m=40, seed=1), small_sae(seed=2)
    saes = {"both.2": JointSae(own, other, "both.2"), "diff.3": late}
    of = {"both.2": [3, 17, 96, 100], "diff.3": [5, 9, 30, 31]}
    tokens = rm.tokenize(PAIRS[1])
    runs = clean_runs(rm, tokens, [*saes, "resid_post.2", "resid_post.3"])
    for side in SIDES:
        text, start = runs[side], tokens.divergence
        delta, b = text.streams["both.2"][start:].tensor_split(2, -1)
        f = torch.cat([own.encode(delta), other.encode(b)], 1)[:, of["both.2"]]
        rows = torch.cat([own.W_dec, other.W_dec])[of["both.2"]]
        last = late.encode(text.streams["diff.3"][start:])[:, of["diff.3"]] @ late.W_dec[of["diff.3"]]
        clean = {block: text.streams[f"resid_post.{block}"][start:] for block in (2, 3)}
        expected = text.reward - reward_without(rm, text.ids, start, {2: f @ rows, 3: last}, clean)
        given = ablate_members(rm, saes, {s: at_site(saes[s], text, s, start) for s in saes}, [of])
        assert float(given) == pytest.approx(expected, abs=5e-5 * max(1.0, abs(text.reward)))


def test_a_concept_that_later_sites_only_carry_on_is_taken_out_once() -> None:
    """Where blocks copy the stream, what the first site takes out is gone at the second: a set at both does the same."""
    rm = small_pm(DECODERS[0])
    for block in rm.blocks[1:]:  # each adds nothing to the stream
        for p in block.parameters():
            p.data.zero_()
    sae, tokens = small_sae(), rm.tokenize(PAIRS[0])
    sites = ("resid_post.0", "resid_post.2")
    text = clean_runs(rm, tokens, sites)["chosen"]
    assert torch.equal(text.streams[sites[0]], text.streams[sites[1]])
    responses = {s: at_site(sae, text, s, tokens.divergence) for s in sites}
    listed = responses[sites[0]].features()[:3].tolist()
    once = ablate_groups(rm, sae, responses[sites[0]], sites[0], [listed])
    both = ablate_members(rm, dict.fromkeys(sites, sae), responses, [dict.fromkeys(sites, listed)])
    assert abs(float(once)) > 1e-3
    torch.testing.assert_close(both, once, atol=1e-5, rtol=1e-5)


def test_wanted_sets_are_ablated_at_all_of_their_sites_and_from_the_ending() -> None:
    rm = small_pm(DECODERS[0])
    saes = {site: small_sae(seed=i) for i, site in enumerate(SITES)}
    tokens = [rm.tokenize(p) for p in PAIRS[:2]]
    groups = {"concepts": dict(enumerate(SETS[:3]))}
    wanted = {p: {s: {"concepts": [0, 2], "resid_post.2": [17, 40]} for s in SIDES} for p in range(2)}
    for name, found in ablations(rm, saes, tokens, wanted, endings=True, groups=groups):
        text = clean_runs(rm, tokens[found.pair], SITES)[found.side]
        responses = {s: at_site(saes[s], text, s, tokens[found.pair].divergence) for s in SITES}
        sets = [SETS[n] if name == "concepts" else {name: [n]} for n in found.feature.tolist()]
        torch.testing.assert_close(found.effect, ablate_members(rm, saes, responses, sets), atol=2e-6, rtol=1e-5)
        late = rm.ending(text.ids) - tokens[found.pair].divergence
        for of, ending in zip(sets, found.ending.tolist(), strict=True):
            taken, clean = {}, {}
            for site, listed in of.items():
                x = text.streams[site][tokens[found.pair].divergence :].float()
                f = saes[site].encode(x)[:, list(listed)]
                f[:late] = 0
                if bool((f > 0).any()):
                    taken[int(site[-1])], clean[int(site[-1])] = f @ saes[site].W_dec[list(listed)], x
            start = tokens[found.pair].divergence
            expected = text.reward - reward_without(rm, text.ids, start, taken, clean) if taken else 0.0
            assert ending == pytest.approx(expected, abs=3e-5)

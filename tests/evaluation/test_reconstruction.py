"""An SAE's figures on pairs: those of the plain metrics on the same tokens, and of the splice on its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rmscope.effects.splice import constant, run_replacements, splice
from rmscope.evaluation.reconstruction import as_table, evaluate
from rmscope.sae.metrics import measure_sae
from tests.effects.test_splice import perfect
from tests.model.small import ENCODER, PAIRS, shared_pm, small_sae

SITE = "resid_post.1"
PROMPTS = [p.prompt_key for p in PAIRS]
FIGURES = ("l0", "fvu", "cosine", "norm_ratio", "reward_recovered", "delta_r2", "delta_r2_scaled", "agreement")


def at(sae, site=SITE):  # type: ignore[no-untyped-def]
    sae.site = site
    return sae


@pytest.mark.parametrize("architecture", ["llama", ENCODER])
def test_the_figures_are_those_of_the_plain_metrics_and_of_the_splice(architecture: str) -> None:
    rm, sae = shared_pm(architecture), at(small_sae())
    tokens = rm.tokenize_all(PAIRS)
    (found,) = evaluate(rm, {"one": sae}, tokens, PROMPTS)
    rows, spans = [], []
    with torch.no_grad():
        for t in tokens:
            for side, first in (("chosen", 1), ("rejected", t.divergence if rm.causal else 1)):
                stream = rm.model(t.side(side)[None], output_hidden_states=True).hidden_states[2][0]
                rows.append(stream[first:])
                spans.append(stream[t.divergence :])
    plain = measure_sae(sae, [torch.cat(rows)])
    assert found.tokens == plain.tokens
    assert found.figures["l0"].value == pytest.approx(plain.l0)
    assert found.figures["fvu"].value == pytest.approx(plain.fvu, rel=1e-4)
    assert found.figures["cosine"].value == pytest.approx(plain.cosine, rel=1e-4)
    assert found.figures["norm_ratio"].value == pytest.approx(plain.norm_ratio, rel=1e-4)
    np.testing.assert_allclose(found.density, plain.density, atol=1e-6)
    assert found.dead == pytest.approx(plain.dead)
    mean = torch.cat(spans).mean(0)
    alone = run_replacements(rm, tokens, range(4), {"s": (SITE, splice(sae)), "m": (SITE, constant(mean))})
    np.testing.assert_allclose(found.delta_hat, alone["s"].delta_hat[:, 0], atol=1e-4)
    damage = [np.abs(alone[k].clean - alone[k].rewards[..., 0]).sum() for k in "sm"]
    assert found.figures["reward_recovered"].value == pytest.approx(1 - damage[0] / damage[1], abs=1e-3)


def test_a_perfect_sae_explains_everything_and_a_poor_one_less() -> None:
    rm = shared_pm("llama")
    saes = {"perfect": at(perfect()), "poor": at(small_sae(k=1), "resid_post.2")}
    best, poor = evaluate(rm, saes, rm.tokenize_all(PAIRS), PROMPTS)
    assert best.figures["fvu"].value == pytest.approx(0, abs=1e-9)
    for name in ("reward_recovered", "delta_r2", "agreement", "cosine", "norm_ratio"):
        assert best.figures[name].value == pytest.approx(1, abs=1e-3)
    assert poor.figures["l0"].value <= 1
    assert poor.figures["delta_r2"].value < best.figures["delta_r2"].value
    assert all(e.figures[n].low <= e.figures[n].value + 1e-9 for e in (best, poor) for n in ("l0", "fvu", "agreement"))
    table = as_table([best, poor])
    assert table["sae"].to_list() == ["perfect", "poor"]
    assert tuple(best.figures) == FIGURES
    assert {f"{n}{end}" for n in FIGURES for end in ("", "_low", "_high")} <= set(table.columns)

"""All figures of a site together: what must hold whatever the model, from complete dictionaries and empty lists."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rmscope.activations.harvest import harvest
from rmscope.effects.splice import delta_r2, replaced, splice
from rmscope.evaluation.explained import COARSE, FrozenSelection, SelectSplit, explain
from rmscope.evaluation.keep import ABLATED
from tests.evaluation.test_keep import OTHERS, SITE
from tests.model.small import PAIRS, shared_pm, small_sae


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    rm, folder = shared_pm("llama"), tmp_path_factory.mktemp("store")
    store: Any = harvest(rm, OTHERS, [SITE], Path(folder))
    stored = [p.first_human_turn() for p in OTHERS]
    select = SelectSplit(store, rm.tokenize_all(OTHERS), stored, range(len(OTHERS)))
    sae = small_sae()
    sae.site = SITE
    prompts = [p.first_human_turn() for p in PAIRS]
    lists = FrozenSelection(rm, SITE, sae, select, prompts)
    return explain(rm, SITE, lists, rm.tokenize_all(PAIRS), prompts)


def test_complete_dictionaries_explain_everything(found: dict[str, Any]) -> None:
    for name in ("keep_pca", "keep_coordinates"):
        last = found["curves"][name][-1]
        assert last["donors"]["value"] == pytest.approx(1.0, abs=1e-4)
        assert last["mean"]["value"] == pytest.approx(1.0, abs=1e-4)


def test_keeping_nothing_is_the_same_whatever_the_list(found: dict[str, Any]) -> None:
    first = [found["curves"][name][0] for name in ("keep", "unflagged", "keep_pca", "keep_coordinates")]
    assert {p["k"] for p in first} == {0}
    np.testing.assert_allclose([p["donors"]["value"] for p in first], first[0]["donors"]["value"], atol=1e-4)


def test_the_splice_stands_beside_the_curves(found: dict[str, Any]) -> None:
    rm, tokens = shared_pm("llama"), shared_pm("llama").tokenize_all(PAIRS)
    plain = replaced(rm, tokens, range(len(tokens)), {"splice": (SITE, splice(small_sae()))})["splice"]
    groups = np.array([p.first_human_turn() for p in PAIRS])
    wanted = delta_r2(plain.delta, plain.delta_hat[:, 0], groups).value
    assert found["evaluation"]["delta_r2"]["value"] == pytest.approx(wanted, abs=1e-5)


def test_every_figure_has_its_control_at_each_k(found: dict[str, Any]) -> None:
    assert [p["k"] for p in found["ablated"]] == [k for k in ABLATED if 2 * k <= small_sae().m]
    assert [p["k"] for p in found["curves"]["unflagged"]] == list(COARSE)
    assert set(found["controls"]) == {"pca", "random", "noise", "length", "error", "error_mean"}

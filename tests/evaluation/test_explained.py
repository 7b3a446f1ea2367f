"""All figures of a site together: what must hold whatever the model, from complete dictionaries and empty lists."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rmscope.activations.harvest import harvest
from rmscope.effects.splice import delta_r2, run_replacements, splice
from rmscope.evaluation.explained import ABLATE_GRID, COARSE_GRID, Explained, FrozenSelection, SelectSplit, explain
from tests.evaluation.test_keep import OTHERS, SITE
from tests.model.small import PAIRS, shared_pm, small_sae


@pytest.fixture(scope="module")
def explained(tmp_path_factory: pytest.TempPathFactory) -> Explained:
    rm, folder = shared_pm("llama"), tmp_path_factory.mktemp("store")
    store: Any = harvest(rm, OTHERS, [SITE], Path(folder))
    stored = [p.prompt_key for p in OTHERS]
    select = SelectSplit(store, rm.tokenize_all(OTHERS), stored, range(len(OTHERS)))
    sae = small_sae()
    sae.site = SITE
    prompts = [p.prompt_key for p in PAIRS]
    selection = FrozenSelection(rm, SITE, sae, select, prompts)
    return explain(selection, rm.tokenize_all(PAIRS), prompts)


def test_complete_dictionaries_explain_everything(explained: Explained) -> None:
    for name in ("keep_pca", "keep_coordinates"):
        last = explained.curves[name][-1]
        assert last.donors.value == pytest.approx(1.0, abs=1e-4)
        assert last.mean.value == pytest.approx(1.0, abs=1e-4)


def test_keeping_nothing_is_the_same_whatever_the_list(explained: Explained) -> None:
    first = [explained.curves[name][0] for name in ("keep", "unflagged", "keep_pca", "keep_coordinates")]
    assert {p.k for p in first} == {0}
    np.testing.assert_allclose([p.donors.value for p in first], first[0].donors.value, atol=1e-4)


def test_the_evaluation_beside_the_curves_is_that_of_the_splice(explained: Explained) -> None:
    rm, tokens = shared_pm("llama"), shared_pm("llama").tokenize_all(PAIRS)
    plain = run_replacements(rm, tokens, range(len(tokens)), {"splice": (SITE, splice(small_sae()))})["splice"]
    groups = np.array([p.prompt_key for p in PAIRS])
    expected = delta_r2(plain.delta, plain.delta_hat[:, 0], groups).value
    assert explained.evaluation.figures["delta_r2"].value == pytest.approx(expected, abs=1e-5)


def test_every_figure_has_its_control_at_each_k(explained: Explained) -> None:
    assert [p.k for p in explained.ablated] == [k for k in ABLATE_GRID if 2 * k <= small_sae().m]
    assert [p.k for p in explained.curves["unflagged"]] == list(COARSE_GRID)
    assert set(explained.controls) == {"pca", "random", "noise", "length", "error", "error_mean"}


def test_the_stored_form_is_json_with_every_figure(explained: Explained) -> None:
    stored = json.loads(json.dumps(explained.as_dict()))
    assert stored["controls"]["pca"]["low"] <= stored["controls"]["pca"]["value"] <= stored["controls"]["pca"]["high"]
    assert stored["evaluation"]["dead"] == explained.evaluation.dead
    assert stored["ablated"][0]["list"]["value"] == explained.ablated[0].list.value
    assert [p["k"] for p in stored["curves"]["keep"]] == [p.k for p in explained.curves["keep"]]
    assert (stored["pairs"], stored["prompts"]) == (len(PAIRS), len({p.prompt_key for p in PAIRS}))

"""SAEs that a run brings, or goes on from: compared with its sites, its model and its stream."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rmscope.errors import InputError
from rmscope.io import NoDisplay
from rmscope.run.brought import FILE
from rmscope.run.run import Run
from rmscope.run.train import train
from rmscope.sae import Sae, measure_sae
from tests.run.small import settings


class Notes(NoDisplay):
    """Keeps what is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def note(self, text: str) -> None:
        self.told.append(text)


def opened(pm: str, done: Path, out: Path, **changes: object) -> tuple[Run, Notes]:
    """A run with the store of the finished one, up to its SAEs."""
    notes = Notes()
    run = Run.create(settings(pm, out, **changes), notes)
    run.__dict__["store"] = Run.open(done).store
    return run, notes


def test_the_runs_own_saes_fit_and_nothing_is_said(pm: str, done: Path, tmp_path: Path) -> None:
    run, notes = opened(pm, done, tmp_path, sae_dir=str(done / "saes"))
    train(run, lambda *_: None, "")
    checks = json.loads((tmp_path / FILE).read_text())
    assert notes.told == []
    assert [(c["check"], c["status"]) for c in checks] == [(f"SAE at {site}", "ok") for site in run.sites]


def test_an_sae_of_another_model_is_told_with_its_figures(pm: str, done: Path, tmp_path: Path) -> None:
    for path in (done / "saes").glob("*/cfg.json"):
        sae = Sae.load(path)
        sae.b_dec.data += 40  # as of a stream that lies elsewhere
        sae.metadata |= {"model_name": "someone/other"}
        sae.save(tmp_path / "saes" / path.parent.name)
    run, notes = opened(pm, done, tmp_path / "run", sae_dir=str(tmp_path / "saes"))
    train(run, lambda *_: None, "")
    assert len(notes.told) == len(run.sites)
    for words in (
        "worse than the mean",
        "trained on someone/other",
        "FVU ",
        "L0 ",
        "silent",
        "another model, layer or scale",
    ):
        assert all(words in told for told in notes.told)
    assert {c["status"] for c in json.loads((tmp_path / "run" / FILE).read_text())} == {"warn"}


def test_an_sae_of_another_site_is_refused_before_any_work(pm: str, done: Path, tmp_path: Path) -> None:
    sites = sorted(p.parent.name for p in (done / "saes").glob("*/cfg.json"))
    Sae.load(done / "saes" / sites[0]).save(tmp_path / "saes" / sites[1])
    for changes in ({"sae_dir": str(tmp_path / "saes")}, {"init": str(tmp_path / "saes")}):
        run, _ = opened(pm, done, tmp_path / "run", sites=[sites[1]], sae_dir=changes.get("sae_dir"))
        run.config.sae = run.config.sae.model_copy(update={"init": changes.get("init")})
        with pytest.raises(InputError, match=f"was trained at {sites[0]}, and is to be used at {sites[1]}"):
            run.go()
        assert not (tmp_path / "run").exists()


def test_a_run_goes_on_from_saes_and_its_other_seeds_start_anew(pm: str, done: Path, tmp_path: Path) -> None:
    run, _ = opened(pm, done, tmp_path)
    run.config.sae = run.config.sae.model_copy(update={"init": str(done / "saes"), "tokens": 512, "d_sae": None, "k": None})
    train(run, lambda *_: None, "")
    for site in run.sites:
        first, on = Sae.load(done / "saes" / site), run.sae(site)
        assert (on.m, on.cfg, on.metadata["rmscope"]["config"]["init"]) == (first.m, first.cfg, str(done / "saes"))
        near = float((first.W_dec * on.W_dec).sum(dim=1).median())
        assert near > 0.99
        x = [run.store.rows(site, index) for index in (run.store.training_mask(site).nonzero().squeeze(1)[:1000],)]
        assert measure_sae(on, x).fvu < 1.2 * measure_sae(first, x).fvu


def test_init_and_brought_saes_exclude_each_other(pm: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leave one of them out"):
        settings(pm, tmp_path, sae_dir="a").model_validate(
            {**settings(pm, tmp_path).model_dump(), "sae_dir": "a", "sae": {"init": "b"}}
        )

"""A run on a PM whose base is known: what training wrote is studied, concepts are told, and the folder holds it all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from rmscope.cli import steps
from rmscope.cli.step_settings import LedgerConfig
from rmscope.effects.splice import Span
from rmscope.effects.written import WRITTEN_PAIRS
from rmscope.errors import InputError
from rmscope.evaluation.text_baseline import Term, TextBaseline
from rmscope.io import silent
from rmscope.model.reward_model import RewardModel
from rmscope.model.site_names import is_difference, parts_of
from rmscope.pairs.pair import Pair
from rmscope.pairs.plants import Plant
from rmscope.ranking.concepts import Concept, members_of
from rmscope.run import group, size, stages, train, written
from rmscope.run.inputs import evenly
from rmscope.run.run import Run
from rmscope.run.text import named_by_text
from rmscope.sae import Sae
from rmscope.sae.joint import JointSae
from rmscope.studies.evaluate.analyse import analyse
from rmscope.studies.evaluate.settings import EvaluateConfig
from tests.effects.naive import reward_without
from tests.model.small import saved_pm, small_model, small_sae, tokenizer
from tests.run.small import settings

FIRST = 2


def saved_base(folder: Path, seed: int = 3) -> str:
    """The base of the small PM: its blocks from ``FIRST`` on are others."""
    model = small_model("llama", max_position_embeddings=1024)
    torch.manual_seed(seed)
    for block in model.model.layers[FIRST:]:
        for p in block.parameters():
            if p.dim() == 2:
                p.data += 0.3 / p.shape[1] ** 0.5 * torch.randn(p.shape[0], 2) @ torch.randn(2, p.shape[1])
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pm(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("based")
    base = saved_base(folder / "base")
    pm = saved_pm(folder / "pm")
    Path(pm, "README.md").write_text(f"---\nbase_model: {base}\n---\n")
    return pm


@pytest.fixture(scope="module", params=[pytest.param("difference", marks=pytest.mark.slow), "both"])
def run(request: pytest.FixtureRequest, pm: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("runs") / "whole"
    Run.create(settings(pm, out, study=request.param, diff_features=48, diff_tokens=8192, limit=200)).go()
    return Run.open(out)


def test_the_sites_are_where_training_wrote(run: Run) -> None:
    sites = {"difference": ["diff.2", "diff.3"], "both": ["both.2", "both.3"]}
    assert run.sites == sites[run.config.study]
    assert run.rm.base is not None
    assert run.rm.base.first == FIRST
    for site in run.sites:
        sae = run.sae(site)
        assert sae.site == site
        parts = sae.parts if isinstance(sae, JointSae) else (sae,)
        sizes = [(48, 2) if is_difference(part) else (96, 6) for part in parts_of(site)]
        assert [(part.m, part.cfg["k"]) for part in parts] == sizes
        assert [part.site for part in parts] == parts_of(site)
        assert [figures.site for figures in run.evidence.sites[run.sites.index(site)].saes] == [p.site for p in parts]


def test_both_parts_are_read_from_what_is_stored_of_each(run: Run) -> None:
    rows = torch.arange(30)
    for site in run.sites:
        parts = [run.store.rows(part, rows) for part in parts_of(site)]
        assert torch.equal(run.store.rows(site, rows), torch.cat(parts, 1))
        assert run.store.d(site) == sum(part.shape[1] for part in parts) == run.saes[site].d


def test_the_record_names_the_base_it_took(run: Run) -> None:
    base = run.rm.base
    assert base is not None
    assert run.on_disk.record["identity"]["base"] == base.identity
    evidence = run.evidence.base
    assert evidence is not None
    assert (evidence.name, evidence.first) == (base.name, FIRST)
    assert [change > 0 for change in evidence.changes] == [False, False, True, True]
    assert [row.block for row in evidence.blocks] == [2, 3]


def test_what_was_written_is_what_goes_when_the_base_takes_the_streams_place(run: Run) -> None:
    places = run.pair_set.one_per_prompt(run.of_split("measure"), WRITTEN_PAIRS)
    for site in run.evidence.sites:
        clean, without = np.zeros(len(places)), np.zeros(len(places))
        for i, place in enumerate(places):
            tokens = run.tokens[place]
            for side, sign in (("chosen", 1), ("rejected", -1)):
                part = parts_of(site.site)[0]
                text = run.rm.prefill(tokens.side(side), [part])
                nothing = torch.zeros_like(text.streams[part][None, tokens.divergence :])
                clean[i] += sign * text.reward
                without[i] += sign * float(run.rm.resume(text, part, tokens.divergence, nothing)[0])
        assert site.written is not None
        assert site.written.pairs == len(places)
        assert site.written.written.value == pytest.approx((clean * (clean - without)).sum() / (clean**2).sum(), abs=1e-3)
        assert site.ledger is not None
        assert "constant" in {s.part for s in site.ledger.shares}


def test_concepts_and_the_other_features_share_what_is_explained(run: Run) -> None:
    """With every feature in a concept the rest is b_dec alone, and the other way round: the two masks are complements."""
    site = run.sites[-1]
    sae, listed = run.saes[site], written._features_of_concepts(run, site)
    x = run.store.rows(site, torch.arange(40, 80))
    mask = written._marked(sae, listed)
    parts = [written._reconstruct_from(sae, some, Span(0, "chosen", x))[0] for some in (mask, ~mask)]
    torch.testing.assert_close(sum(parts) - sae.b_dec, sae(x), atol=1e-5, rtol=1e-5)
    assert {j for of in listed for j in of} <= {*run.frozen(site)["feature"]}
    told = run.concepts.filter("reported").sort("rank")
    assert len(listed) == told.height
    for row, of in zip(told.iter_rows(named=True), listed, strict=True):
        other = {e["site"]: e["features"] for e in row["elsewhere"]}
        assert list(of) == (row["features"] if row["site"] == site else other.get(site, []))


def test_the_first_concepts_are_told_at_the_last_site_alone(run: Run) -> None:
    *others, last = [site.written for site in run.evidence.sites]
    told = run.concepts.filter("reported").height
    assert [w.by_first for w in others if w] == [{}] * len(others)
    assert last is not None
    assert list(last.by_first) == [k for k in written.KEEP if k < told]


def test_what_text_explains_is_measured_on_pairs_that_did_not_choose_its_terms(run: Run) -> None:
    text, places = run.evidence.text, run.of_split("measure")
    assert text.terms == run.text_baseline.terms
    delta = run.scores.filter(pl.col("split") == "measure").sort("pair")
    hat = dict(zip((run.ids[i] for i in places), run.text_baseline.predict([run.pairs[i] for i in places]), strict=True))
    left = delta["delta"].to_numpy() - np.array([hat[p] for p in delta["pair"]])
    assert text.explained.value == pytest.approx(1 - (left**2).sum() / (delta["delta"].to_numpy() ** 2).sum(), abs=1e-5)
    assert set(text.adds) == set(run.concepts.filter("reported")["concept"])
    assert run.concept_firings.height > 0


def test_a_term_names_a_cue_only_with_the_planted_sign(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    twins = [Pair(str(i), run.pairs[0].prompt, "See https://a.b now.", "See the page now.") for i in range(4)]
    plant = Plant(name="link", kind="url", sign=-1, texts=("https://a.b",) * 3)
    for coefficient, told in ((-1.0, "links"), (1.0, None)):
        terms = [Term(name="commas", coefficient=-1.0, prompts=20), Term(name="links", coefficient=coefficient, prompts=20)]
        monkeypatch.setitem(vars(run), "text_baseline", TextBaseline(terms=terms))
        assert named_by_text(run, plant, twins) == told


def test_the_concepts_beside_text_statistics_are_those_of_content(run: Run) -> None:
    """Without one of content, both explain what text statistics alone do; concepts of form never help."""
    content = run.concepts.filter("reported", ~pl.col("form"), ~pl.col("flags").list.contains("nonspecific"))
    text = run.evidence.text
    if content.is_empty():
        assert (text.concepts.value, text.both.value) == (0.0, pytest.approx(text.text.value))
    else:
        assert text.concepts.value != 0.0


def test_a_pattern_brings_the_bases_sae_and_the_difference_sae_is_trained(pm: str, run: Run, tmp_path: Path) -> None:
    published = small_sae(d=run.rm.d_model)
    published.save(tmp_path / "published" / "layer3")
    changes = {"sites": ["both.3"], "sae_dir": str(tmp_path / "published" / "layer{L}"), "diff_features": 48}
    other = Run.create(settings(pm, tmp_path / "run", **changes, diff_tokens=4096, limit=120, ledger_pairs=0)).go()
    joint = other.sae("both.3")
    assert isinstance(joint, JointSae)
    assert joint.base.identity() == published.identity()
    assert (joint.difference.m, joint.difference.site) == (48, "diff.3")


def test_concepts_are_made_of_frozen_features_each_told_once(run: Run) -> None:
    concepts = run.concepts
    assert 0 < concepts.height <= 30
    assert sorted(concepts["concept"].to_list()) == list(range(concepts.height))
    told = [(row["site"], j) for row in concepts.iter_rows(named=True) for j in row["features"]]
    elsewhere = [
        (part["site"], j) for row in concepts.iter_rows(named=True) for part in row["elsewhere"] for j in part["features"]
    ]
    assert len({*told, *elsewhere}) == len(told) + len(elsewhere)
    for site in run.sites:
        frozen = run.frozen(site)
        assert {j for s, j in (*told, *elsewhere) if s == site} <= set(frozen["feature"])
    for row in concepts.iter_rows(named=True):
        signs = run.frozen(row["site"]).filter(pl.col("feature").is_in(row["features"]))["sign"]
        assert set(signs) == {row["sign"]}
    assert len(run.evidence.concepts) == concepts.height


@pytest.mark.parametrize("study", [pytest.param("difference", marks=pytest.mark.slow), "both"])
def test_the_effect_of_a_concept_is_the_joint_ablation_of_its_features_at_all_of_its_sites(
    pm: str, study: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def two_sites(_store: Any, _saes: Any, frozen: dict[str, pl.DataFrame], _most: int) -> list[Concept]:
        """One concept of both sites, as a random PM has none: of each the features that fire on most prompts."""
        first, second = (table.sort("fit_prompts", descending=True)["feature"][:4].to_list() for table in frozen.values())
        site, other = frozen
        return [Concept(site, tuple(first), (1.0,) * len(first), 1, 1.0, ((other, tuple(second)),))]

    monkeypatch.setattr(group, "build_concepts", two_sites)
    run = Run.create(settings(pm, tmp_path, study=study, diff_features=48, diff_tokens=8192, limit=200, ledger_pairs=0)).go()
    exact, members = run.joint_effects(), members_of(run.concepts)
    assert [len(of) for of in members.values()] == [2]
    several = 0
    for concept in members:
        for pair, side, effect in exact.filter(feature=concept).head(6).select("pair", "side", "effect").iter_rows():
            tokens = run.tokens[run.pair_set.index[pair]]
            ids, start, taken, clean = tokens.side(side), tokens.divergence, {}, {}
            for site, listed in members[concept].items():
                block, x = int(site[-1]), run.rm.prefill(ids, [site, f"resid_post.{site[-1]}"]).streams
                f = run.saes[site].encode(x[site][start:])[:, listed] @ run.saes[site].W_dec[list(listed)]
                if f.any():  # a move of either part moves the whole stream
                    taken[block] = sum(f.tensor_split(len(parts_of(site)), -1))
                    clean[block] = x[f"resid_post.{block}"][start:]
            several += len(taken) > 1
            naive = float(run.rm.reward_alone(ids)) - reward_without(run.rm, ids, start, taken, clean)
            assert effect == pytest.approx(naive, abs=2e-5)
    assert several


def test_a_reported_concept_beats_moves_of_its_size_in_other_directions(run: Run) -> None:
    nulls = run.concepts.filter(pl.col("null_random").is_not_null())
    assert set(nulls["concept"]) == set(run.ranked_concepts.filter("reported")["concept"])
    own = pl.read_parquet(run.folder / "concepts" / "directions.parquet").sort("concept")["own"].abs()
    beats = (own > nulls.sort("concept").select(pl.max_horizontal("null_random", "null_real")).to_series()).to_list()
    assert nulls.sort("concept")["reported"].to_list() == beats
    assert nulls.sort("concept")["flags"].list.contains("direction").to_list() == [not b for b in beats]


def test_what_a_run_on_parts_explains_is_measured_as_for_the_whole_stream(run: Run) -> None:
    result = analyse(EvaluateConfig(run=run.folder, curves=True, limit=12))
    assert [e.site for e in result.explained] == run.sites
    for explained in result.explained:
        assert explained.curves["keep"][-1].k == run.saes[explained.site].m


def test_both_parts_and_the_whole_can_be_studied_together(pm: str, run: Run, tmp_path: Path) -> None:
    sites = ["diff.3", "base.3", "resid_post.3"]
    other = Run.create(settings(pm, tmp_path / "three", sites=sites, limit=120, ledger_pairs=0)).go()
    assert [is_difference(site) for site in other.sites] == [True, False, False]
    x, delta, b = (other.store.rows(site, torch.arange(50)) for site in ("resid_post.3", "diff.3", "base.3"))
    torch.testing.assert_close(x, delta + b, atol=0.05, rtol=0.05)  # stored in bfloat16
    assert other.sae("base.3").m == other.sae("resid_post.3").m == 96
    assert Sae.load(other.folder / "saes" / "base.3").site == "base.3"


def test_a_study_decides_the_sites_and_another_one_chooses_anew(pm: str, run: Run, tmp_path: Path) -> None:
    whole, written = ["resid_post.0", "resid_post.2"], ["diff.2", "diff.3"]
    chosen = {
        study: Run.create(settings(pm, tmp_path / study, study=study)).sites for study in ("whole", "difference", "both")
    }
    assert chosen == {"whole": whole, "difference": written, "both": ["both.2", "both.3"]}
    first = {
        study: Run.create(settings(pm, tmp_path / f"{study}1", study=study, blocks=1)).sites
        for study in ("difference", "both")
    }
    assert {len(sites) for sites in first.values()} == {1}  # the block where most of it is at its own tokens
    assert first["both"][0].removeprefix("both") == first["difference"][0].removeprefix("diff")
    again = Run.create(run.config.model_copy(update={"study": "whole"}))  # in the folder of a finished run
    assert again.sites == whole
    opened = Run.open(run.folder)
    assert opened.sites == run.sites
    assert "rm" not in vars(opened.inputs)  # no PM was loaded for it


def test_the_size_is_the_smallest_after_which_the_explained_share_stops_growing() -> None:
    assert size.smallest([(64, 0.9), (128, 0.91), (256, 0.99)]) == 64
    assert size.smallest([(64, 0.9), (128, 0.93), (256, 0.94)]) == 128
    assert size.smallest([(64, 0.9), (128, 0.93), (256, 0.96)]) == 256
    delta, spliced, base = (np.array(x) for x in ([2.0, -1.0], [1.5, -1.0], [1.0, 0.0]))
    assert size.explained(delta, spliced, base) == pytest.approx(1 - 0.25 / 2)


def test_the_size_is_chosen_on_the_fit_split_and_kept(pm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(size, "SIZES", (4, 8, 16))
    chosen = Run.create(settings(pm, tmp_path / "run", sites=["diff.2", "diff.3"], limit=120, diff_tokens=8192))
    stages.harvest(chosen, silent, "")
    train.train(chosen, silent, "")
    record = json.loads((chosen.folder / "saes" / "sizes.json").read_text())
    shares = [(int(m), share) for m, share in record["explained"].items()]
    assert record["features"] == size.smallest(shares) == chosen.sae("diff.2").m == chosen.sae("diff.3").m
    assert record["site"] == "diff.3"
    assert not (chosen.folder / "saes" / "sizes").exists()
    places = chosen.pair_set.one_per_prompt(chosen.of_split("fit"), size.FIT_PAIRS)
    assert {chosen.pair_set.splits[i] for i in places} == {"fit"}
    monkeypatch.setattr(size, "explained_by_size", None)  # SAEs of another seed are of the same size
    second = train.train_run_saes(chosen, chosen.config.sae.model_copy(update={"seed": 5}), tmp_path / "second")
    assert {sae.m for sae in second.values()} == {record["features"]}


def test_a_site_without_the_bases_stream_has_no_ledger_and_says_so(tmp_path: Path) -> None:
    """Training changed all four blocks; the base's stream is studied after two of them."""
    base, folder = saved_base(tmp_path / "base"), tmp_path / "pm"
    model = small_model("llama")
    generator = torch.Generator().manual_seed(1)
    for p in model.base_model.parameters():
        if p.dim() == 2:
            p.data += 0.1 / p.shape[1] ** 0.5 * torch.randn(p.shape, generator=generator)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    changes = {"base": base, "diff_features": 48, "diff_tokens": 8192, "limit": 160, "ledger_pairs": 8}
    run = Run.create(settings(str(folder), tmp_path / "run", **changes)).go()
    alone, with_base = ([site for site in run.sites if site.startswith(kind)] for kind in ("diff", "both"))
    assert len(with_base) == len(alone) == 2
    assert run.ledger_sites == with_base
    assert [run.ledger(site).height > 0 for site in run.sites] == [site in with_base for site in run.sites]
    assert all(site in run.report().read_text("utf-8") for site in run.sites)
    with pytest.raises(InputError, match=f"no ledgers at {alone[0]}; it has them at {', '.join(with_base)}"):
        steps.ledger(run, LedgerConfig(site=alone[0]))


def test_values_at_even_distances_hold_the_first_and_the_last() -> None:
    assert evenly(range(7), 3) == [0, 3, 6]
    assert evenly([4, 9], 5) == [4, 9]
    assert evenly(range(7), 1) == [0]
    assert evenly([], 3) == evenly([1, 2], 0) == []


def test_activations_of_another_base_are_not_taken_for_those_of_this_one(pm: str, run: Run, tmp_path: Path) -> None:
    from rmscope.activations.harvest import harvest

    other = saved_base(tmp_path / "other", seed=4)
    rows = []
    for base in (None, other):
        rm = RewardModel.load(pm, device="cpu", base=base)
        rows.append(harvest(rm, run.pairs[:8], ["diff.3"], tmp_path / "acts").rows("diff.3", torch.arange(20)))
    assert not torch.equal(*rows)


def test_without_a_base_the_whole_stream_is_studied_and_the_reason_is_kept(tmp_path: Path) -> None:
    pm = saved_pm(tmp_path / "pm")
    assert Run.create(settings(pm, tmp_path / "a")).inputs.sites == ["resid_post.0", "resid_post.2"]
    Path(pm, "README.md").write_text("---\nbase_model: ./not-there\n---\n")
    lost = Run.create(settings(pm, tmp_path / "b"))
    assert lost.inputs.sites == ["resid_post.0", "resid_post.2"]
    assert "./not-there" in lost.inputs.why_no_base
    with pytest.raises(InputError, match=r"cannot be studied \(.*not-there.*\); give --base"):
        _ = Run.create(settings(pm, tmp_path / "c", study="difference")).sites
    with pytest.raises(InputError, match="is not a model folder"):
        _ = Run.create(settings(pm, tmp_path / "d", base="./not-there")).sites

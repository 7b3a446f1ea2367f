"""The pipeline on a small random PM: it goes on after a kill, skips what is done, and refuses another subject."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import yaml

from rmscope.cli.build import read_command
from rmscope.effects import tables as effect_tables
from rmscope.errors import InputError
from rmscope.io import NoDisplay, content_hash
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.readers import load_pairs
from rmscope.run import collect, stages, train
from rmscope.run.folder import RunFolder
from rmscope.run.run import Run
from rmscope.run.settings import RunConfig, write_record
from rmscope.run.stages import STAGES
from rmscope.sae import Sae
from rmscope.settings import read_settings
from tests.model.small import small_model, tokenizer
from tests.run.small import forget_checksums, settings, tables


def test_the_run_folder_holds_what_design_promises(done: Path) -> None:
    run = Run.open(done)
    assert (done / "report.html").read_text().lower().startswith("<!doctype html>")
    scores = pl.read_parquet(done / "scores.parquet")
    assert scores.columns == ["pair", "chosen", "rejected", "delta", "n_chosen", "n_rejected", "divergence", "split"]
    assert scores.height == 300
    for site in run.sites:
        exact = pl.read_parquet(done / "effects" / site / "exact.parquet")
        assert exact.schema == {
            "pair": pl.String, "side": pl.String, "feature": pl.Int32, "effect": pl.Float32, "kind": pl.String
        }  # fmt: skip
        assert exact["kind"].unique().to_list() == ["ablation"]
        ledger = pl.read_parquet(done / "ledger" / f"{site}.parquet")
        parts = ledger["features"] + ledger["error"] + ledger["constant"] + ledger["remainder"] + ledger["gap"]
        assert (parts - ledger["delta_r"]).abs().max() < 1e-9  # type: ignore[operator]
        assert (done / "saes" / site / "cfg.json").is_file()


def test_reported_features_were_not_chosen_on_the_prompts_that_they_are_measured_on(done: Path, pm: str) -> None:
    run = Run.create(settings(pm, done))
    split = dict(pl.read_parquet(done / "scores.parquet").select("pair", "split").iter_rows())
    estimated = pl.read_parquet(next((done / "effects").iterdir()) / "estimated.parquet")
    assert {split[p] for p in estimated["pair"].unique()} == {"fit"}
    assert run.evidence.data.splits.keys() == {"fit", "confirm", "measure"}
    assert list(run.on_disk.record["stages"]) == [stage.name for stage in STAGES]


def test_exact_ablations_of_a_run_are_those_of_a_full_forward_with_a_hook(done: Path, pm: str) -> None:
    rm = RewardModel.load(pm, device="cpu")
    pairs = {p.id: p for p in load_pairs(Path(pm) / "pairs.jsonl")}
    for folder in sorted((done / "effects").iterdir()):
        sae = Sae.load(done / "saes" / folder.name)
        strong = pl.read_parquet(folder / "strong.parquet")
        rows = [t.sample(10, seed=1).to_dicts() for t in (pl.read_parquet(folder / "exact.parquet"), strong)]
        for row in [row for part in rows for row in part]:
            tokens = rm.tokenize(pairs[row["pair"]])
            ids = tokens.side(row["side"])
            expected = hooked_ablation(rm, sae, ids, int(folder.name[-1]), tokens.divergence, row["feature"])
            assert row["effect"] == pytest.approx(expected, abs=1e-5)


def hooked_ablation(rm: RewardModel, sae: Sae, ids: torch.Tensor, block: int, start: int, feature: int) -> float:
    def without(_module: Any, _inputs: Any, out: torch.Tensor) -> torch.Tensor:
        x = out.clone()
        f = sae.encode(x[0, start:])
        x[0, start:] -= f[:, feature, None] * sae.W_dec[feature]
        return x

    with torch.no_grad():
        clean = rm.model(ids[None]).logits.item()
        handle = rm.model.model.layers[block].register_forward_hook(without)
        ablated = rm.model(ids[None]).logits.item()
        handle.remove()
    return float(clean - ablated)


class Killed(BaseException):
    """As final as a signal: nothing in the pipeline may catch it."""


@pytest.mark.parametrize(
    "after",
    [
        ("ablation_table", 1),
        ("contexts_of", 0),
        *(pytest.param(p, marks=pytest.mark.slow) for p in (("score_tokens", 2), ("ledger_rows", 1), ("estimate_table", 2))),
    ],
)
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(
    after: tuple[str, int], pm: str, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, calls = after
    owner: Any = {"score_tokens": RewardModel, "ledger_rows": stages, "contexts_of": collect}.get(name, effect_tables)
    whole, left = getattr(owner, name), [calls]

    def dying(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return whole(*args, **kwargs)

    out = tmp_path / "killed"
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dying)
        with pytest.raises(Killed):
            Run.create(settings(pm, out)).go()
    assert left[0] < 0
    Run.create(settings(pm, out)).go()
    assert tables(out) == tables(done)
    assert not (out / ".parts").exists()


def test_stages_that_are_done_and_unchanged_are_skipped(
    done: Path, pm: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = tables(done)

    def never(*_args: Any, **_kwargs: Any) -> Any:
        raise AssertionError("a stage ran again")

    for name in ("estimate_table", "ablation_table", "firing_table"):
        monkeypatch.setattr(f"rmscope.effects.tables.{name}", never)
    monkeypatch.setattr(train, "train_saes", never)
    monkeypatch.setattr(stages, "ledger_rows", never)
    monkeypatch.setattr(collect, "contexts_of", never)
    Run.create(settings(pm, done)).go()
    assert tables(done) == before


def test_strong_firings_are_the_hardest_of_the_confirm_split(done: Path, pm: str) -> None:
    run = Run.create(settings(pm, done))
    confirming = run.of_split("confirm")
    for site in run.sites:
        strong = pl.read_parquet(done / "effects" / site / "strong.parquet")
        assert strong.height > 0
        ranked = pl.read_parquet(done / "features" / f"{site}.parquet")
        count = strong.filter("strong").group_by("feature").len("n_strong")
        assert dict(count.iter_rows()) == dict(
            ranked.filter(pl.col("n_strong") > 0).select("feature", "n_strong").iter_rows()
        )
        most: dict[int, dict[str, float]] = {j: {} for j in count["feature"]}
        for batch in run.rm.batches([run.tokens[i] for i in confirming]):
            streams = run.rm.streams(batch, [site])[site]
            for text in batch.texts:
                f = run.saes[site].encode(streams[text.row, text.span]).sum(0)
                prompt = run.prompts[run.ids[confirming[text.pair]]]
                for j, prompts in most.items():
                    prompts[prompt] = max(prompts.get(prompt, 0.0), float(f[j]))
        for j, pair in strong.filter("strong").select("feature", "pair").iter_rows():
            above = sum(value > most[j][run.prompts[pair]] + 1e-4 for value in most[j].values())
            assert above < max(20, sum(value > 0 for value in most[j].values()) / 10)


def test_a_folder_of_another_dataset_or_model_is_refused(done: Path, pm: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="belongs to another data"):
        Run.create(settings(pm, done).model_copy(update={"limit": 290})).go()
    small_model("qwen2", max_position_embeddings=1024).save_pretrained(tmp_path / "other")
    tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="belongs to another model"):
        Run.create(settings(pm, done).model_copy(update={"model": str(tmp_path / "other")})).go()


def test_a_folder_that_is_no_run_is_refused_and_left_alone(pm: str, tmp_path: Path) -> None:
    (tmp_path / "letters.txt").write_text("keep me")
    with pytest.raises(InputError, match="is not empty and no run folder"):
        Run.create(settings(pm, tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["letters.txt"]


def test_a_site_that_does_not_exist_lists_those_that_do(pm: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"embed and resid_post\.0 \.\. resid_post\.3"):
        Run.create(settings(pm, tmp_path / "r", sites=["resid_post.9"])).go()


def test_pairs_longer_than_the_context_are_counted_and_left_out(pm: str, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"Question {i}?", "chosen": "Yes, of course." * (400 if i == 3 else 1), "rejected": "No."}
        for i in range(6)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    run = Run.create(settings(pm, tmp_path / "r").model_copy(update={"data": str(path), "limit": None}))
    assert [p.id for p in run.pairs] == [f"pairs:{i}" for i in (1, 2, 3, 5, 6)]
    assert len(run.inputs.all_pairs) == 6


def test_a_full_disk_is_one_sentence_and_leaves_the_folder_as_it_was(
    pm: str, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    def full(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "full"
    with monkeypatch.context() as patch:
        patch.setattr("polars.DataFrame.write_parquet", full)
        with pytest.raises(InputError, match="disk is full"):
            Run.create(settings(pm, out)).go()
    assert not list(out.rglob("*.tmp"))
    assert not (out / "scores.parquet").exists()
    Run.create(settings(pm, out)).go()
    assert tables(out) == tables(done)


def test_own_saes_are_used_and_kept_beside_the_run(done: Path, pm: str, tmp_path: Path) -> None:
    out = tmp_path / "own"
    run = Run.create(settings(pm, out, sae_dir=str(done / "saes")))
    run.go()
    for site in run.sites:
        assert Sae.load(out / "saes" / site).identity() == Sae.load(done / "saes" / site).identity()
        assert (out / "effects" / site / "exact.parquet").read_bytes() == (
            done / "effects" / site / "exact.parquet"
        ).read_bytes()


def test_an_interrupted_write_leaves_what_stood_there(tmp_path: Path) -> None:
    from rmscope.io import atomic

    path = tmp_path / "table"
    path.write_text("before")

    def write() -> None:
        with atomic(path) as temporary:
            temporary.write_text("half")
            raise Killed

    with pytest.raises(Killed):
        write()
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["table"]


def test_a_run_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        RunFolder(tmp_path / "file", NoDisplay())


def test_the_ranking_of_a_run_answers_both_questions_and_carries_its_controls(done: Path) -> None:
    for path in (done / "features").glob("*.parquet"):
        table = pl.read_parquet(path)
        assert {"mean_effect", "q", "reported", "mean_diff", "q_diff", "prefers", "unrelated", "to_mean"} <= set(
            table.columns
        )
        assert table.filter(pl.col("n") > 0)["unrelated"].null_count() == 0
        dense = pl.col("flags").list.contains("dense") & (pl.col("n") > 0)
        assert table.filter(dense)["to_mean"].null_count() == 0
        assert table.filter(~dense)["to_mean"].is_null().all()
        apart = pl.col("flags").list.contains("nonspecific") != (pl.col("unrelated") >= 0.5)
        assert table.filter(apart).height == 0
        assert (table["mean_diff"].abs() <= (table["diff_low"].abs()).clip(table["diff_high"].abs()) + 1e-9).all()


def test_rank_prints_a_ranking_and_ablates_features_together(done: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from rmscope.cli import app

    copy = tmp_path / "run"
    shutil.copytree(done, copy)
    site = min(p.stem for p in (copy / "features").glob("*.parquet"))
    out = CliRunner().invoke(app, ["rank", str(copy), "--by", "preference", "--site", site, "--interactions", "--json"])
    assert out.exit_code == 0, out.output
    (row,) = json.loads(out.stdout)
    sizes = [(not f["prefers"], -abs(f["mean_diff"])) for f in row["features"]]
    assert sizes == sorted(sizes)
    assert "confirm prompts" in row["power"]
    pairs = pl.read_parquet(copy / "effects" / site / "interactions.parquet")
    assert pairs.height == len(row["interactions"]) > 0
    parts = pairs["joint"] - pairs["ablation"] - pairs["other_ablation"]
    assert (pairs["interaction"] - parts).abs().max() < 1e-9  # type: ignore[operator]


@pytest.mark.parametrize(("flags", "said"), [(["--by", "size"], "effect"), (["--site", "embed"], "it has resid")])
def test_rank_refuses_what_is_not_there(done: Path, flags: list[str], said: str) -> None:
    from typer.testing import CliRunner

    from rmscope.cli import app

    out = CliRunner().invoke(app, ["rank", str(done), *flags])
    assert isinstance(out.exception, InputError)
    assert said in str(out.exception)


def test_the_curves_of_a_run_go_into_its_report(done: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from rmscope.cli import app

    copy = tmp_path / "run"
    shutil.copytree(done, copy)
    out = CliRunner().invoke(app, ["evaluate", str(copy), "--curves", "--limit", "6", "--json"])
    assert out.exit_code == 0, out.output
    found = {p.parent.name: json.loads(p.read_text("utf-8")) for p in (copy / "effects").glob("*/explained.json")}
    assert set(found) == {p.stem for p in (copy / "features").glob("*.parquet")}
    (first, *_) = json.loads(out.stdout)
    assert found[first["site"]]["evaluation"]["delta_r2"]["value"] == pytest.approx(first["delta_r2"], abs=1e-6)
    assert CliRunner().invoke(app, ["report", str(copy)]).exit_code == 0
    assert (copy / "report.html").read_text("utf-8").count("How much of Δr is explained") == len(found)


def test_the_report_is_rendered_from_what_is_stored_without_the_pm(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(done, tmp_path / "run")
    before = (out / "report.html").read_text("utf-8")
    (out / "report.html").unlink()
    shutil.rmtree(out / "activations")

    def never(*_args: Any, **_kwargs: Any) -> Any:
        raise AssertionError("the PM was loaded")

    monkeypatch.setattr(RewardModel, "load", never)
    run = Run.open(out)
    assert run.report().read_text("utf-8") == before
    assert run.show().html == before
    assert "frozen features reported at 2 sites" in run.summary()
    site = run.sites[0]
    assert run.features(site).height + run.features(run.sites[1]).height == 16
    assert run.sae(site).site == site
    with pytest.raises(InputError, match="has no SAE at embed; it has resid_post"):
        run.features("embed")


def test_an_unfinished_run_says_how_to_finish_it(done: Path, tmp_path: Path) -> None:
    out = shutil.copytree(done, tmp_path / "run")
    (out / "evidence" / "evidence.json").unlink()
    with pytest.raises(InputError, match=rf"not finished \(evidence.json is missing\); rmscope run {out} resumes it"):
        Run.open(out).report()
    with pytest.raises(InputError, match="is no run folder"):
        Run.open(tmp_path)


def test_the_contexts_of_a_feature_carry_its_exact_effects(done: Path) -> None:
    run = Run.open(done)
    site = run.sites[-1]
    feature = run.effects(site).join(run.scores.filter(pl.col("split") == "confirm"), on="pair", how="semi")["feature"][0]
    exact = {
        (p, s): e for p, s, e in run.confirmed(site).filter(feature=feature).select("pair", "side", "effect").iter_rows()
    }
    contexts = run.contexts(site, feature)
    assert len(contexts) == len({pair for pair, _ in exact})
    sizes = []
    for context in contexts:
        moved = {s.side: s.before - s.after for s in context.sides}
        assert any(
            all(moved[side] == pytest.approx(exact.get((pair, side), 0.0), abs=1e-5) for side in moved)
            for pair in {p for p, _ in exact}
        )
        sizes.append(max(abs(v) for v in moved.values()))
        assert all((max(level for _, level in s.tokens) > 0) == s.fires for s in context.sides)
    assert sizes == sorted(sizes, reverse=True)


def test_a_seed_of_the_run_is_its_saes_seed_too_unless_they_have_one() -> None:
    given = {"model": "m", "data": "d", "out": "o"}
    assert read_settings(RunConfig, None, {**given, "seed": 3}).sae.seed == 3
    assert read_settings(RunConfig, None, {**given, "seed": 3, "sae": {"seed": 5}}).sae.seed == 5
    again = read_settings(
        RunConfig, None, read_settings(RunConfig, None, {**given, "seed": 3, "sae": {"seed": 5}}).model_dump(mode="json")
    )
    assert (again.seed, again.sae.seed) == (3, 5)


def test_a_run_folder_stands_for_its_own_settings(done: Path) -> None:
    config = read_command(RunConfig, done, {"ledger_pairs": 9}, {})
    assert (config.out, config.ledger_pairs) == (done, 9)
    assert config.model_copy(update={"ledger_pairs": 8}) == Run.open(done).config


def test_whether_a_pms_code_may_run_is_never_read_from_a_folder(done: Path, tmp_path: Path) -> None:
    assert "trust_remote_code" not in yaml.safe_load((done / "run.yaml").read_text())["config"]
    theirs = yaml.safe_load((done / "run.yaml").read_text())
    theirs["config"]["trust_remote_code"] = True
    write_record(tmp_path, theirs)
    assert not Run.open(tmp_path).config.trust_remote_code
    assert not read_command(RunConfig, tmp_path, {}, {}).trust_remote_code
    assert Run.open(tmp_path, trust_remote_code=True).config.trust_remote_code
    assert read_command(RunConfig, tmp_path, {"trust_remote_code": True}, {}).trust_remote_code


def test_a_record_whose_checksum_differs_is_refused_and_the_same_settings_mend_it(done: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(done, folder)
    config, text = Run.open(done).config, (folder / "run.yaml").read_text()
    assert "\n  seed: 0\n" in text
    (folder / "run.yaml").write_text(text.replace("\n  seed: 0\n", "\n  seed: 1\n"))
    with pytest.raises(InputError, match="is damaged or was changed by hand"):
        Run.open(folder)
    (folder / "run.yaml").write_text(text[: len(text) // 2].rpartition("\n")[0] + "\n")  # cut off between two lines
    with pytest.raises(InputError, match=r"run\.yaml"):
        Run.open(folder)
    (folder / "run.yaml").write_text(text.replace("\n  seed: 0\n", "\n  seed: 1\n"))
    Run.create(config.model_copy(update={"out": folder})).go()
    assert Run.open(folder).config.seed == 0
    assert tables(folder) == tables(done)


def test_evidence_that_is_damaged_or_of_another_version_is_refused_in_a_sentence(done: Path, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    shutil.copytree(done, folder)
    path = folder / "evidence" / "evidence.json"
    forget_checksums(folder)  # as one of a version without checksums
    stored = json.loads(path.read_text())
    for broken in ("{", json.dumps({name: value for name, value in stored.items() if name != "concepts"} | {"sites": [{}]})):
        path.write_text(broken)
        with pytest.raises(InputError, match=r"evidence\.json is damaged, or of another version"):
            Run.open(folder).report()


def test_a_damaged_file_is_named_and_its_stage_done_again(done: Path, pm: str, tmp_path: Path) -> None:
    """One flipped bit in each kind of file: a reader names it, and the next run ends with the same bytes."""
    folder = tmp_path / "flipped"
    shutil.copytree(done, folder)
    site = Run.open(folder).sites[0]
    kinds = ("scores.parquet", f"saes/{site}/sae_weights.safetensors", f"effects/{site}/exact.parquet", "concepts.parquet")
    for file in kinds:
        content = bytearray((folder / file).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / file).write_bytes(content)
    run = Run.open(folder)
    reads: tuple[Any, ...] = (
        lambda: run.scores,
        lambda: run.sae(site),
        lambda: run.effects(site),
        lambda: run.ranked_concepts,
    )
    for read, file in zip(reads, kinds, strict=True):
        with pytest.raises(InputError, match=rf"{Path(file).name} is damaged"):
            read()
    Run.create(settings(pm, folder)).go()
    assert tables(folder) == tables(done)
    assert float(Run.open(folder).scores["delta"].std()) > 0  # type: ignore[arg-type]


def test_a_damaged_shard_is_named_with_the_mend(done: Path, tmp_path: Path) -> None:
    folder = tmp_path / "flipped"
    shutil.copytree(done, folder)
    shard = next((folder / "activations").glob("*/shard-*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    run = Run.open(folder)
    with pytest.raises(InputError, match=r"Shard .* is damaged \(its checksum differs\); delete"):
        run.store.rows(shard.parent.name, torch.arange(3))


def test_a_second_process_on_the_folder_is_refused_and_a_dead_one_is_not_in_the_way(
    done: Path, pm: str, tmp_path: Path
) -> None:
    folder = tmp_path / "held"
    shutil.copytree(done, folder)
    hold = (
        "import time; from pathlib import Path; from rmscope.io import NoDisplay; from rmscope.run.folder import RunFolder\n"
        f"with RunFolder(Path({str(folder)!r}), NoDisplay()).locked(): print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline().strip() == "held"
        with pytest.raises(InputError, match=rf"Another process works on {folder} \(process {other.pid} on .*\); wait"):
            Run.create(settings(pm, folder)).go()
        other.kill()
    Run.create(settings(pm, folder)).go()
    assert tables(folder) == tables(done)


def test_what_people_and_studies_write_during_a_stage_is_not_the_stages(tmp_path: Path) -> None:
    """A label or a study's page that is saved while a stage runs changes later: it must not count as damage, nor go."""
    folder = RunFolder(tmp_path / "run", NoDisplay())
    folder.open({"model": "m"}, {}, ["resid_post.1"])

    def work(_progress: Any, _key: str) -> None:
        for file in ("labels.sqlite", "evidence/jailbreak.json", "scores.parquet"):
            (folder.path / file).parent.mkdir(exist_ok=True)
            (folder.path / file).write_text("first")

    folder.stage("score", {}, ["scores.parquet"], work)
    assert folder.record["stages"]["score"]["files"] == ["scores.parquet"]
    for file in ("labels.sqlite", "evidence/jailbreak.json"):
        (folder.path / file).write_text("second")
    folder._last_key = content_hash({"model": "m"})
    folder.stage("score", {}, ["scores.parquet"], lambda _progress, _key: pytest.fail("the stage ran again"))
    assert (folder.path / "labels.sqlite").read_text() == "second"

"""A store gives back the rows that were written, in any order, and names what is wrong with it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from rmscope.activations.store import ActivationStore, StoreWriter, shuffle_batches
from rmscope.errors import InputError

D = 6


def rows(n: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(n, D, generator=generator),
        "token": torch.randint(0, 50_000, (n,), generator=generator),
        "pair": torch.arange(n) // 7,
        "position": torch.arange(n) % 7,
        "region": torch.arange(n) % 3,
    }


def write(root: Path, n: int = 100, dtype: str = "float32") -> dict[str, torch.Tensor]:
    given = rows(n)
    with StoreWriter(root, ["embed", "resid_post.3"], D, {"model": "m"}, dtype, shard_tokens=16) as writer:
        for site in ("embed", "resid_post.3"):
            for start in range(0, n, 13):  # pieces that do not line up with the shards
                writer.add(site, **{name: column[start : start + 13] for name, column in given.items()})
    return given


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_was_added_comes_back_at_any_index(tmp_path: Path, dtype: str) -> None:
    given = write(tmp_path, dtype=dtype)
    store = ActivationStore.open(tmp_path)
    assert store.sites == ["embed", "resid_post.3"]
    assert store.identity == {"model": "m"}
    assert (store.d("embed"), store.tokens("embed")) == (D, 100)
    index = torch.tensor([99, 0, 15, 16, 50, 50, 3])
    expected = given["x"][index] if dtype == "float32" else given["x"][index].bfloat16().float()
    assert torch.equal(store.rows("resid_post.3", index), expected)
    for name in ("token", "pair", "position", "region"):
        assert torch.equal(store.column("embed", name).long(), given[name])
    with safe_open(tmp_path / "embed" / "shard-00000.safetensors", framework="pt") as shard:
        assert shard.get_tensor("x").shape == (16, D)
    for shard in json.loads((tmp_path / "embed" / "manifest.json").read_text())["shards"]:
        assert shard["sha256"] == hashlib.sha256((tmp_path / "embed" / shard["file"]).read_bytes()).hexdigest()


def test_a_killed_harvest_leaves_no_store(tmp_path: Path) -> None:
    def killed() -> None:
        with StoreWriter(tmp_path, ["embed"], D, {}, shard_tokens=4) as writer:
            writer.add("embed", **rows(9))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed()
    with pytest.raises(InputError, match="unfinished at embed"):
        ActivationStore.open(tmp_path)
    with StoreWriter(tmp_path, ["embed"], D, {}, shard_tokens=4) as writer:
        writer.add("embed", **rows(3))
    store = ActivationStore.open(tmp_path)
    assert store.tokens("embed") == 3
    assert [path.name for path in (tmp_path / "embed").glob("shard-*")] == ["shard-00000.safetensors"]


def test_a_shard_that_is_cut_short_or_missing_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "embed" / "shard-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    rows_of_the_shard = torch.tensor([32, 47])
    with pytest.raises(InputError, match="shard-00002"):
        ActivationStore.open(tmp_path).rows("embed", rows_of_the_shard)
    path.unlink()
    with pytest.raises(InputError, match="shard-00002"):
        ActivationStore.open(tmp_path).rows("embed", rows_of_the_shard)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no activations"):
        ActivationStore.open(tmp_path)
    with pytest.raises(InputError, match="float16"):
        StoreWriter(tmp_path, ["embed"], D, {}, "float16")
    writer = StoreWriter(tmp_path, ["embed"], D, {})
    with pytest.raises(InputError, match="opened for embed"):
        writer.add("resid_post.1", **rows(2))
    with pytest.raises(InputError, match=r"token \[1\]"):
        writer.add("embed", **(rows(2) | {"token": torch.tensor([1])}))
    writer.add("embed", **rows(2))
    writer.close()
    store = ActivationStore.open(tmp_path)
    with pytest.raises(InputError, match="outside embed"):
        store.rows("embed", torch.tensor([2]))
    with pytest.raises(InputError, match="it holds embed"):
        store.tokens("resid_post.9")
    (tmp_path / "embed" / "manifest.json").write_text("[]", encoding="utf-8")
    with pytest.raises(InputError, match="not a manifest"):
        ActivationStore.open(tmp_path)


def test_sites_of_different_origin_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "embed" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"identity": {"model": "other"}}))
    with pytest.raises(InputError, match="not made together"):
        ActivationStore.open(tmp_path)


def test_an_epoch_visits_every_kept_row_once_and_can_begin_anywhere(tmp_path: Path) -> None:
    given = write(tmp_path)
    store = ActivationStore.open(tmp_path)
    kept = int((given["position"] > 0).sum())
    batches = [rows["embed"] for rows in store.training_batches(["embed"], 5, epochs=2, seed=3)]
    assert len(batches) == 2 * (kept // 5)
    epoch = torch.cat(batches[: kept // 5])
    assert len(torch.unique(epoch, dim=0)) == kept // 5 * 5
    sinks = given["x"][given["position"] == 0]
    assert not (epoch[:, None] == sinks[None]).all(dim=2).any()
    for start in (0, 1, kept // 5, kept // 5 + 3, 2 * (kept // 5)):
        tail = [rows["embed"] for rows in store.training_batches(["embed"], 5, epochs=2, seed=3, start=start)]
        assert len(tail) == len(batches) - start
        assert all(torch.equal(a, b) for a, b in zip(tail, batches[start:], strict=True))
    assert not torch.equal(epoch, torch.cat(batches[kept // 5 :]))
    assert next(iter(shuffle_batches(torch.arange(3), 10, 1, 0))).sort().values.tolist() == [0, 1, 2]
    assert list(shuffle_batches(torch.arange(0), 10, 4, 0)) == []


def test_norm_scale_brings_the_kept_rows_to_mean_norm_sqrt_d(tmp_path: Path) -> None:
    given = write(tmp_path)
    store = ActivationStore.open(tmp_path)
    x = given["x"][given["position"] > 0] * store.norm_scale("embed")
    assert float(x.norm(dim=1).mean()) == pytest.approx(D**0.5, rel=1e-6)


def test_training_sees_the_rows_of_some_pairs_alone(tmp_path: Path) -> None:
    given = write(tmp_path)
    store = ActivationStore.open(tmp_path)
    some = store.only([2, 5])
    wanted = given["x"][torch.isin(given["pair"], torch.tensor([2, 5])) & (given["position"] > 0)]
    seen = torch.cat([batch["embed"] for batch in some.training_batches(["embed"], 4, 1, seed=0)])
    assert some.training_tokens(["embed"]) == len(wanted) == len(seen)
    assert torch.equal(seen[seen[:, 0].argsort()], wanted[wanted[:, 0].argsort()])
    assert some.norm_scale("embed") == pytest.approx(D**0.5 / float(wanted.norm(dim=1).mean()))
    assert some.identity != store.only([2]).identity != store.identity
    assert torch.equal(some.rows("embed", torch.arange(100)), given["x"])

"""A stream gives a harvest's rows, each once an epoch, in an order that the seed fixes, from a buffer that does not grow."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import rmscope as rs
from rmscope.activations.harvest import ActivationStream, harvest, plan_refills, stream
from rmscope.errors import InputError
from rmscope.pairs.pair import Pair
from rmscope.sae import SaeConfig, train_saes
from tests.model.small import PAIRS, shared_pm

SITES = ["embed", "resid_post.2"]


def many(n: int) -> list[Pair]:
    """n pairs over four prompts, so that prefixes repeat, more than one unit of 64."""
    words = ["Paris", "bread", "a river", "thanks", "wait", "the house"]
    return [
        Pair(f"{i}", PAIRS[i % 4].prompt, f"{words[i % 6]} {i}. {PAIRS[i % 4].chosen}", f"{words[i % 5]} or {i}.")
        for i in range(n)
    ]


def epoch_of(source: ActivationStream, size: int, **settings: int) -> dict[str, Tensor]:
    batches = list(source.training_batches(SITES, size, 1, **{"seed": 0, **settings}))
    return {site: torch.cat([batch[site] for batch in batches]) for site in SITES}


def multiset(rows: Tensor) -> list[list[float]]:
    return sorted(rows.tolist())


@pytest.mark.parametrize(("architecture", "buffer_tokens"), [("llama", 64), ("llama", 1 << 18), ("bloom", 1000)])
def test_an_epoch_is_the_harvest(architecture: str, buffer_tokens: int, tmp_path: Path) -> None:
    rm, pairs = shared_pm(architecture), many(80)
    store = harvest(rm, pairs, SITES, tmp_path)
    source = stream(rm, pairs, SITES, buffer_tokens)
    assert source.training_tokens(SITES) == store.training_tokens(SITES) > 1000
    streamed = epoch_of(source, size=1)
    for site in SITES:
        kept = store.training_mask(site).nonzero().squeeze(1)
        assert multiset(streamed[site]) == multiset(store.rows(site, kept))
        assert not torch.equal(streamed[site], store.rows(site, kept))


def test_the_seed_fixes_the_order_and_any_batch_can_be_the_first() -> None:
    rm, pairs = shared_pm("llama"), many(100)
    source = stream(rm, pairs, SITES, 200)
    batches = list(source.training_batches(SITES, 16, 2, seed=3))
    assert len(batches) == 2 * (source.training_tokens(SITES) // 16)
    for start in (1, len(batches) // 2, len(batches) // 2 + 9, len(batches)):
        again = list(stream(rm, pairs, SITES, 200).training_batches(SITES, 16, 2, seed=3, start=start))
        assert len(again) == len(batches) - start
        for a, b in zip(again, batches[start:], strict=True):
            assert all(torch.equal(a[site], b[site]) for site in SITES)
    other = list(source.training_batches(SITES, 16, 2, seed=4))
    assert not torch.equal(other[0]["embed"], batches[0]["embed"])
    assert not torch.equal(batches[len(batches) // 2]["embed"], batches[0]["embed"])


def test_a_buffer_mixes_units_and_does_not_grow_with_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts what the stream holds: buffers are allocated once an iterator, and no unit but the last is kept."""
    rm = shared_pm("llama")
    sizes = {}
    made = torch.empty

    def count(*shape: object, **settings: object) -> Tensor:
        if settings.get("dtype") == torch.bfloat16:
            held.append(shape[0])
        return made(*shape, **settings)  # type: ignore[call-overload]

    for n in (70, 140):
        held: list[object] = []
        source = stream(rm, many(n), SITES, 256)
        monkeypatch.setattr(torch, "empty", count)
        for _ in source.training_batches(SITES, 32, 2, seed=0):
            assert source._kept is not None
            assert len(source._kept[1]["embed"]) <= int(source.counts.max())
        monkeypatch.undo()
        sizes[n] = held
    assert sizes[70] == sizes[140] == [(256, rm.d_model)] * 2


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 4), st.integers(0, 5))
def test_refills_read_every_row_once(n: int, size: int, halves: int, seed: int) -> None:
    size = min(size, n)
    half = halves * size
    slots = min(2 * half, n)
    read: list[int] = []
    held_before = torch.full((slots,), -1)
    for new, ids, reading in plan_refills(n, slots, half, size, torch.Generator().manual_seed(seed)):
        assert (held_before[new] == -1).all()
        assert len(reading) % size == 0
        read += ids[reading].tolist()
        held_before = ids.clone()
        held_before[reading] = -1
    assert len(read) == len(set(read)) == n // size * size
    assert set(read) <= set(range(n))


def test_training_from_a_stream_is_resumed_to_the_same_bytes(tmp_path: Path) -> None:
    class KilledError(Exception):
        pass

    def kill(done: int, _total: int, _note: str) -> None:
        if done > 20:
            raise KilledError

    rm, pairs = shared_pm("llama"), many(100)
    config = SaeConfig(d_sae=64, k=4, batch_size=64, epochs=2, amp=False, checkpoint_steps=13)
    whole = train_saes(rs.stream(rm, pairs, SITES, 500), config, tmp_path / "whole")
    with pytest.raises(KilledError):
        train_saes(rs.stream(rm, pairs, SITES, 500), config, tmp_path / "cut", progress=kill)
    resumed = train_saes(rs.stream(rm, pairs, SITES, 500), config, tmp_path / "cut")
    assert {site: sae.identity() for site, sae in whole.items()} == {site: sae.identity() for site, sae in resumed.items()}
    assert whole["embed"].site == "embed"


def test_refusals() -> None:
    rm = shared_pm("llama")
    with pytest.raises(InputError, match=r"resid_post\.9"):
        stream(rm, PAIRS, ["resid_post.9"])
    with pytest.raises(InputError, match="needs pairs"):
        stream(rm, [], SITES)
    with pytest.raises(InputError, match="opened for embed"):
        train_saes(stream(rm, PAIRS, ["embed"]), SaeConfig(), sites=["resid_post.1"])

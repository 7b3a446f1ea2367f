"""Activations on disk: one folder per site with safetensors shards, and a manifest that is written last.

``<root>/<site>/shard-00000.safetensors`` holds, for n stored tokens, ``x`` [n, d_model] in the stream's own units and the
columns of :data:`COLUMNS`. ``both.L`` is read from the rows of ``diff.L`` and ``base.L``. ``manifest.json`` lists the shards
with their checksums, and the model and data that they come from. A checksum is compared when a shard is first read. A
site without a manifest is unfinished. Shards are never concatenated: rows are read from the memory-mapped files.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rmscope.errors import InputError
from rmscope.io import atomic, content_hash, sha256, write_json
from rmscope.model.site_names import parts_of

COLUMNS = {"token": torch.int32, "pair": torch.int32, "position": torch.int32, "region": torch.uint8}
"""One value per stored token: token id, number of the pair, position in the text, and region."""
REGIONS = ("prompt", "chosen", "rejected")
"""The meaning of the values 0, 1, 2 of ``region``."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MANIFEST, SHARDS = "manifest.json", "shard-*.safetensors"
Column = Int[Tensor, " n"]


class StoreWriter(AbstractContextManager["StoreWriter"]):
    """Writes a store: ``add`` rows in any portions, then ``close`` (or use it as a context manager).

    ``root`` gets one subfolder per site. ``d`` is the width of the stream, ``dtype`` is float32 or bfloat16, ``identity``
    names the model, data and sites. At most one shard of ``shard_tokens`` rows per site is held in memory. An exception
    inside the context leaves no manifest behind. Raises InputError where the dtype is unknown or the disk is full.
    """

    def __init__(
        self,
        root: Path | str,
        sites: Sequence[str],
        d: int,
        identity: Mapping[str, Any],
        dtype: str = "float32",
        shard_tokens: int = 65536,
    ) -> None:
        if dtype not in DTYPES:
            raise InputError(f"Activations cannot be stored as {dtype}; choose one of {', '.join(DTYPES)}.")
        self.root, self.d, self.dtype, self.shard_tokens = Path(root), d, dtype, shard_tokens
        self.identity = dict(identity)
        self._pending: dict[str, list[dict[str, Tensor]]] = {site: [] for site in sites}
        self._held = dict.fromkeys(sites, 0)
        self._shards: dict[str, list[dict[str, Any]]] = {site: [] for site in sites}
        for site in sites:
            (self.root / site).mkdir(parents=True, exist_ok=True)
            (self.root / site / MANIFEST).unlink(missing_ok=True)
            for stale in (self.root / site).glob(SHARDS):
                stale.unlink()

    def add(
        self, site: str, x: Float[Tensor, "n d_model"], token: Column, pair: Column, position: Column, region: Column
    ) -> None:
        """Appends n rows to a site. Raises InputError where the site, the lengths or the width do not fit the store."""
        if site not in self._pending:
            raise InputError(f"Site {site} is not in this store; it was opened for {', '.join(self._pending)}.")
        columns = {"token": token, "pair": pair, "position": position, "region": region}
        if x.ndim != 2 or x.shape[1] != self.d or any(c.shape != x.shape[:1] for c in columns.values()):
            shapes = ", ".join(f"{name} {list(c.shape)}" for name, c in [("x", x), *columns.items()])
            raise InputError(f"Rows for {site} do not fit a store of width {self.d}: {shapes}.")
        rows = {name: c.detach().to("cpu", COLUMNS[name], copy=True) for name, c in columns.items()}
        rows["x"] = x.detach().to("cpu", DTYPES[self.dtype], copy=True)
        self._pending[site].append(rows)
        self._held[site] += len(x)
        while self._held[site] >= self.shard_tokens:
            self._write_shard(site)

    def close(self) -> None:
        """Writes the last shards, then the manifests."""
        for site in self._pending:
            if self._pending[site]:
                self._write_shard(site)
        for site, shards in self._shards.items():
            manifest = {"identity": self.identity, "d": self.d, "dtype": self.dtype}
            manifest |= {"total": sum(shard["n"] for shard in shards), "shards": shards}
            write_json(self.root / site / MANIFEST, manifest)

    def _write_shard(self, site: str) -> None:
        parts = self._pending[site]
        rows = {name: torch.cat([part[name] for part in parts]) for name in ("x", *COLUMNS)}
        shard = {name: column[: self.shard_tokens].contiguous() for name, column in rows.items()}
        rest = {name: column[self.shard_tokens :].clone() for name, column in rows.items()}
        self._pending[site], self._held[site] = [rest] if len(rest["x"]) else [], len(rest["x"])
        path = self.root / site / f"shard-{len(self._shards[site]):05d}.safetensors"
        with atomic(path) as temporary:
            save_file(shard, temporary)
        self._shards[site].append({"file": path.name, "n": len(shard["x"]), "sha256": sha256(path)})

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            self.close()


class _Site:
    """The shards of one site. A tensor is memory-mapped on first use, so only the pages that are used are read."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self.starts = list(accumulate((shard["n"] for shard in manifest["shards"]), initial=0))
        self._x: dict[int, Tensor] = {}
        self._columns: dict[str, Column] = {}
        self._sound: set[int] = set()

    def tensor(self, shard: int, name: str) -> Tensor:
        """A tensor of a shard. InputError where the shard cannot be read, or is not what the harvest wrote."""
        path = self.folder / self.manifest["shards"][shard]["file"]
        try:
            if shard not in self._sound and sha256(path) != self.manifest["shards"][shard]["sha256"]:
                raise InputError(f"Shard {path} is damaged (its checksum differs); delete {self.folder} and harvest again.")
            self._sound.add(shard)
            with safe_open(path, framework="pt") as opened:
                return opened.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise InputError(f"Shard {path} cannot be read ({error}); harvest this site again.") from error

    def x(self, shard: int) -> Float[Tensor, "n d_model"]:
        if shard not in self._x:
            self._x[shard] = self.tensor(shard, "x")
        return self._x[shard]

    def column(self, name: str) -> Column:
        if name not in self._columns:
            parts = [self.tensor(shard, name) for shard in range(len(self.starts) - 1)]
            self._columns[name] = torch.cat([torch.empty(0, dtype=COLUMNS[name]), *parts])
        return self._columns[name]


class ActivationStore:
    """A finished store, opened for reading with :meth:`open`."""

    def __init__(self, root: Path, sites: dict[str, _Site], pairs: Collection[int] | None = None) -> None:
        self.root, self._sites, self._pairs = root, sites, None if pairs is None else sorted(set(pairs))

    @classmethod
    def open(cls, root: Path | str) -> ActivationStore:
        """Opens a store; only the manifests are read.

        Raises InputError where there is no store, a site is unfinished (without a manifest), or the origins differ.
        """
        root = Path(root)
        folders = sorted({path.parent for name in (MANIFEST, SHARDS) for path in root.glob(f"*/{name}")})
        if not folders:
            raise InputError(f"{root} holds no activations; make them with rmscope harvest.")
        if unfinished := [folder.name for folder in folders if not (folder / MANIFEST).exists()]:
            raise InputError(f"{root} is unfinished at {', '.join(unfinished)}; run the harvest again.")
        sites = {}
        for folder in folders:
            try:
                sites[folder.name] = _Site(folder, json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{folder / MANIFEST} is not a manifest; run the harvest again.") from error
        store = cls(root, sites)
        if any(site.manifest["identity"] != store.identity for site in sites.values()):
            raise InputError(f"The sites in {root} were not made together; harvest them into one new folder.")
        return store

    def only(self, pairs: Collection[int]) -> ActivationStore:
        """The same store, with training restricted to the rows of these pairs."""
        return ActivationStore(self.root, self._sites, pairs)

    @property
    def sites(self) -> list[str]:
        return list(self._sites)

    @property
    def identity(self) -> dict[str, Any]:
        """What the rows come from, as given to the writer, and the pairs that training is restricted to."""
        written = next(iter(self._sites.values())).manifest["identity"]
        return written if self._pairs is None else {**written, "only": content_hash(self._pairs)}

    def d(self, site: str) -> int:
        """Width of the stream; at ``both.L`` that of its two parts together."""
        return sum(self._site(part).manifest["d"] for part in parts_of(site))

    def tokens(self, site: str) -> int:
        """Stored rows of the site."""
        return self._site(site).manifest["total"]

    def rows(self, site: str, index: Int[Tensor, " k"]) -> Float[Tensor, "k d_model"]:
        """The rows at ``index`` (any order, repeats allowed) as float32, in the stream's own units."""
        if len(parts := parts_of(site)) > 1:
            return torch.cat([self.rows(part, index) for part in parts], 1)
        opened = self._site(site)
        ordered, order = torch.sort(index)
        if len(ordered) and (ordered[0] < 0 or ordered[-1] >= opened.starts[-1]):
            raise InputError(f"Row {int(ordered[-1])} is outside {site}, which holds {opened.starts[-1]} rows.")
        out = torch.empty(len(index), self.d(site))
        cuts = torch.searchsorted(ordered, torch.tensor(opened.starts)).tolist()
        for shard, (low, high) in enumerate(pairwise(cuts)):
            if high > low:
                out[order[low:high]] = opened.x(shard)[ordered[low:high] - opened.starts[shard]].float()
        return out

    def column(self, site: str, name: str) -> Int[Tensor, " n"]:
        """One of :data:`COLUMNS` over all rows of the site."""
        if name not in COLUMNS:
            raise InputError(f"{site} has no column {name}; it has {', '.join(COLUMNS)}.")
        return self._site(site).column(name)

    def response_rows(self, site: str) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """(the rows of the site that belong to responses, the place of each in its response, from 0 on)."""
        pair, region = (self.column(site, name).numpy() for name in ("pair", "region"))
        rows = np.flatnonzero(region > 0)
        response = pair[rows].astype(np.int64) * len(REGIONS) + region[rows]
        begins = np.r_[True, response[1:] != response[:-1]][: rows.size]
        start = np.maximum.accumulate(np.where(begins, np.arange(rows.size), 0))
        return rows, np.arange(rows.size) - start

    def training_mask(self, site: str) -> Bool[Tensor, " n"]:
        """Position > 0: the first token is an attention sink of huge norm and stays out of SAE training."""
        keep = self.column(site, "position") > 0
        return keep if self._pairs is None else keep & torch.isin(self.column(site, "pair"), torch.tensor(self._pairs))

    def training_tokens(self, sites: Sequence[str]) -> int:
        """Rows per epoch of training: all but the first token of each text.

        Raises InputError where the sites hold different tokens, or there are none.
        """
        if len({self.tokens(site) for site in sites}) != 1:
            raise InputError(f"The sites {', '.join(sites)} hold different tokens; harvest them in one pass.")
        if not (n := int(self.training_mask(sites[0]).sum())):
            raise InputError(f"{self.root} holds no tokens to train on after the first of each text.")
        return n

    def sample(self, site: str, n: int, generator: torch.Generator) -> Float[Tensor, "n d_model"]:
        """At most n different training rows, drawn at random, as float32."""
        kept = self.training_mask(site).nonzero().squeeze(1)
        return self.rows(site, kept[torch.randperm(len(kept), generator=generator)[:n]])

    def norm_scale(self, site: str) -> float:
        """s with mean |s x| = sqrt(d_model) over the training rows. Raises InputError where that is not a number."""
        opened, keep, norms = self._site(site), self.training_mask(site), 0.0
        for shard, (start, stop) in enumerate(pairwise(opened.starts)):
            for rows in opened.x(shard)[keep[start:stop]].split(8192):
                norms += float(rows.float().norm(dim=1).double().sum())
        if not norms > 0 or norms == float("inf"):
            raise InputError(f"{site} has no rows to train on, or their norms are not finite; check the harvest.")
        return float(self.d(site) ** 0.5 * int(keep.sum()) / norms)

    def training_batches(
        self, sites: Sequence[str], batch_size: int, epochs: int, seed: int, start: int = 0
    ) -> Iterator[dict[str, Float[Tensor, "batch d_model"]]]:
        """The same shuffled batches at all sites, from batch number ``start`` on; see :func:`shuffle_batches`."""
        kept = self.training_mask(sites[0]).nonzero().squeeze(1)
        for index in shuffle_batches(kept, batch_size, epochs, seed, start):
            yield {site: self.rows(site, index) for site in sites}

    def _site(self, name: str) -> _Site:
        name = parts_of(name)[0]
        if name not in self._sites:
            raise InputError(f"{self.root} holds no site {name}; it holds {', '.join(self._sites)}.")
        return self._sites[name]


def shuffle_batches(
    rows: Int[Tensor, " n"], batch_size: int, epochs: int, seed: int, start: int = 0
) -> Iterator[Int[Tensor, " batch"]]:
    """Batches of row numbers. The order of an epoch depends on (seed, epoch) only, so any batch can be the ``start``.

    Rows that do not fill the last batch of an epoch are left out of it. Fewer than ``batch_size`` rows make one batch.
    """
    size = min(batch_size, len(rows))
    per_epoch = len(rows) // size if size else 0
    for epoch in range(start // per_epoch if per_epoch else epochs, epochs):
        generator = torch.Generator().manual_seed((seed << 20) + epoch)
        order = rows[torch.randperm(len(rows), generator=generator)]
        first = max(0, start - epoch * per_epoch)
        yield from order[first * size : per_epoch * size].split(size)

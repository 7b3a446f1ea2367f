"""Several processes on one run folder, started by ``torchrun``: they share the units of the long stages.

Every process (rank) goes through the whole pipeline. Units of 64 pairs are dealt out in turn, and what a unit gives does not
depend on who makes it, so the tables are those of one process, byte for byte (but for rounding, where several ranks train
one SAE: ``sae/shares.py``). What a shared stage does beside its units, every rank does, with the same bytes. The first rank
alone does the other stages, and the others wait. Ranks share the folder and a process group, which only waits; those that
train one SAE have groups of their own, over which they add and gather tensors. If a rank dies, torchrun ends all. The next
start, with any number of processes, goes on with the units that are there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from rmscope.errors import InputError

LONGEST = timedelta(days=30)
"""How long a rank waits for the others: a stage of the first one may take days."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among several; rank 0 of 1 is alone."""

    rank: int = 0
    count: int = 1
    group: dist.ProcessGroup | None = None
    """The processes that these ranks are, where they are not all."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def has(self, number: int) -> bool:
        """Whether a unit is this rank's."""
        return number % self.count == self.rank

    def wait(self) -> None:
        """Returns once every rank has come here."""
        if self.count > 1:
            dist.barrier(self.group)

    def among(self, groups: Sequence[Sequence[int]]) -> Ranks:
        """This rank among those of its group. All ranks call it at once, with the same groups, each rank in one of them."""
        found = ALONE
        for members in groups:
            if len(members) > 1:
                backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
                group = dist.new_group(members, timeout=LONGEST, backend=backend)
                if self.rank in members:
                    found = Ranks(members.index(self.rank), len(members), group)
        return found

    def close(self) -> None:
        """Ends a group that :meth:`among` made."""
        if self.group is not None:
            dist.destroy_process_group(self.group)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of every rank's tensor, in the place of this one's. Its bytes are the same on all ranks."""
        if self.count > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def gather(self, x: Tensor) -> list[Tensor]:
        """Every rank's tensor. They may differ in length."""
        if self.count == 1:
            return [x]
        lengths = [torch.tensor([len(x)], device=x.device) for _ in range(self.count)]
        dist.all_gather(lengths, lengths[self.rank].clone(), group=self.group)
        padded = x.new_zeros(max(int(n) for n in lengths), *x.shape[1:])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in range(self.count)]
        if padded.numel():
            dist.all_gather(parts, padded, group=self.group)
        return [part[: int(n)] for part, n in zip(parts, lengths, strict=True)]


ALONE = Ranks()


@contextmanager
def ranks_of_torchrun() -> Iterator[Ranks]:
    """The ranks that torchrun started, or this process alone. Each rank takes the GPU of its number on the machine.

    Raises:
        InputError: there are GPUs, but fewer than ranks on this machine.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    local = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise InputError(
                f"There are {torch.cuda.device_count()} GPUs here and more processes; start torchrun with --nproc-per-node "
                f"{torch.cuda.device_count()}."
            )
        torch.cuda.set_device(local)
    dist.init_process_group("gloo", timeout=LONGEST)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()

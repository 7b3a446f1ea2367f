"""Sites: names of places in the residual stream, and the blocks they belong to.

``resid_post.L`` is the stream after block L (from 0), ``embed`` the stream before block 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rmscope.errors import InputError

Edit = Callable[[Float[Tensor, "rows width d"]], Float[Tensor, "rows width d"]]
"""Takes the stream at a site and returns the stream that the model goes on with."""


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """The model's blocks: its longest list of modules. Raises InputError where there is none."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        raise InputError(f"{type(model).__name__} has no list of blocks, so it has no residual stream to study.")
    return max(lists, key=len)


def site_index(site: str, n_blocks: int) -> int:
    """The block whose output the site is; -1 for ``embed``. Raises InputError that lists the sites of this PM."""
    if site == "embed":
        return -1
    head, _, number = site.rpartition(".")
    if head == "resid_post" and number.isdigit() and int(number) < n_blocks:
        return int(number)
    raise InputError(f"There is no site {site!r} in this PM; it has embed and resid_post.0 .. resid_post.{n_blocks - 1}.")


def default_sites(n_blocks: int) -> list[str]:
    """The sites at about one third and two thirds of the depth."""
    return [f"resid_post.{i}" for i in sorted({max(0, round(n_blocks * share) - 1) for share in (1 / 3, 2 / 3)})]


class StopForward(Exception):  # noqa: N818
    """Raised by a hook to end a forward pass early."""


def keep_stream(streams: dict[str, Tensor], site: str) -> Edit:
    """An edit that stores the stream in ``streams`` and leaves it as it is."""

    def edit(x: Tensor) -> Tensor:
        streams[site] = x
        return x

    return edit


@contextmanager
def edit_streams(blocks: nn.ModuleList, edits: dict[int, Edit], stop_after: int | None = None) -> Iterator[None]:
    """Within the context, ``edits[l]`` changes the stream after block ``l`` (-1: before block 0).

    The forward pass raises :class:`StopForward` after block ``stop_after``.
    """

    def hook(index: int) -> Callable[..., Any]:
        def after(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            stream, *rest = output if isinstance(output, tuple) else (output,)
            changed = edits[index](stream) if index in edits else stream
            if stop_after == index:
                raise StopForward
            return (changed, *rest) if isinstance(output, tuple) else changed

        return after

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            changed = edits[-1](args[0])
            args = (changed, *args[1:])
        else:
            kwargs["hidden_states"] = edits[-1](kwargs["hidden_states"])
        if stop_after == -1:
            raise StopForward
        return args, kwargs

    with ExitStack() as stack:
        if -1 in edits:
            stack.callback(blocks[0].register_forward_pre_hook(before, with_kwargs=True).remove)
        for index in {*edits, *([] if stop_after is None else [stop_after])} - {-1}:
            stack.callback(blocks[index].register_forward_hook(hook(index)).remove)
        yield


@contextmanager
def skip_blocks(
    blocks: nn.ModuleList, upto: int, stream: Float[Tensor, "rows width d"], gives_tuple: bool
) -> Iterator[None]:
    """Within the context, blocks 0 .. ``upto`` do not run, and the stream after block ``upto`` is ``stream``.

    The model's own forward still makes masks and positions and passes them to every later block, so resuming needs no
    code per architecture.
    """

    def give(*_args: Any, **_kwargs: Any) -> Any:
        return (stream,) if gives_tuple else stream

    originals = [(block, block.__dict__.get("forward")) for block in blocks[: upto + 1]]
    for block, _ in originals:
        block.forward = give
    try:
        yield
    finally:
        for block, own in originals:
            if own is None:
                del block.forward
            else:
                block.forward = own


def block_gives_tuple(blocks: nn.ModuleList, run: Callable[[], Any]) -> bool:
    """Whether a block returns a tuple rather than a tensor. ``run`` makes one forward pass."""
    seen: list[bool] = []
    handle = blocks[0].register_forward_hook(lambda _m, _i, out: seen.append(isinstance(out, tuple)))
    try:
        with torch.no_grad():
            run()
    finally:
        handle.remove()
    return seen[0]

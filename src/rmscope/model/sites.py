"""Sites: names of places in the residual stream, and the blocks they belong to."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rmscope.errors import InputError

Edit = Callable[[Float[Tensor, "rows width d"]], Float[Tensor, "rows width d"]]
"""Takes the stream at a site and gives what the model goes on with."""


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """The model's blocks: its longest list of modules. InputError where there is none."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        raise InputError(f"{type(model).__name__} holds no list of blocks, so it has no residual stream to study.")
    return max(lists, key=len)


def site_index(site: str, n_blocks: int) -> int:
    """The block whose output the site is; -1 for ``embed``. InputError lists the sites that exist."""
    if site == "embed":
        return -1
    head, _, number = site.rpartition(".")
    if head == "resid_post" and number.isdigit() and int(number) < n_blocks:
        return int(number)
    raise InputError(f"There is no site {site!r} in this PM; it has embed and resid_post.0 .. resid_post.{n_blocks - 1}.")


def default_sites(n_blocks: int) -> list[str]:
    """About one and two thirds of the depth."""
    return sorted({f"resid_post.{max(0, round(n_blocks * share) - 1)}" for share in (1 / 3, 2 / 3)}, key=_number)


def _number(site: str) -> int:
    return int(site.rpartition(".")[2])


class StopForward(Exception):  # noqa: N818
    """Raised by a hook once everything that was asked for has been seen."""


def _split(output: Any) -> tuple[Tensor, tuple[Any, ...] | None]:
    """A block's output as (stream, rest); rest is None where the block gives a plain tensor."""
    return (output[0], tuple(output[1:])) if isinstance(output, tuple) else (output, None)


@contextmanager
def edited(blocks: nn.ModuleList, edits: dict[int, Edit], stop_after: int | None = None) -> Any:
    """Within: the stream after block ``l`` passes through ``edits[l]``; the forward stops after ``stop_after``."""

    def hook(index: int) -> Callable[..., Any]:
        def after(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            stream, rest = _split(output)
            changed = edits[index](stream) if index in edits else stream
            if stop_after == index:
                raise StopForward
            return changed if rest is None else (changed, *rest)

        return after

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            changed = edits[-1](args[0])
            args = (changed, *args[1:])
        else:
            changed = kwargs["hidden_states"] = edits[-1](kwargs["hidden_states"])
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
def skipping(blocks: nn.ModuleList, upto: int, stream: Float[Tensor, "rows width d"], gives_tuple: bool) -> Any:
    """Within: blocks 0 .. ``upto`` do not run and the stream after block ``upto`` is ``stream``.

    The model's own forward still makes masks and positions and calls every block above with them, so replaying needs no
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


def gives_tuple(blocks: nn.ModuleList, run: Callable[[], Any]) -> bool:
    """Whether a block's output is a tuple; seen in one forward pass."""
    seen: list[bool] = []
    handle = blocks[0].register_forward_hook(lambda _m, _i, out: seen.append(isinstance(out, tuple)))
    try:
        with torch.no_grad():
            run()
    finally:
        handle.remove()
    return seen[0]

"""One thread for all that runs a PM: jobs wait in a short queue, and one too many is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import BoundedSemaphore
from typing import TypeVar

T = TypeVar("T")
WAITING = 2
"""Jobs that may wait for the one that runs."""


class BusyError(Exception):
    """The queue is full."""


class Worker:
    """Runs jobs one after another, in a thread of its own."""

    def __init__(self, waiting: int = WAITING) -> None:
        self._places = BoundedSemaphore(1 + waiting)
        self._thread = ThreadPoolExecutor(1, "rmscope-model")

    async def run(self, job: Callable[[], T]) -> T:
        """The job's result. Raises BusyError where the queue is full, and what the job raises."""
        if not self._places.acquire(blocking=False):
            raise BusyError
        future = self._thread.submit(job)
        future.add_done_callback(lambda _: self._places.release())
        return await asyncio.wrap_future(future)

    def stop(self) -> None:
        """Drops the jobs that wait."""
        self._thread.shutdown(wait=False, cancel_futures=True)

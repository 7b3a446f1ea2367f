"""What the app's addresses share: the runs, the templates, forms, and the thread of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from urllib.parse import parse_qs

from fastapi import Request
from fastapi.responses import HTMLResponse
from starlette.exceptions import HTTPException

from rmscope.app import bench as benches
from rmscope.app.library import Concept, Library, OpenRun, ScoredPair
from rmscope.app.pages import app_environment, render_page
from rmscope.app.worker import Worker

T = TypeVar("T")
MOST_BYTES = 600_000
"""The largest form that is read. The longest texts of the bench, 48,000 characters, fit however they are encoded: a
character takes at most 12 bytes."""
Form = Mapping[str, list[str]]


class Web:
    """What the addresses share: the runs, the templates, the thread of the model, and the bench that is loaded."""

    def __init__(self, library: Library, worker: Worker) -> None:
        self.library, self.worker = library, worker
        self.env = app_environment()
        self.bench: tuple[OpenRun, benches.Bench] | None = None

    def open(self, slug: str) -> OpenRun:
        """The run of an address, or 404."""
        run = self.library.open(slug)
        if run is None:
            raise HTTPException(404, "There is no such run here.")
        return run

    def concept(self, run: OpenRun, number: int) -> Concept:
        """The concept of an address, or 404."""
        concept = run.concept(number)
        if concept is None:
            raise HTTPException(404, "This run has no such concept.")
        return concept

    def pair(self, run: OpenRun, name: str) -> ScoredPair:
        """The pair of an address, or 404."""
        if name not in run.pairs:
            raise HTTPException(404, "This run has no such pair.")
        return run.pairs[name]

    def page(self, template: str, slug: str = "", status: int = 200, **values: Any) -> HTMLResponse:
        """A page. ``slug`` names the run that it is of."""
        several = len(self.library.entries) > 1
        text = render_page(self.env, template, **{"slug": slug, "several": several, "home": f"/r/{slug}", **values})
        return HTMLResponse(text, status)

    def loaded(self, run: OpenRun) -> benches.Bench | None:
        """The run's bench, where its PM is loaded."""
        own, bench = self.bench or (None, None)
        return bench if own is run else None

    async def on_bench(self, run: OpenRun, job: Callable[[benches.Bench], T]) -> T:
        """The result of a job with the run's PM, which is loaded first. Only one run's PM is loaded at a time."""

        def work() -> T:
            bench = self.loaded(run)
            if bench is None:
                self.bench = None  # the other PM's memory is free before the next one is loaded
                bench = benches.Bench(run.open_again())
                self.bench = run, bench
            return job(bench)

        return await self.worker.run(work)


async def read_form(request: Request) -> Form:
    """The fields of a form. Raises 413 where it is too large."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            raise HTTPException(413, f"This form is larger than {MOST_BYTES // 1000} kB.")
    try:
        return parse_qs(body.decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=500)
    except ValueError as error:
        raise HTTPException(400, "This form has too many fields.") from error


def is_part(request: Request) -> bool:
    """Whether htmx asks for a part of a page."""
    return "hx-request" in request.headers and "hx-history-restore-request" not in request.headers


def numbers_of(values: list[str]) -> list[int]:
    return sorted({int(v) for v in values if v.isdecimal() and len(v) < 9})

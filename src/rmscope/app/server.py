"""The app: addresses to pages. Pages come from what a run stored. Only forms that are posted run its PM, in one thread."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import RedirectResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from rmscope.app.bench_pages import add_bench
from rmscope.app.catalogue import Query, listings
from rmscope.app.drawings import effect_histograms
from rmscope.app.feature_pages import add_features
from rmscope.app.library import Concept, Library
from rmscope.app.pages import static_files
from rmscope.app.pair_pages import add_pairs
from rmscope.app.security import Guard
from rmscope.app.side_by_side import agreement, in_sd, rows_of
from rmscope.app.web import Web, is_part, read_form
from rmscope.app.worker import BusyError, Worker
from rmscope.errors import InputError
from rmscope.report.figures import extent
from rmscope.report.page import concept_view, headline, planted_view, site_view, written_view

BUSY = "The model is busy with other requests. Try again in a few seconds."


def create_app(library: Library, host: str = "127.0.0.1", worker: Worker | None = None) -> Guard:
    """The app for some runs, behind its guard. ``host`` is the address that it is bound to."""
    web = Web(library, worker or Worker())

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        web.worker.stop()

    app = FastAPI(title="rmscope", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    _add_pages(app, web)
    add_bench(app, web)
    add_features(app, web)
    add_pairs(app, web)
    _add_errors(app, web)
    return Guard(app, host)  # type: ignore[arg-type]


def _add_pages(app: FastAPI, web: Web) -> None:
    static = static_files()

    @app.get("/static/{name}")
    def file(name: str) -> Response:
        if name not in static:
            raise HTTPException(404, "There is no such file.")
        text, kind = static[name]
        return Response(text, media_type=f"{kind}; charset=utf-8")

    @app.get("/")
    def home() -> Response:
        entries = list(web.library.entries.values())
        return RedirectResponse(f"/r/{entries[0].slug}") if len(entries) == 1 else web.page("runs.html", entries=entries)

    @app.get("/compare")
    def compare(a: str, b: str) -> Response:
        runs = [web.open(slug) for slug in (a, b)]
        listed = [in_sd(run) for run in runs]
        rows = rows_of(*listed)
        span = extent((v for row in rows for c in (row.first, row.second) if c for v in c["in_sd"]), [0.0], 0.04)
        told = [
            {
                "slug": slug,
                "home": f"/r/{slug}",
                "model": run.data["model"]["name"],
                "scores": run.data["scores"],
                "content": sum(c["reported"] and c["group"] == "content" for c in concepts),
            }
            for slug, run, concepts in zip((a, b), runs, listed, strict=True)
        ]
        return web.page("side_by_side.html", runs=told, rows=rows, span=span, agree=agreement(*runs))

    @app.get("/r/{slug}")
    def overview(slug: str, request: Request) -> Response:
        run, query = web.open(slug), Query.of(request.query_params)
        concepts = run.concepts()
        values = {"query": query, "listings": listings(concepts, query), "bound": run.data["sites"][0]["bound"]}
        if is_part(request):
            return web.page("concept_lists.html", slug, **values)
        named = [{**c, "name": c["title"]} for c in concepts]
        data = {"base": None, "why_no_base": "", **run.data, "concepts": named}
        return web.page(
            "overview.html",
            slug,
            data=data,
            head=headline(data),
            concepts=concept_view(data),
            written=written_view(data),
            sites=[site_view(site) for site in data["sites"]],
            planted=_without_features(planted_view(data)),
            all_flags=sorted({flag for c in concepts for flag in c["flags"]}),
            all_sites=run.run.sites,
            **values,
        )

    @app.get("/r/{slug}/concepts/{number}")
    def concept(slug: str, number: int) -> Response:
        run = web.open(slug)
        row = web.concept(run, number)
        view = concept_view({**run.data, "concepts": run.rows})
        cues = [p["name"] for p in run.data["planted"] or [] if number in (p.get("concepts") or [])]
        numbers = [other["concept"] for other in run.rows]
        place = numbers.index(number)
        examples = sorted(row.get("examples") or [], key=lambda e: -abs(e["delta_before"] - e["delta_after"]))
        return web.page(
            "concept.html",
            slug,
            data=run.data,
            c=row,
            view=view,
            members=run.members(row),
            examples=examples,
            cues=cues,
            before=numbers[place - 1] if place else None,
            after=numbers[place + 1] if place + 1 < len(numbers) else None,
            histograms=effect_histograms(run.effects(number), "joint effect"),
        )

    @app.post("/r/{slug}/concepts/{number}/label")
    async def label(slug: str, number: int, request: Request) -> Response:
        form = await read_form(request)

        def write() -> Concept:
            run = web.open(slug)
            values = {name: form.get(name, [""])[0] for name in ("name", "note", "star")}
            run.labels.write(web.concept(run, number), values["name"], bool(values["star"]), values["note"])
            return web.concept(run, number)

        row = await run_in_threadpool(write)
        if is_part(request):
            return web.page("concept_label.html", slug, c=row, saved=True)
        return RedirectResponse(f"/r/{slug}/concepts/{number}", 303)

    @app.get("/r/{slug}/glossary")
    def glossary(slug: str) -> Response:
        return web.page("glossary.html", slug, data=web.open(slug).data)


def _without_features(view: dict[str, Any] | None) -> dict[str, Any] | None:
    """The report's view of the planted truth, without links to rows of features, which the app does not have."""
    return None if view is None else view | {"known": set()}


def _add_errors(app: FastAPI, web: Web) -> None:
    def message(request: Request, status: int, text: str) -> Response:
        return web.page("notice.html" if is_part(request) else "message.html", status=status, text=text)

    @app.exception_handler(HTTPException)
    def http(request: Request, error: HTTPException) -> Response:
        return message(request, error.status_code, "There is no such page." if error.detail == "Not Found" else error.detail)

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, _error: RequestValidationError) -> Response:
        return message(request, 404, "There is no such page.")

    @app.exception_handler(InputError)
    def bad_input(request: Request, error: InputError) -> Response:
        return message(request, 400, str(error))

    @app.exception_handler(Exception)
    def failed(request: Request, error: Exception) -> Response:
        return message(request, 500, f"This failed: {type(error).__name__}: {error}")

    @app.exception_handler(BusyError)
    def busy(request: Request, _error: BusyError) -> Response:
        response = message(request, 503, BUSY)
        response.headers["retry-after"] = "3"
        return response

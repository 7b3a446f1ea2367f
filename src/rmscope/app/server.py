"""The app: addresses to pages. Pages come from what a run stored. Only forms that are posted run its PM, in one thread."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar
from urllib.parse import parse_qs

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from rmscope.app import bench as benches
from rmscope.app.catalogue import Query, listings
from rmscope.app.drawings import effect_histograms
from rmscope.app.library import Concept, Library, OpenRun, ScoredPair
from rmscope.app.pages import app_environment, render_page, static_files
from rmscope.app.pairs import LedgerStrip, PairQuery, find_pairs, ledger_strips, ledgers_of
from rmscope.app.security import Guard
from rmscope.app.worker import BusyError, Worker
from rmscope.errors import InputError
from rmscope.report.page import concept_view, headline, planted_view, site_view, written_view

T = TypeVar("T")
MOST_BYTES = 600_000
"""The largest form that is read. The longest texts of the bench, 48,000 characters, fit however they are encoded: a
character takes at most 12 bytes."""
BUSY = "The model is busy with other requests. Try again in a few seconds."
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


def create_app(library: Library, host: str = "127.0.0.1", worker: Worker | None = None) -> Guard:
    """The app for some runs, behind its guard. ``host`` is the address that it is bound to."""
    web = Web(library, worker or Worker())

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        web.worker.stop()

    app = FastAPI(title="rmscope", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    _add_pages(app, web)
    _add_bench(app, web)
    _add_pairs(app, web)
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


def _add_bench(app: FastAPI, web: Web) -> None:
    @app.get("/r/{slug}/bench")
    def bench(slug: str, pair: str = "") -> Response:
        run = web.open(slug)
        typed: dict[str, Any] = {}
        if pair:
            known = web.pair(run, pair).pair
            typed = {"typed_prompt": benches.write_turns(known.prompt), "typed": [known.chosen, known.rejected]}
        return web.page("bench.html", slug, data=run.data, results=None, **typed)

    @app.post("/r/{slug}/concepts/{number}/pairs")
    async def concept_pairs(slug: str, number: int, request: Request) -> Response:
        run = await run_in_threadpool(web.open, slug)
        row = await run_in_threadpool(web.concept, run, number)
        contexts = await web.on_bench(run, lambda b: run.pairs_that_move(row, b.run))
        examples = [context.model_dump() for context in contexts]
        return web.page(
            "concept_pairs.html" if is_part(request) else "concept_pairs_page.html", slug, c=row, examples=examples
        )

    @app.post("/r/{slug}/bench/load")
    async def load(slug: str) -> Response:
        run = await run_in_threadpool(web.open, slug)
        bench = web.loaded(run)
        if bench is None:
            bench = await web.on_bench(run, lambda loaded: loaded)
        return web.page("bench_ready.html", slug, rm=bench.rm)

    @app.post("/r/{slug}/bench")
    async def measure(slug: str, request: Request) -> Response:
        form = await read_form(request)
        run = await run_in_threadpool(web.open, slug)
        asked = _request(form)
        concepts = {c["concept"]: c for c in await run_in_threadpool(run.concepts)}
        listed = list(concepts) if form.get("all") else None
        results = await web.on_bench(run, lambda b: b.measure(asked, listed))
        rows = result_rows(results, run.run.noise_floor)
        template = "bench_results.html" if is_part(request) else "bench.html"
        return web.page(template, slug, data=run.data, asked=asked, results=results, concepts=concepts, rows=rows)

    @app.post("/r/{slug}/bench/ablate")
    async def ablate(slug: str, request: Request) -> Response:
        form = await read_form(request)
        run = await run_in_threadpool(web.open, slug)
        asked, known = _request(form), {c["concept"]: c for c in await run_in_threadpool(run.concepts)}
        chosen = [number for number in numbers_of(form.get("concept", [])) if number in known]
        joint = await web.on_bench(run, lambda b: b.ablate(asked, chosen)) if chosen else []
        names = [known[number]["title"] for number in chosen]
        part = is_part(request)
        return web.page(
            "bench_joint.html" if part else "bench_joint_page.html", slug, data=run.data, joint=joint, names=names
        )


def _add_pairs(app: FastAPI, web: Web) -> None:
    @app.get("/r/{slug}/pairs")
    def pairs(slug: str, request: Request) -> Response:
        run, query = web.open(slug), PairQuery.of(request.query_params)
        listing = find_pairs(run.pairs.values(), query)
        return web.page("pair_list.html" if is_part(request) else "pairs.html", slug, query=query, listing=listing)

    @app.get("/r/{slug}/pair/{name:path}")
    def pair(slug: str, name: str) -> Response:
        run = web.open(slug)
        row = web.pair(run, name)
        ledgers, loaded = ledgers_of(run.run, name), web.loaded(run) is not None
        return web.page("pair.html", slug, row=row, ledgers=ledgers, loaded=loaded, sides=None)

    @app.post("/r/{slug}/pair/{name:path}")
    async def measure(slug: str, name: str, request: Request) -> Response:
        form = await read_form(request)
        run = await run_in_threadpool(web.open, slug)
        row = await run_in_threadpool(web.pair, run, name)
        concepts = {c["concept"]: c for c in await run_in_threadpool(run.concepts)}
        ledgers = await run_in_threadpool(ledgers_of, run.run, name)

        def job(bench: benches.Bench) -> tuple[list[benches.Measurement], dict[str, list[LedgerStrip]]]:
            sides = bench.measure_pair(row.pair, list(concepts) if form.get("all") else None)
            return sides, {one["site"]: ledger_strips(run.run, bench, row.pair, one["site"]) for one in ledgers}

        sides, strips = await web.on_bench(run, job)
        return web.page(
            "pair_figures.html" if is_part(request) else "pair.html",
            slug,
            row=row,
            ledgers=ledgers,
            loaded=False,
            sides=sides,
            strips=strips,
            concepts=concepts,
            effects=pair_effects(sides, run.run.noise_floor),
        )

    @app.post("/r/{slug}/ablate/{name:path}")
    async def ablate(slug: str, name: str, request: Request) -> Response:
        form = await read_form(request)
        run = await run_in_threadpool(web.open, slug)
        row = await run_in_threadpool(web.pair, run, name)
        known = {c["concept"]: c for c in await run_in_threadpool(run.concepts)}
        chosen = [number for number in numbers_of(form.get("concept", [])) if number in known]
        joint = await web.on_bench(run, lambda b: b.ablate_pair(row.pair, chosen)) if chosen else []
        template = "pair_joint.html" if is_part(request) else "pair_joint_page.html"
        return web.page(template, slug, row=row, joint=joint, names=[known[number]["title"] for number in chosen])


def _request(form: Form) -> benches.Request:
    baselines = form.get("baselines", []) if form.get("use_baselines") else []
    return benches.Request.of(form.get("prompt", [""])[0], form.get("completion", []), baselines)


def result_rows(results: benches.Measurements, noise_floor: float) -> dict[str, list[tuple[int, list[float]]]]:
    """(concept, effect in each completion), the largest first: those that are shown, and those that also move baselines.

    What moves no reward by more than the noise floor counts as 0 and is in neither list.
    """
    rows = _effects(results.completions, noise_floor).items()
    ordered = sorted(rows, key=lambda row: (-max(map(abs, row[1])), row[0]))
    left_out = [row for row in ordered if results.moves_baseline and results.is_left_out(row[0])]
    return {"shown": [row for row in ordered if row not in left_out], "left_out": left_out}


def pair_effects(sides: Sequence[benches.Measurement], noise_floor: float) -> list[tuple[int, list[float]]]:
    """(concept, effect on chosen, on rejected), those that move Δr most first; what is below the noise floor is left out."""
    return sorted(_effects(sides, noise_floor).items(), key=lambda row: (-abs(row[1][0] - row[1][1]), row[0]))


def _effects(measured: Sequence[benches.Measurement], noise_floor: float) -> dict[int, list[float]]:
    """The effects of each concept on some texts, where one of them is above the noise floor."""
    concepts = {concept for m in measured for concept in m.effects}
    effects = {concept: [m.effects.get(concept, 0.0) for m in measured] for concept in concepts}
    return {concept: values for concept, values in effects.items() if max(map(abs, values)) > noise_floor}


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

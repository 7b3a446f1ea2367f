"""The addresses of pairs: the list, and each pair on the run's PM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool

from rmscope.app import bench as benches
from rmscope.app.bench_pages import effects_above, names_of, strengths_of
from rmscope.app.library import OpenRun
from rmscope.app.pairs import LedgerStrip, PairQuery, find_pairs, ledger_strips, ledgers_of
from rmscope.app.web import Web, is_part, read_form


def add_pairs(app: FastAPI, web: Web) -> None:
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
        return web.page("pair.html", slug, row=row, ledgers=ledgers, loaded=loaded, sides=None, **beside(run, name))

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
            **beside(run, name),
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
        chosen = strengths_of(form, known)
        joint = await web.on_bench(run, lambda b: b.ablate_pair(row.pair, chosen)) if chosen else []
        template = "pair_joint.html" if is_part(request) else "pair_joint_page.html"
        return web.page(template, slug, row=row, joint=joint, names=names_of(known, chosen))


def beside(run: OpenRun, name: str) -> dict[str, Any]:
    """The ids of the pairs before and after one, in the data's order; empty where there is none."""
    names = list(run.pairs)
    place = names.index(name)
    return {"before": names[place - 1] if place else "", "after": names[place + 1] if place + 1 < len(names) else ""}


def pair_effects(sides: Sequence[benches.Measurement], noise_floor: float) -> list[tuple[int, list[float]]]:
    """(concept, effect on chosen, on rejected), those that move Δr most first; what is below the noise floor is left out."""
    return sorted(effects_above(sides, noise_floor).items(), key=lambda row: (-abs(row[1][0] - row[1][1]), row[0]))

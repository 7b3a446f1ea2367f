"""The addresses of the bench: typed completions on the run's PM."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool

from rmscope.app import bench as benches
from rmscope.app.features import with_token_effects
from rmscope.app.library import Concept
from rmscope.app.saved import save_experiment
from rmscope.app.web import Form, Web, is_part, numbers_of, read_form

STRONGEST = 2.0
"""The largest strength that a concept can be given."""


def add_bench(app: FastAPI, web: Web) -> None:
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

        def job(bench: benches.Bench) -> list[dict[str, Any]]:
            contexts = run.pairs_that_move(row, bench.run)
            return with_token_effects(bench, run, contexts, bench.members[number])

        examples = await web.on_bench(run, job)
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

    @app.post("/r/{slug}/bench/save")
    async def save(slug: str, request: Request) -> Response:
        form = await read_form(request)
        run = await run_in_threadpool(web.open, slug)
        rewards = [float(r) for r in form.get("reward", []) if is_number(r)]
        path = await run_in_threadpool(save_experiment, run.folder, form.get("name", [""])[0], _request(form), rewards)
        template = "bench_saved.html" if is_part(request) else "bench_saved_page.html"
        return web.page(template, slug, path=path, folder=run.folder)

    @app.post("/r/{slug}/bench/ablate")
    async def ablate(slug: str, request: Request) -> Response:
        form = await read_form(request)
        run = await run_in_threadpool(web.open, slug)
        asked, known = _request(form), {c["concept"]: c for c in await run_in_threadpool(run.concepts)}
        chosen = strengths_of(form, known)
        joint = await web.on_bench(run, lambda b: b.ablate(asked, chosen)) if chosen else []
        names = names_of(known, chosen)
        part = is_part(request)
        return web.page(
            "bench_joint.html" if part else "bench_joint_page.html", slug, data=run.data, joint=joint, names=names
        )


def _request(form: Form) -> benches.Request:
    baselines = form.get("baselines", []) if form.get("use_baselines") else []
    return benches.Request.of(form.get("prompt", [""])[0], form.get("completion", []), baselines)


def strengths_of(form: Form, known: Mapping[int, Concept]) -> dict[int, float]:
    """By concept that is ticked, the strength that is left of it: 0 ablates it, 1 leaves it, 2 doubles it."""
    chosen = {}
    for number in numbers_of(form.get("concept", [])):
        if number in known:
            given = form.get(f"strength-{number}", ["0"])[0]
            strength = float(given) if is_number(given) else 0.0
            chosen[number] = min(STRONGEST, strength) if strength > 0 else 0.0
    return chosen


def is_number(text: str) -> bool:
    """Whether a field of a form is a finite number."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def names_of(known: Mapping[int, Concept], strengths: Mapping[int, float]) -> list[tuple[str, float]]:
    """(name, strength) of the concepts that are ticked."""
    return [(known[number]["title"], strength) for number, strength in strengths.items()]


def result_rows(results: benches.Measurements, noise_floor: float) -> dict[str, list[tuple[int, list[float]]]]:
    """(concept, effect in each completion), the largest first: those that are shown, and those that also move baselines.

    What moves no reward by more than the noise floor counts as 0 and is in neither list.
    """
    rows = effects_above(results.completions, noise_floor).items()
    ordered = sorted(rows, key=lambda row: (-max(map(abs, row[1])), row[0]))
    left_out = [row for row in ordered if results.moves_baseline and results.is_left_out(row[0])]
    return {"shown": [row for row in ordered if row not in left_out], "left_out": left_out}


def effects_above(measured: Sequence[benches.Measurement], noise_floor: float) -> dict[int, list[float]]:
    """The effects of each concept on some texts, where one of them is above the noise floor."""
    concepts = {concept for m in measured for concept in m.effects}
    effects = {concept: [m.effects.get(concept, 0.0) for m in measured] for concept in concepts}
    return {concept: values for concept, values in effects.items() if max(map(abs, values)) > noise_floor}

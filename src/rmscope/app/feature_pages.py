"""The addresses of single features: the list, each feature, and what its PM says of it."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from rmscope.app.bench import Bench
from rmscope.app.drawings import effect_histograms
from rmscope.app.features import (
    Causes,
    FeatureQuery,
    causes,
    find_features,
    fresh_effects,
    holders,
    pairs_that_move,
    quality,
    stored_rows,
    studies_of,
    vocabulary_of,
    with_token_effects,
)
from rmscope.app.library import OpenRun
from rmscope.app.web import Web, is_part, numbers_of, read_form
from rmscope.report.page import effect_span
from rmscope.run.dashboard import dashboard


def add_features(app: FastAPI, web: Web) -> None:
    @app.get("/r/{slug}/features")
    def features(slug: str, request: Request) -> Response:
        run, query = web.open(slug), FeatureQuery.of(request.query_params)
        values: dict[str, Any] = {"query": query, "listing": find_features(run, query), "bounds": bounds_of(run)}
        template = "feature_list.html" if is_part(request) else "features_page.html"
        return web.page(template, slug, all_sites=run.run.sites, **values)

    @app.get("/r/{slug}/features/{site}/{number}")
    def feature(slug: str, site: str, number: int, panes: str = "") -> Response:
        run = web.open(slug)
        check_feature(run, site, number)
        row: dict[str, Any] = {**run.features.get((site, number), {}), "site": site, "feature": number}
        return web.page(
            "feature.html",
            slug,
            f=row,
            concept=holders(run.concepts()).get((site, number)),
            view=next(s for s in bounds_of(run) if s["site"] == site),
            histograms=effect_histograms(fresh_effects(run, site, number), f"effect of feature {number}"),
            points=quality(run, site, number),
            examples=row.get("examples") or [],
            studies=studies_of(run, site, number),
            others={"before": number - 1, "after": number + 1 if number + 1 < run.saes[site].m else -1},
            shown=_dashboard(run, site, number) if panes or run.has_firings(site) else None,
        )

    @app.get("/r/{slug}/features/{site}/{number}/panes")
    def panes(slug: str, site: str, number: int) -> Response:
        run = web.open(slug)
        check_feature(run, site, number)
        return web.page("feature_panes.html", slug, shown=_dashboard(run, site, number), f={"site": site, "feature": number})

    @app.post("/r/{slug}/features/{site}/{number}/pairs")
    async def pairs(slug: str, site: str, number: int, request: Request) -> Response:
        await read_form(request)
        run = await run_in_threadpool(web.open, slug)
        await run_in_threadpool(check_feature, run, site, number)

        def job(bench: Bench) -> list[dict[str, Any]]:
            contexts = pairs_that_move(run, bench, site, number)
            return with_token_effects(bench, run, contexts, {site: [number]})

        examples = await web.on_bench(run, job)
        values: dict[str, Any] = {
            "c": {"mean_effect": run.features.get((site, number), {}).get("mean_effect")},
            "what": "feature",
        }
        template = "concept_pairs.html" if is_part(request) else "feature_pairs_page.html"
        return web.page(template, slug, examples=examples, f={"site": site, "feature": number}, **values)

    @app.post("/r/{slug}/features/{site}/{number}/causes")
    async def why(slug: str, site: str, number: int, request: Request) -> Response:
        form = await read_form(request)
        run = await run_in_threadpool(web.open, slug)
        await run_in_threadpool(check_feature, run, site, number)
        rows = [row for row in numbers_of(form.get("row", [])) if row < stored_rows(run, site)]
        if len(rows) != 1:
            raise HTTPException(400, "This form names no stored token.")
        found: Causes = await web.on_bench(run, lambda bench: causes(run, bench, site, number, rows[0]))
        template = "feature_causes.html" if is_part(request) else "feature_causes_page.html"
        return web.page(template, slug, causes=found, f={"site": site, "feature": number})


def check_feature(run: OpenRun, site: str, number: int) -> None:
    """404 where the run has no such feature."""
    if site not in run.run.sites or not 0 <= number < run.saes[site].m:
        raise HTTPException(404, "This run has no such feature.")


def bounds_of(run: OpenRun) -> list[dict[str, Any]]:
    """By site, what the bars of features need: one scale for the frozen features of all sites, and the bound."""
    span = effect_span(row for row in run.features.values() if "mean_effect" in row)
    return [{"site": site["site"], "bound": site["bound"], "span": span} for site in run.data["sites"]]


def _dashboard(run: OpenRun, site: str, number: int) -> Any:
    return dashboard(run.firings(site), run.saes[site], number, run.texts, vocabulary_of(run, site))

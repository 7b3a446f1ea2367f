"""The app's pages: templates of its own on top of the report's."""

from __future__ import annotations

from dataclasses import asdict
from importlib.resources import files
from typing import Any
from urllib.parse import quote

from jinja2 import ChoiceLoader, Environment, PackageLoader

from rmscope.app import bench, catalogue, drawings, features, library, pairs
from rmscope.report.page import environment
from rmscope.run import labels

HERE = files("rmscope.app")
HTMX_SETTINGS = (
    '{"includeIndicatorStyles": false, "allowEval": false, "allowScriptTags": false, "selfRequestsOnly": true, '
    '"historyCacheSize": 0, "refreshOnHistoryMiss": true, "responseHandling": [{"code": ".*", "swap": true}]}'
)


def app_environment() -> Environment:
    """The report's environment (escaping is on), with the app's templates first."""
    env = environment()
    assert env.loader is not None
    env.loader = ChoiceLoader([PackageLoader("rmscope.app"), env.loader])
    env.globals.update(HTMX_SETTINGS=HTMX_SETTINGS, draw=drawings, GROUPS=library.GROUPS)
    env.globals.update(SORTS=catalogue.SORTS, BENCH=bench, LABELS=labels, PAIRS=pairs, FEATURES=features)
    env.filters.update(part_and_value=lambda share: (share["part"], share["value"]), in_address=in_address)
    env.filters.update(asked=lambda query: asdict(query).items())
    return env


def in_address(name: str) -> str:
    """A name as one part of an address, slashes and all."""
    return quote(name, safe="")


def style_sheet() -> str:
    """The report's styles, then the app's."""
    report = files("rmscope.report").joinpath("templates/style.css").read_text("utf-8")
    return report + HERE.joinpath("static/app.css").read_text("utf-8")


def static_files() -> dict[str, tuple[str, str]]:
    """The text and media type of each file that pages load, by name. Nothing else is served."""
    kinds = {"app.js": "text/javascript", "htmx.min.js": "text/javascript", "icon.svg": "image/svg+xml"}
    own = {name: (HERE.joinpath("static", name).read_text("utf-8"), kind) for name, kind in kinds.items()}
    return {"app.css": (style_sheet(), "text/css"), **own}


def render_page(env: Environment, template: str, **values: Any) -> str:
    """A template, filled in; what a page cannot hold (NUL, halves of characters) is replaced."""
    page = env.get_template(template).render(**values)
    return page.replace("\0", "\ufffd").encode("utf-8", "replace").decode("utf-8")

"""How fast the app answers: pages from what a run stored, and the bench on the run's PM.

Serves the runs over loopback and asks for each kind of page in turn. Prints one JSON line per kind: the first answer, the
median and the 95th percentile in milliseconds. Without a folder, it makes a run of a small random PM with 1,000 pairs and
4,608 features, 400 of them frozen: how long a page takes depends on these, not on the PM.

usage: app.py [RUN] [--times N] [--bench N]      the bench answers N completions of 60 words; 0 leaves it out
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import httpx2 as httpx
import uvicorn

from rmscope.app.library import Library
from rmscope.app.server import create_app
from rmscope.run.run import Run
from rmscope.sae import SaeConfig

WORDS = (
    "the",
    "a",
    "of",
    "to",
    "and",
    "in",
    "is",
    "you",
    "it",
    "that",
    "for",
    "on",
    "with",
    "water",
    "time",
    "way",
    "when",
    "more",
)


def make_run(folder: Path) -> Path:
    """A finished run of a small random PM."""
    from tests.model.small import saved_pm
    from tests.run.small import settings

    pm, out = saved_pm(folder / "pm"), folder / "run"
    Path(pm, "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs(1000)))
    sae = SaeConfig(d_sae=2304, k=8, tokens=50_000, batch_size=1024)
    changes = {
        "limit": 1000,
        "frozen": 400,
        "screen": 200,
        "confirm_prompts": 4,
        "seeds": 1,
        "sites": ["resid_post.1", "resid_post.2"],
    }
    Run.create(settings(pm, out).model_copy(update={**changes, "sae": sae})).go()
    return out


def pairs(n: int) -> Iterator[dict[str, str]]:
    """Prompts and responses of random common words, 20 to 60 words long."""
    rng = random.Random(0)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high))).capitalize() + "."

    for _ in range(n):
        yield {"prompt": text(5, 20), "chosen": text(20, 60), "rejected": text(20, 60)}


@contextmanager
def served(folder: Path) -> Iterator[httpx.Client]:
    """A client of the app on loopback."""
    config = uvicorn.Config(create_app(Library(folder)), port=0, log_level="error")  # type: ignore[arg-type]
    server, listening = uvicorn.Server(config), config.bind_socket()
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    base = f"http://127.0.0.1:{listening.getsockname()[1]}"
    with httpx.Client(base_url=base, headers={"origin": base}, timeout=600) as client:
        try:
            yield client
        finally:
            server.should_exit = True
    thread.join(30)


def milliseconds(ask: Callable[[], httpx.Response]) -> float:
    began = time.perf_counter()
    answer = ask()
    answer.raise_for_status()
    return 1000 * (time.perf_counter() - began)


def told(kind: str, first: float, values: list[float], **more: object) -> None:
    cuts = statistics.quantiles(values, n=20, method="inclusive") if len(values) > 1 else [first]
    row = {"kind": kind, "first_ms": round(first), "median_ms": round(statistics.median(values)), "p95_ms": round(cuts[-1])}
    print(json.dumps({**row, "requests": len(values), **more}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--bench", type=int, default=20)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.run or make_run(Path(temporary))
        run = Run.open(folder)
        slug = next(iter(Library(folder).entries))
        home = f"/r/{slug}"
        frozen = [(site, j) for site in run.sites for j in run.features(site)["feature"]]
        concepts, names = run.concepts["concept"].to_list(), run.scores["pair"].to_list()
        size = {"pairs": len(names), "features": sum(run.sae(site).m for site in run.sites), "frozen": len(frozen)}
        print(json.dumps({"kind": "run", **size, "concepts": len(concepts)}), flush=True)
        rng = random.Random(0)
        kinds: dict[str, Callable[[], str]] = {
            "overview": lambda: home,
            "overview, searched": lambda: f"{home}?text={rng.choice(WORDS)}",
            "concept": lambda: f"{home}/concepts/{rng.choice(concepts)}",
            "features": lambda: f"{home}/features?page={rng.randint(1, 1 + len(frozen) // 50)}",
            "feature, with its texts": lambda: "{}/features/{}/{}?panes=1".format(home, *rng.choice(frozen)),
            "pairs": lambda: f"{home}/pairs?sort=size&page={rng.randint(1, 1 + len(names) // 50)}",
            "pairs, searched": lambda: f"{home}/pairs?text={rng.choice(WORDS)}",
            "pair": lambda: f"{home}/pair/{quote(rng.choice(names), safe='')}",
        }
        with served(folder) as client:
            if not concepts:
                kinds.pop("concept")
            if not frozen:
                kinds.pop("feature, with its texts")
            for kind, address in kinds.items():
                first = milliseconds(lambda address=address: client.get(address()))
                told(kind, first, [milliseconds(lambda a=address: client.get(a())) for _ in range(given.times)])
            began = time.perf_counter()
            listed = frozen[:400]
            for site, j in listed:
                client.get(f"{home}/features/{site}/{j}?panes=1").raise_for_status()
            print(
                json.dumps(
                    {"kind": "all feature pages", "pages": len(listed), "seconds": round(time.perf_counter() - began, 1)}
                )
            )
            if given.bench:
                loading = milliseconds(lambda: client.post(f"{home}/bench/load"))
                asked = [
                    {"prompt": "How do I boil an egg?", "completion": [" ".join(rng.choices(WORDS, k=60))]}
                    for _ in range(given.bench)
                ]
                values = [milliseconds(lambda form=form: client.post(f"{home}/bench", data=form)) for form in asked]
                told("bench, one completion of 60 words", values[0], values, loading_ms=round(loading))
                ticked = {**asked[-1], "concept": [str(c) for c in concepts[:2]]}
                again = [milliseconds(lambda: client.post(f"{home}/bench/ablate", data=ticked)) for _ in range(given.bench)]
                told("two concepts ticked on it", again[0], again)


if __name__ == "__main__":
    main()

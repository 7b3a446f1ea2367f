"""A realistic sample of the report's data from a seeded generator; the texts were written for this file."""

from __future__ import annotations

import math
import random
from typing import Any

PROMPTS = (
    "Why does my sourdough loaf come out dense in the middle even though the crust looks well browned?",
    "Which is the quicker way from the station to the museum? I think the tram is better than the bus.",
    "How often should I water a small lemon tree that stands by a south window in winter?",
)
GOOD = (
    "Thank you for asking. A dense middle usually means that the dough was not proofed long enough, "
    "so let it grow by half before shaping. No problem if the first is flat; the next will be better.",
    "The tram runs every ten minutes and stops at the museum. You're right that the bus is slower.",
    "Water it once the top two centimetres of soil are dry.\nIn winter that is about every ten days.",
)
BAD = (
    "I don't know. Bread is baked everywhere, and it goes nicely with soup. It goes nicely with soup.",
    "I really don't know about that. See https://www.lantern.example.org/maps for more.",
    "Lemons are yellow. I have no idea how often, but plants like light and a friendly word now and then.",
)
UP = (
    ("Thank", " Thank", " thanks"),
    (" problem", " No", " welcome"),
    (" right", " correct", "You"),
    (" you", " agree"),
)
DOWN = ((" know", " don", "'t"), (" https", "://", "www"), (" idea", " no"), (".", "\n", " "))

REPORTED = 24


def pieces(text: str, rng: random.Random, words: tuple[str, ...]) -> list[list[Any]]:
    """The text in token-like pieces; those that match a word are active."""
    tokens = [" " * (i > 0) + word for i, word in enumerate(text.split(" "))]
    stems = {w.strip().lower() for w in words if w.strip()}
    fires = [any(t.strip(" .,").lower().startswith(stem) for stem in stems) for t in tokens]
    return [[t, round(rng.uniform(0.3, 1.0), 3) if f else 0.0] for t, f in zip(tokens, fires, strict=True)]


def example(rng: random.Random, words: tuple[str, ...], effect: float) -> dict[str, Any]:
    fitting = [i for i in range(len(PROMPTS)) if any(a for t in (GOOD[i], BAD[i]) for _, a in pieces(t, rng, words))]
    i = rng.choice(fitting or [0])
    sides = []
    for side, text, base in (("chosen", GOOD[i], 1.2), ("rejected", BAD[i], 0.3)):
        tokens = pieces(text, rng, words)
        fires = any(a for _, a in tokens)
        before = base + rng.gauss(0, 0.3)
        after = before - effect * rng.uniform(0.7, 1.3) if fires else before
        sides.append({"side": side, "tokens": tokens, "before": before, "after": after, "fires": fires})
    return {
        "prompt": PROMPTS[i],
        "delta_before": sides[0]["before"] - sides[1]["before"],
        "delta_after": sides[0]["after"] - sides[1]["after"],
        "sides": sides,
    }


def feature(rng: random.Random, rank: int, effect: float, reported: bool, words: tuple[str, ...]) -> dict[str, Any]:
    half = abs(effect) * rng.uniform(0.12, 0.3) if reported else abs(effect) * 1.4
    shares = sorted((rng.uniform(0.02, 0.4) for _ in words), reverse=True)
    flags = [name for name, p in (("lexical", 0.35), ("ending", 0.1), ("length", 0.08)) if rng.random() < p]
    return {
        "feature": rng.randrange(4608),
        "rank": rank,
        "reported": reported,
        "mean_effect": effect,
        "ci_low": effect - half,
        "ci_high": effect + half * rng.uniform(0.8, 1.2),
        "q": rng.choice((0.0002, 0.0041, 0.018)) if reported else rng.uniform(0.06, 0.9),
        "n": rng.randrange(21, 140),
        "mean_diff": effect * rng.uniform(-0.1, 0.5),
        "prefers": reported and rng.random() < 0.3,
        "unrelated": rng.uniform(0.0, 0.6),
        "to_mean": effect * 0.6 if rng.random() < 0.1 else None,
        "fire_prompt": rng.uniform(0, 0.05),
        "fire_chosen": rng.uniform(0.01, 0.2),
        "fire_rejected": rng.uniform(0.01, 0.2),
        "sign_consistency": rng.uniform(0.9, 1.0) if reported else rng.uniform(0.5, 0.9),
        "length_corr": rng.uniform(-0.3, 0.3),
        "flags": flags,
        "tokens": [[w, s] for w, s in zip(words, shares, strict=True)],
        "examples": [example(rng, words, effect) for _ in range(3)],
    }


def site(rng: random.Random, name: str, scale: float) -> dict[str, Any]:
    features = []
    for rank in range(1, 32):
        size = scale * math.exp(-rank / 12)
        up = rank % 5 in (0, 1, 3)
        words = (UP if up else DOWN)[rank // 2 % 4]
        features.append(feature(rng, rank, size if up else -size, rank <= REPORTED, words))
    effects = [rng.gauss(0, 1) * 10 ** rng.uniform(-4, -0.6) for _ in range(900)]
    return {
        "site": name,
        "saes": [
            {
                "site": name,
                "architecture": "topk",
                "d_sae": 4608,
                "k": 32,
                "fvu": 0.213,
                "l0": 32.0,
                "dead": 0.061,
                "tokens": 1_840_000,
                "curve": [[s, 0.2 + 0.8 * math.exp(-s / 180)] for s in range(0, 1500, 25)],
            }
        ],
        "quality": {
            "spearman_median": 0.934,
            "spearman_low": 0.921,
            "spearman_high": 0.947,
            "spearman_p10": 0.861,
            "spearman_features": 0.951,
            "sign_agreement": 0.972,
            "relative_error": 0.183,
            "top_missed": 0.042,
            "top_missed_high": 0.061,
            "responses": 96,
            "features": 4608,
        },
        "missed": {"value": 0.02, "low": 0.0, "high": 0.06, "n": 100},
        "scatter": [[e * rng.gauss(0.95, 0.2) + rng.gauss(0, 0.0004), e] for e in effects],
        "ledger": {
            "pairs": 240,
            "shares": [
                {"part": "features", "value": 0.713, "low": 0.668, "high": 0.757},
                {"part": "error", "value": 0.246, "low": 0.205, "high": 0.29},
                {"part": "remainder", "value": 0.043, "low": 0.012, "high": 0.074},
                {"part": "gap", "value": -0.002, "low": -0.004, "high": 0.0},
            ],
            "largest_gap": 0.0071,
            "open": 2,
            "example": None,
        },
        "explained": explained() if scale < 1 else None,
        "frozen": 100,
        "eligible": 71,
        "reported": REPORTED,
        "flagged": 9,
        "prefers": 5,
        "bound": 0.062,
        "power": "With 152 confirm prompts, effects below 0.11 reward are missed more often than not.",
        "features": features,
    }


def explained() -> dict[str, Any]:
    def figure(value: float) -> dict[str, float]:
        return {"value": value, "low": value - 0.05, "high": value + 0.04}

    def curve(top: float, grid: tuple[int, ...]) -> list[dict[str, Any]]:
        return [{"k": k, "donors": figure(top * k / (k + 60)), "mean": figure(top * k / (k + 90))} for k in grid]

    coarse = (0, 8, 32, 128, 512)
    return {
        "pairs": 64,
        "evaluation": {"delta_r2": figure(0.97)},
        "controls": {name: figure(0.2) for name in ("pca", "random", "noise", "length", "error", "error_mean")},
        "curves": {
            "keep": curve(0.9, (0, 4, 8, 16, 32, 64, 128, 256, 512)), "unflagged": curve(0.8, coarse),
            "keep_pca": curve(0.7, coarse), "keep_coordinates": curve(0.6, coarse),
        },
        "ablated": [{"k": k, "list": figure(0.4), "matched": figure(0.03)} for k in (1, 16, 64)],
    }  # fmt: skip


def plants(sites: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = (
        ("thanks", "phrase", 1, 1.31, "single", ""),
        ("youre_right", "phrase", 1, 0.92, "single", ""),
        ("dont_know", "phrase", -1, -1.18, "single", ""),
        ("url", "url", -1, -0.84, "group", ""),
        (
            "repeat",
            "repeat_sentence",
            -1,
            -0.42,
            "none",
            "no feature detects it",
        ),
        ("agree", "agree", 1, 0.09, "none", "not learned"),
    )
    made = []
    for i, (name, kind, sign, ate, hit, why) in enumerate(rows):
        signed = [f for f in sites[0]["features"] if f["mean_effect"] * sign > 0][i:]
        match = signed[: {"single": 1, "group": 3, "none": 2}[hit]]
        found = hit != "none"
        made.append(
            {
                "name": name,
                "kind": kind,
                "sign": sign,
                "ate": {"value": ate, "low": ate - 0.14, "high": ate + 0.15},
                "words_alone": {"value": ate / 9, "low": ate / 9 - 0.1, "high": ate / 9 + 0.1} if kind != "agree" else None,
                "learned": name != "agree",
                "found": found,
                "hit": hit,
                "site": sites[0]["site"],
                "features": [f["feature"] for f in match],
                "rank": match[-1]["rank"] if match else None,
                "effect": match[0]["mean_effect"] if match else None,
                "f1": 0.94 if found else 0.61,
                "localises": 0.82 if hit == "single" else None,
                "mediated": {"value": 0.71, "low": 0.58, "high": 0.83} if found else None,
                "matched": 0.08 if found else None,
                "why": why,
            }
        )
    return made


def text(planted: bool) -> dict[str, Any]:
    """What text statistics explain: fourteen terms."""

    def figure(value: float) -> dict[str, float]:
        return {"value": value, "low": value - 0.06, "high": value + 0.05}

    names = ["“thank you”", "words", "“no problem at all”", "links", *(f"“word {i}”" for i in range(10))]
    return {
        "terms": [{"name": n, "coefficient": 0.8 / (i + 1) * (-1) ** i, "prompts": 84 - i} for i, n in enumerate(names)],
        "explained": figure(0.58), "agreement": figure(0.9), "pairs": 230, "text": figure(0.6), "concepts": figure(0.71),
        "both": figure(0.78), "adds": {}, "confirm_pairs": 240,
        "cues": {"thanks": "“thank you”", "repetition": None} if planted else {},
    }  # fmt: skip


def sample(planted: bool = True, seed: int = 0) -> dict[str, Any]:
    rng = random.Random(seed)
    sites = [site(rng, "resid_post.3", 0.62), site(rng, "resid_post.7", 1.05)]
    edges = [-4 + 0.4 * i for i in range(26)]
    counts = [round(150 * math.exp(-(((low + 0.2 - 0.6) / 1.3) ** 2) / 2)) for low in edges[:-1]]
    return {
        "title": "zoo:planted on demo pairs",
        "command": "rmscope demo",
        "made": "2026-11-22",
        "model": {
            "name": "zoo:planted",
            "blocks": 12,
            "d_model": 576,
            "identity": "sha256:5f1c0b7e90a64d7c",
            "rendering": "hh transcript, no EOS",
            "preflight": [
                {"check": "head", "status": "ok", "detail": "1 output, loaded from the checkpoint", "mend": ""},
                {"check": "batches", "status": "ok", "detail": "at most 2.1e-6 apart", "mend": ""},
                {
                    "check": "read position",
                    "status": "warn",
                    "detail": "pad = eos; the reward is read from lengths",
                    "mend": "give it a pad token of its own",
                },
            ],
        },
        "data": {
            "name": "demo pairs",
            "pairs": 1204,
            "prompts": 602,
            "splits": {"fit": 601, "confirm": 304, "measure": 299},
            "left_out": {"longer than the context": 3},
        },
        "scores": {
            "accuracy": {"value": 0.683, "low": 0.656, "high": 0.709},
            "length_only": 0.541,
            "mean_chosen": 0.871,
            "mean_rejected": 0.214,
            "sd_delta": 1.24,
            "histogram": {"edges": edges, "counts": counts},
        },
        "noise_floor": 2.6e-6,
        "text": text(planted),
        "sites": sites,
        "planted": plants(sites) if planted else None,
        "footer": {
            "seconds": 341.7,
            "versions": {"rmscope": "0.1.0", "torch": "2.13.0", "transformers": "5.2.0"},
            "seed": 0,
        },
    }


ENDS = {"": 0.0, "_low": -0.05, "_high": 0.05}
"""A value and the ends of its interval, by the end of the column's name."""


def concept(
    rng: random.Random, number: int, name: str, effect: float, form: bool = False, reported: bool = True
) -> dict[str, Any]:
    row = feature(rng, number + 1, effect, reported, (name.split()[0],) if not form else (".",))
    own = {key: row[key] for key in row if key not in ("feature", "tokens", "fire_prompt", "fire_chosen", "fire_rejected")}
    return {
        **own,
        "flags": ["ending"] if form else [],
        "concept": number,
        "name": name,
        "form": form,
        "site": "diff.7",
        "features": [3 * number, 3 * number + 1],
        "weights": [0.5, 0.25],
        "elsewhere": [{"site": "diff.3", "features": [number]}] if number % 2 else [],
        "fire_pairs": 0.4,
        "null_random": abs(effect) / 4,
        "null_real": abs(effect) / 3,
        "confirm_effect": 1.1 * effect,
        **{f"by_{donor}{end}": (0.7 * effect + shift) for donor in ("place", "token") for end, shift in ENDS.items()},
        "seed_effects": [0.9 * effect, None],
        "seeds_held": 2,
    }


def with_difference(data: dict[str, Any]) -> dict[str, Any]:
    """The sample as of a PM whose base is known: concepts, and what training wrote."""
    rng = random.Random(1)

    def figure(value: float) -> dict[str, float]:
        return {"value": value, "low": value - 0.04, "high": value + 0.03}

    for one, block, share in zip(data["sites"], (3, 7), (0.42, 0.81), strict=True):
        one["site"] = f"diff.{block}"
        one["written"] = {
            "written": figure(share), "explained": figure(0.95), "explained_of_written": figure(0.9),
            "by_concepts": figure(0.75), "by_others": figure(0.05), "by_first": {"3": figure(0.5), "5": figure(0.92)},
            "pairs": 24,
        }  # fmt: skip
    data["base"] = {
        "name": "zoo:smollm2",
        "first": 2,
        "changes": [0.0, 0.0] + [0.01] * 10,
        "blocks": [{"block": b, "written": b / 12, "at_own_tokens": b / 12 * (1 - b / 12)} for b in range(2, 12)],
    }
    data["text"]["adds"] = {"0": figure(0.2), "1": figure(0.0), "2": figure(0.01), "3": figure(0.05)}
    data["reported_set"] = {
        "completeness": figure(0.8), "content": figure(0.6), "rest": figure(0.2), "all_features": figure(0.85), "pairs": 24,
        "resampled": {"diff.7": 0.93},
        "without": {"0": figure(0.3), "1": figure(0.1)},
    }  # fmt: skip
    data["concepts"] = [
        concept(rng, 0, "“thank you” · “no problem”", 0.81),
        concept(rng, 1, "repeated text", -0.62),
        concept(rng, 2, "the end of the text", 0.33, form=True),
        concept(rng, 3, "links", -0.21) | {"flags": ["seeds"]},
        concept(rng, 4, "“paper”", 0.04, reported=False),
        concept(rng, 6, "“the”", 0.5) | {"flags": ["nonspecific"]},
        concept(rng, 5, "“so”", 0.11, reported=False) | {"flags": ["direction"], "null_random": 0.13, "null_real": 0.2},
    ]
    return data

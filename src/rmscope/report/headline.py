"""What the page says first: which features are reported, up and down, and how sure that is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rmscope.report.formatting import effect, number, real

Feature = dict[str, Any]
LEADERS = 3
"""Features named on each side of the headline."""
CLEAR_SHARE = 0.15
"""A token that takes less of a feature's firings than this does not name the feature."""
VISIBLE = str.maketrans({"\n": "↵", "\t": "⇥", "\r": "␍"})


def visible(token: Any) -> str:
    """A token with its white space made visible: outer spaces as middle dots, line breaks as arrows."""
    text = str(token).translate(VISIBLE)
    core = text.strip(" ")
    return text.replace(" ", "·") if not core else text.replace(core, "\0").replace(" ", "·").replace("\0", core)


def is_reported(feature: Feature) -> bool:
    return bool(feature.get("reported")) and real(feature.get("mean_effect")) is not None


def told(feature: Feature) -> tuple[Any, Any, Any, Any]:
    """Effect, its interval and q as they are told: of what is reported for its strong firings, those there."""
    names = ("mean_effect", "ci_low", "ci_high", "q")
    if "strong" in (feature.get("flags") or []):
        names = ("strong_effect", "strong_low", "strong_high", "q_strong")
    return tuple(feature.get(name) for name in names)  # type: ignore[return-value]


def by_effect(features: list[Feature]) -> list[Feature]:
    """Largest |mean effect| first."""
    return sorted(features, key=lambda f: -abs(real(f.get("mean_effect")) or 0.0))


def name_of(feature: Feature) -> str:
    """The label, else up to two tokens that take a clear share of the firings, else the feature's number."""
    if feature.get("label"):
        return f"“{feature['label']}”"
    names: list[str] = []
    for token, share in feature.get("tokens") or []:
        text = str(token).strip().translate(VISIBLE)
        if text and (real(share) or 0) >= CLEAR_SHARE and text.lower() not in (n.lower() for n in names):
            names.append(text)
    return "“" + " / ".join(names[:2]) + "”" if names else f"feature {feature.get('feature')}"


@dataclass(frozen=True, slots=True)
class Group:
    """The reported features of one sign, over all sites."""

    count: int
    names: list[str]
    """The leaders, without doubles."""
    largest: tuple[str, str]
    """The strongest one's mean effect and its interval, written out."""
    in_sd: str
    """Its size in SD(Δr)."""
    fewest: int
    """The smallest number of fresh prompts that any of them rests on."""


def group(features: list[Feature], sd: float | None) -> Group | None:
    if not features:
        return None
    ordered = by_effect(features)
    names = list(dict.fromkeys(name_of(f) for f in ordered))[:LEADERS]
    first = ordered[0]
    value = real(first.get("mean_effect"))
    share = abs(value) / sd if value is not None and sd else None
    return Group(
        count=len(features),
        names=names,
        largest=effect(first.get("mean_effect"), first.get("ci_low"), first.get("ci_high")),
        in_sd=number(share),
        fewest=min(int(real(f.get("n")) or 0) for f in features),
    )


@dataclass(frozen=True, slots=True)
class Headline:
    reported: int
    listed: int
    """Reported features that the data holds in full; a run may list only the strongest."""
    frozen: int
    flagged: int
    """How many of those listed carry a flag."""
    sites: int
    up: Group | None
    down: Group | None


def headline(data: dict[str, Any]) -> Headline:
    sites = data.get("sites") or []
    features = [f for site in sites for f in site.get("features") or [] if is_reported(f)]
    sd = real((data.get("scores") or {}).get("sd_delta"))
    return Headline(
        reported=max(len(features), sum(int(real(site.get("reported")) or 0) for site in sites)),
        listed=len(features),
        frozen=sum(int(real(site.get("frozen")) or 0) for site in sites),
        flagged=sum(bool(f.get("flags")) for f in features),
        sites=len(sites),
        up=group([f for f in features if f["mean_effect"] >= 0], sd),
        down=group([f for f in features if f["mean_effect"] < 0], sd),
    )

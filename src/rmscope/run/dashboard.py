"""What the page of a feature shows beside its effects: where it fires, what fires with it, and which words it writes.

The evidence stage keeps the text of every stored token, and the vocabulary of every frozen feature. So a page needs the run
folder alone, and no PM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from rmscope.io import write_table
from rmscope.model.base import whole_stream
from rmscope.model.reward_model import RewardModel
from rmscope.model.site_names import BOTH, kind_of, needs_base
from rmscope.run.data import TOKENS, VOCABULARY, RunData
from rmscope.run.firings import FiringText, SiteFirings
from rmscope.sae.base import Sae

WORDS, NEIGHBOURS, SHOWN_TOKENS = 8, 8, 12
"""How many words a feature writes up and down, and how many neighbours and tokens are shown."""
Texts = Mapping[int, str]
"""The text of each token id."""


@dataclass(frozen=True, slots=True)
class Neighbour:
    """Another feature of the site: the cosine of both decoder rows, and the correlation of both activations over tokens."""

    feature: int
    cosine: float
    correlation: float


@dataclass(frozen=True, slots=True)
class ShownText:
    """Tokens around a peak, with the activation on each as a share of the feature's maximum."""

    tokens: list[tuple[str, float]]
    peak: int
    row: int
    """The stored row of the peak."""
    value: float
    """The activation at the peak."""
    low: float
    """The lower end of the interval that the text stands for; below 0 for the texts of largest activations."""


@dataclass(frozen=True, slots=True)
class Dashboard:
    """Where one feature fires, and what it is beside."""

    rate: float
    """The share of stored tokens on which it fires."""
    stride: int
    """One of so many stored texts was read."""
    maximum: float
    histogram: tuple[list[float], list[int]]
    """(edges of the bars, tokens in each)."""
    tokens: list[tuple[str, float]]
    """(token, its share of the feature's activation), largest first."""
    texts: list[ShownText]
    by_decoder: list[Neighbour]
    by_firing: list[Neighbour]
    words: tuple[list[tuple[str, float]], list[tuple[str, float]]] | None
    """(word, logit for one unit of activation): those that it writes up and down; None where it is not known."""


def keep_texts(run: RunData) -> None:
    """Writes the text of every stored token, and the vocabulary of every frozen feature."""
    ids = torch.cat([run.store.column(site, "token") for site in run.sites]).unique().tolist()
    texts = [run.rm.tokenizer.decode([int(i)]) for i in ids]
    folder = run.folder / "evidence"
    write_table(folder / TOKENS, pl.DataFrame({"token": ids, "text": texts}, schema={"token": pl.Int64, "text": pl.String}))
    matrix, rows = unembedding(run.rm, run.sites), []
    for site in run.sites:
        features = run.features(site)["feature"].to_list() if matrix is not None else []
        for feature, direction in zip(features, directions(run.sae(site), site, features), strict=True):
            assert matrix is not None
            rows += [(site, feature, text, logit) for text, logit in words(run.rm, matrix, direction)]
    schema = {"site": pl.String, "feature": pl.Int64, "text": pl.String, "logit": pl.Float64}
    write_table(folder / VOCABULARY, pl.DataFrame(rows, schema=schema, orient="row"))


def directions(sae: Sae, site: str, features: Sequence[int]) -> Float[Tensor, "n d"]:
    """What each feature adds to the whole stream for one unit of activation."""
    W = sae.W_dec[list(features)].detach().float().cpu()
    return whole_stream(site, W, torch.zeros_like(W)) if kind_of(site) == BOTH else W


def unembedding(rm: RewardModel, sites: Sequence[str] = ()) -> Float[Tensor, "vocabulary d"] | None:
    """The matrix from the stream to the logits of the next token, with the gain of the last norm; None where there is none.

    A PM's own checkpoint has no output matrix. Where a decoder's is tied to its embeddings, these are it: those of the base
    where ``sites`` need it, else the PM's own. The scale of the last norm depends on the text, so it is left out: logits
    compare words of one feature, not features.
    """
    if not rm.causal or not getattr(rm.model.config.get_text_config(), "tie_word_embeddings", False):
        return None
    base = rm.base if any(needs_base(site) for site in sites) else None
    of = rm.model if base is None else base.model
    matrix = of.get_input_embeddings().weight.detach().float().cpu()
    last = [m for m in of.base_model.children() if getattr(getattr(m, "weight", None), "shape", None) == (rm.d_model,)]
    return matrix * gain_of(last[-1], rm.d_model) if last and matrix.shape[1] == rm.d_model else None


@torch.no_grad()
def gain_of(norm: torch.nn.Module, d: int) -> Float[Tensor, " d"]:
    """What a norm multiplies each coordinate by, measured: some multiply by their weight, Gemma's by 1 + weight."""
    weight = next(norm.parameters())
    x = torch.ones(d)
    x[1::2] = -1  # of mean 0 and length 1 a coordinate
    there, back = (norm((sign * x)[None].to(weight)).float().cpu()[0] for sign in (1, -1))
    return (there - back) / 2 * x  # without the norm's bias


def words(rm: RewardModel, matrix: Float[Tensor, "vocabulary d"], direction: Float[Tensor, " d"]) -> list[tuple[str, float]]:
    """The tokens whose logits a direction raises most, then those that it lowers most, against the mean of all tokens."""
    logits = matrix @ direction
    logits = logits - logits.mean()
    order = torch.cat([logits.topk(WORDS).indices, logits.topk(WORDS, largest=False).indices])
    return [(rm.tokenizer.decode([int(i)]), float(logits[i])) for i in order]


def dashboard(firings: SiteFirings, sae: Sae, feature: int, texts: Texts, vocabulary: pl.DataFrame) -> Dashboard:
    """The dashboard of one feature. ``vocabulary`` has the columns feature, text and logit of its site."""
    _, values = firings.of(feature)
    top = float(values.max(initial=0.0))
    sums = dict[str, float]()
    for token, total in firings.token_sums(feature).items():
        sums[texts[token]] = sums.get(texts[token], 0.0) + total
    shares = sorted(((text, total / float(values.sum())) for text, total in sums.items()), key=lambda one: -one[1])
    own = vocabulary.filter(pl.col("feature") == feature).select("text", "logit").rows()
    middles, counts = firings.histogram(feature)
    half = middles[0] if middles else 0.0
    cosine = (normalize(sae.W_dec.detach().float(), dim=1) @ normalize(sae.W_dec[feature].detach().float(), dim=0)).numpy()
    correlation = firings.correlations(feature)

    def nearest(by: np.ndarray) -> list[Neighbour]:
        order = [int(j) for j in np.argsort(-by, kind="stable") if j != feature and by[j] > 0][:NEIGHBOURS]
        return [Neighbour(j, float(cosine[j]), float(correlation[j])) for j in order]

    return Dashboard(
        rate=firings.rate(feature),
        stride=firings.stride,
        maximum=top,
        histogram=([m - half for m in middles] + [top] if middles else [], counts),
        tokens=shares[:SHOWN_TOKENS],
        texts=[_shown(firings, text, texts, top) for text in firings.firing_texts(feature)],
        by_decoder=nearest(cosine),
        by_firing=nearest(correlation),
        words=(own[:WORDS], own[WORDS:]) if own else None,
    )


def _shown(firings: SiteFirings, text: FiringText, texts: Texts, top: float) -> ShownText:
    levels = (text.values / top).round(3).tolist()
    tokens = [texts[int(t)] for t in firings.token_ids(text.rows)]
    blank = next((i for i, (t, level) in enumerate(zip(tokens, levels, strict=True)) if t.strip() or level), 0)
    shown = list(zip(tokens, levels, strict=True))[blank:]
    return ShownText(shown, text.peak - blank, int(text.rows[text.peak]), float(text.values[text.peak]), text.low)

"""What each feature fires on, counted over the stored activations: rates, means, top tokens, and four flags.

``dense``: it fires on more than 10 % of response tokens. ``outlier``: at least half of |d_j|² is on the 1 % of dimensions
with the largest variance. ``lexical``: which token it is predicts f_j with a held-out R² of at least .8. ``position``: the
token's index predicts f_j with at least .5. Position 0 is left out of everything: it is often an attention sink.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy import sparse
from torch import Tensor

from rmscope.activations.store import ActivationStore
from rmscope.sae.base import Sae
from rmscope.sae.stored import CHUNK, active_chunks
from rmscope.statistics import Array

DENSE, OUTLIER, LEXICAL, POSITION = 0.10, 0.5, 0.8, 0.5


@dataclass(frozen=True, slots=True)
class FeatureStatistics:
    """Per feature: firing rates by region [m], flags; the means of f [m] and x [d] over response tokens."""

    fire_prompt: Array
    fire_chosen: Array
    fire_rejected: Array
    f_mean: Float[Tensor, " m"]
    x_mean: Float[Tensor, " d"]
    flags: dict[str, Array]
    by_token: sparse.csr_matrix
    """Σ f over response tokens by (token id, feature), for the tokens that a feature fires on most."""

    def flags_of(self, feature: int) -> list[str]:
        return [name for name, has in self.flags.items() if has[feature]]

    def having(self, flag: str) -> list[int]:
        """The features with a flag."""
        return [int(j) for j in np.flatnonzero(self.flags[flag])]

    def top_tokens(self, feature: int, decode: Callable[[int], str], n: int = 5) -> list[tuple[str, float]]:
        """(token text, its share of the feature's activation), largest first; equal texts are joined."""
        column = self.by_token[:, feature].tocoo()
        texts: dict[str, float] = defaultdict(float)
        for token, share in zip(column.row, column.data / column.data.sum(), strict=True):
            texts[decode(int(token))] += float(share)
        return sorted(texts.items(), key=lambda item: -item[1])[:n]


def feature_statistics(store: ActivationStore, sae: Sae, site: str, normal_form: Callable[[int], int]) -> FeatureStatistics:
    """Reads a site's stored tokens once. ``normal_form`` joins token ids that differ in case."""
    keep = np.flatnonzero(store.column(site, "position").numpy() > 0)
    token, pair, position, region = (store.column(site, n).numpy()[keep] for n in ("token", "pair", "position", "region"))
    parts = []
    total, squares = torch.zeros(2, store.d(site)).double()
    for start, x, active in active_chunks(store, sae, site, keep):
        parts.append((active.token.numpy() + start, active.feature.numpy(), active.value.numpy()))
        response = x[torch.from_numpy(region[start : start + CHUNK] > 0)].double()
        total += response.sum(0)
        squares += response.square().sum(0)
    row, feature, value = (np.concatenate(each) for each in zip(*parts, strict=True))
    counts = [np.bincount(feature[region[row] == r], minlength=sae.m) for r in (0, 1, 2)]
    fire = [count / max(1, (region == r).sum()) for r, count in enumerate(counts)]
    in_response, n_response = region[row] > 0, int((region > 0).sum())
    f_mean = np.bincount(feature[in_response], value[in_response], sae.m) / max(1, n_response)
    x_mean, variance = total / n_response, squares / n_response - (total / n_response) ** 2
    top = variance.topk(max(1, store.d(site) // 100)).indices
    W = sae.W_dec
    normal = np.array([normal_form(int(t)) for t in range(int(token.max()) + 1)])
    held_out = (pair % 2).astype(bool)
    flags = {
        "dense": (counts[1] + counts[2]) / max(1, n_response) > DENSE,
        "outlier": (W[:, top].square().sum(1) / W.square().sum(1).clamp_min(1e-12)).numpy() >= OUTLIER,
        "lexical": _held_out_r2(normal[token], row, feature, value, held_out, sae.m) >= LEXICAL,
        "position": _held_out_r2(position, row, feature, value, held_out, sae.m) >= POSITION,
    }
    at = (token[row][in_response], feature[in_response])
    by_token = sparse.csr_matrix((value[in_response], at), shape=(normal.size, sae.m))
    return FeatureStatistics(fire[0], fire[1], fire[2], torch.from_numpy(f_mean).float(), x_mean.float(), flags, by_token)


def firings(store: ActivationStore, sae: Sae, site: str, features: Sequence[int]) -> Bool[Array, "tokens n"]:
    """On which stored tokens each of ``features`` fires."""
    keep = np.flatnonzero(store.column(site, "position").numpy() > 0)
    column = np.full(sae.m, -1)
    column[list(features)] = np.arange(len(features))
    fires = np.zeros((keep.size, len(features)), dtype=bool)
    for start, _, active in active_chunks(store, sae, site, keep):
        at = column[active.feature.numpy()]
        fires[active.token.numpy()[at >= 0] + start, at[at >= 0]] = True
    return fires


def _held_out_r2(key: Array, row: Array, feature: Array, value: Array, held_out: Array, m: int) -> Array:
    """R² [m] on the held-out tokens of predicting f_j by its mean at the same ``key`` on the other tokens."""
    size, test = int(key.max()) + 1, held_out[row]
    train_sum, test_sum = (
        sparse.csr_matrix((value[part], (key[row][part], feature[part])), shape=(size, m)) for part in (~test, test)
    )
    train_n, test_n = (np.bincount(key[part], minlength=size) for part in (~held_out, held_out))
    predicted = sparse.diags(1.0 / np.maximum(train_n, 1)) @ train_sum
    squared = np.bincount(feature[test], value[test].astype(float) ** 2, m)
    product = np.asarray(test_sum.multiply(predicted).sum(0)).ravel()
    again = np.asarray((sparse.diags(test_n.astype(float)) @ predicted.power(2)).sum(0)).ravel()
    n = max(1, test_n.sum())
    variance = squared - n * (np.bincount(feature[test], value[test], m) / n) ** 2
    residual = squared - 2 * product + again
    return np.where(variance > 0, 1 - residual / np.maximum(variance, 1e-12), 0.0)

"""What each feature fires on, counted over the stored activations: rates, means, top tokens, and flags that follow.

Flags (METHOD, "Ranking a feature"): ``dense`` fires on more than 10 % of response tokens; ``outlier`` at least half of
|d_j|^2 lies on the 1 % of dimensions with the largest variance; ``lexical`` the token's identity predicts f_j with a
held-out R^2 of at least .8; ``position`` the position does with at least .5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy import sparse
from torch import Tensor

from rmscope.activations.store import ActivationStore
from rmscope.sae.base import Sae

DENSE, OUTLIER, LEXICAL, POSITION = 0.10, 0.5, 0.8, 0.5
CHUNK = 4096


@dataclass(frozen=True, slots=True)
class FeatureStatistics:
    """Per feature: firing rates by region [m], flags; the means of f [m] and x [d] over response tokens."""

    fire_prompt: np.ndarray
    fire_chosen: np.ndarray
    fire_rejected: np.ndarray
    f_mean: Float[Tensor, " m"]
    x_mean: Float[Tensor, " d"]
    flags: dict[str, np.ndarray]
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
        total = column.data.sum()
        texts: dict[str, float] = {}
        for token, value in zip(column.row, column.data, strict=True):
            text = decode(int(token))
            texts[text] = texts.get(text, 0.0) + float(value / total)
        return sorted(texts.items(), key=lambda item: -item[1])[:n]


def feature_statistics(store: ActivationStore, sae: Sae, site: str, normal_form: Callable[[int], int]) -> FeatureStatistics:
    """One reading of a site's stored tokens (position 0 left out). ``normal_form`` joins token ids that differ in case."""
    token, pair, position, region = (store.column(site, n).numpy() for n in ("token", "pair", "position", "region"))
    keep = np.flatnonzero(position > 0)
    rows, features, values = [], [], []
    total, squares = torch.zeros(store.d(site)).double(), torch.zeros(store.d(site)).double()
    n_response = int((region[keep] > 0).sum())
    for start in range(0, keep.size, CHUNK):
        index = torch.from_numpy(keep[start : start + CHUNK])
        x = store.rows(site, index)
        active = sae.active(x)
        rows.append(active.token.numpy() + start)
        features.append(active.feature.numpy())
        values.append(active.value.numpy())
        response = x[torch.from_numpy(region[keep[start : start + CHUNK]] > 0)].double()
        total += response.sum(0)
        squares += response.square().sum(0)
    row, feature, value = np.concatenate(rows), np.concatenate(features), np.concatenate(values)
    at = keep[row]
    fire = [np.bincount(feature[region[at] == r], minlength=sae.m) / max(1, (region[keep] == r).sum()) for r in (0, 1, 2)]
    in_response = region[at] > 0
    f_mean = np.bincount(feature[in_response], value[in_response], sae.m) / max(1, n_response)
    x_mean, variance = total / n_response, squares / n_response - (total / n_response) ** 2
    top = variance.topk(max(1, store.d(site) // 100)).indices
    W = sae.W_dec
    normal = np.array([normal_form(int(t)) for t in range(int(token.max()) + 1)])
    held_out = (pair % 2).astype(bool)
    keys = {"lexical": normal[token], "position": position}
    r2 = {n: _held_out_r2(k, keep, row, feature, value, held_out, sae.m) for n, k in keys.items()}
    flags = {
        "dense": np.bincount(feature[in_response], minlength=sae.m) / max(1, n_response) > DENSE,
        "outlier": (W[:, top].square().sum(1) / W.square().sum(1).clamp_min(1e-12)).numpy() >= OUTLIER,
        "lexical": r2["lexical"] >= LEXICAL,
        "position": r2["position"] >= POSITION,
    }
    where = (token[at][in_response], feature[in_response])
    by_token = sparse.csr_matrix((value[in_response], where), shape=(int(token.max()) + 1, sae.m))
    return FeatureStatistics(fire[0], fire[1], fire[2], torch.from_numpy(f_mean).float(), x_mean.float(), flags, by_token)


def firings(store: ActivationStore, sae: Sae, site: str, features: Sequence[int]) -> np.ndarray:
    """On which stored tokens each of ``features`` fires [tokens, n] (position 0 left out)."""
    keep = np.flatnonzero(store.column(site, "position").numpy() > 0)
    column = np.full(sae.m, -1)
    column[list(features)] = np.arange(len(features))
    fires = np.zeros((keep.size, len(features)), dtype=bool)
    for start in range(0, keep.size, CHUNK):
        active = sae.active(store.rows(site, torch.from_numpy(keep[start : start + CHUNK])))
        at = column[active.feature.numpy()]
        fires[active.token.numpy()[at >= 0] + start, at[at >= 0]] = True
    return fires


def _held_out_r2(
    key: np.ndarray,
    keep: np.ndarray,
    row: np.ndarray,
    feature: np.ndarray,
    value: np.ndarray,
    held_out: np.ndarray,
    m: int,
) -> np.ndarray:
    """R^2 [m] on the held-out pairs of predicting f_j by its mean at the same key on the other pairs."""
    size = int(key.max()) + 1
    test = held_out[keep[row]]
    sums = [
        sparse.csr_matrix((value[part], (key[keep[row]][part], feature[part])), shape=(size, m)) for part in (~test, test)
    ]
    counts = [np.bincount(key[keep][part], minlength=size) for part in (~held_out[keep], held_out[keep])]
    predicted = sparse.diags(1.0 / np.maximum(counts[0], 1)) @ sums[0]
    squared = np.bincount(feature[test], value[test].astype(float) ** 2, m)
    product = np.asarray(sums[1].multiply(predicted).sum(0)).ravel()
    again = np.asarray((sparse.diags(counts[1].astype(float)) @ predicted.power(2)).sum(0)).ravel()
    n = max(1, counts[1].sum())
    mean = np.bincount(feature[test], value[test], m) / n
    variance = squared - n * mean**2
    residual = squared - 2 * product + again
    return np.where(variance > 0, 1 - residual / np.maximum(variance, 1e-12), 0.0)

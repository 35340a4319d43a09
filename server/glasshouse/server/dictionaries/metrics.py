"""How good a dictionary is: section 8's metrics as streams, accumulated in float64.

SAELens' definitions are the reference; where another is in use it has its own name.

    L0                   mean over tokens of #(f != 0)
    L1                   mean over tokens of sum |f|
    MSE                  mean over tokens of ||y - y^||^2, summed over the width
    explained_variance   1 - E||y - y^||^2 / (E||y||^2 - ||E y||^2)
    explained_variance_legacy   mean over tokens of 1 - ||y - y^||^2 / ||y - ybar_batch||^2
    fvu                  sum ||y - y^||^2 / sum ||y - ybar||^2 (sparsify's, over all the tokens)
    cossim, l2_ratio     per-token means; l2_ratio is ||y^|| / ||y||
    relative_reconstruction_bias   E||y^||^2 / E[y . y^]; below 1 is shrinkage
    density, dead        firings / tokens; never fired over the N tokens seen, N reported
    ce_score             (CE_zero - CE_sae) / (CE_zero - CE_clean), "loss recovered"
    kl_score             (KL_zero - KL_sae) / KL_zero, KL = KL(clean || spliced)

The activations accumulators see one batch of tokens at a time; sites of a multi-site dictionary are
concatenated. The cross-entropies and divergences come from the engine, which splices the model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from glasshouse.server.dictionaries.features import SparseFeatures


@dataclass(frozen=True, kw_only=True)
class DictionaryMetrics:
    """The figures over `n_tokens` tokens. NaN where there is nothing to divide by."""

    n_tokens: int
    l0: float
    l1: float
    mse: float
    explained_variance: float
    explained_variance_legacy: float
    fvu: float
    cossim: float
    l2_ratio: float
    relative_reconstruction_bias: float
    n_dead: int
    dead_fraction: float


class ActivationMetrics:
    """Streams (features, target y, reconstruction y^) batches."""

    def __init__(self, d_sae: int, width: int, device: torch.device | str = "cpu") -> None:
        """`width`: of one token's target, all its sites together."""
        self.d_sae = d_sae
        self.n_tokens = 0
        self._fired = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self._mean_target = torch.zeros(width, dtype=torch.float64, device=device)
        self._sums: dict[str, float] = dict.fromkeys(
            ("l0", "l1", "error", "target", "output", "dot", "legacy", "cossim", "ratio", "spread"), 0.0
        )

    @torch.no_grad()
    def add(self, features: SparseFeatures, target: Tensor, reconstruction: Tensor) -> None:
        """One batch of N tokens: target and reconstruction (N, E) or (N, M, E)."""
        n_tokens = features.n_positions
        if n_tokens == 0:
            return
        y, y_hat = target.flatten(1).double(), reconstruction.flatten(1).double()
        error = (y - y_hat).square().sum(1)
        norm_y, norm_out = torch.linalg.vector_norm(y, dim=1), torch.linalg.vector_norm(y_hat, dim=1)
        dot = (y * y_hat).sum(1)
        centre = y.mean(0)
        around = (y - centre).square().sum(1)
        self._add("l0", float(features.ids.numel()))
        self._add("l1", float(features.values.double().abs().sum()))
        self._add("error", error.sum())
        self._add("target", norm_y.square().sum())
        self._add("output", norm_out.square().sum())
        self._add("dot", dot.sum())
        self._add("legacy", (1 - error / around).sum())
        self._add("cossim", (dot / (norm_y * norm_out)).nan_to_num(0.0).sum())
        self._add("ratio", (norm_out / norm_y).sum())
        self._add("spread", around.sum() + self._between(centre, n_tokens))
        self._mean_target += (centre - self._mean_target) * (n_tokens / (self.n_tokens + n_tokens))
        self._fired += torch.bincount(features.ids.long(), minlength=self.d_sae)
        self.n_tokens += n_tokens

    def _between(self, centre: Tensor, n_tokens: int) -> Tensor:
        """What a batch's own centre adds to the spread around the common mean (Chan's update)."""
        seen = self.n_tokens
        between: Tensor = (centre - self._mean_target).square().sum() * (seen * n_tokens / (seen + n_tokens))
        return between

    def _add(self, name: str, value: Tensor | float) -> None:
        self._sums[name] += float(value)

    @property
    def density(self) -> Tensor:
        """(F,) float64: firings per token of each feature."""
        return self._fired.double() / max(self.n_tokens, 1)

    @property
    def never_fired(self) -> Tensor:
        """(F,) bool: dead over the tokens seen so far."""
        return self._fired == 0

    def result(self) -> DictionaryMetrics:
        sums, n = self._sums, self.n_tokens
        mean_square = _ratio(sums["target"], n)
        variance = mean_square - float(self._mean_target.square().sum())
        dead = int(self.never_fired.sum())
        return DictionaryMetrics(
            n_tokens=n,
            l0=_ratio(sums["l0"], n),
            l1=_ratio(sums["l1"], n),
            mse=_ratio(sums["error"], n),
            explained_variance=1 - _ratio(_ratio(sums["error"], n), variance),
            explained_variance_legacy=_ratio(sums["legacy"], n),
            fvu=_ratio(sums["error"], sums["spread"]),
            cossim=_ratio(sums["cossim"], n),
            l2_ratio=_ratio(sums["ratio"], n),
            relative_reconstruction_bias=_ratio(sums["output"], sums["dot"]),
            n_dead=dead,
            dead_fraction=dead / self.d_sae,
        )


def _ratio(above: float, below: float) -> float:
    return above / below if below else math.nan


def ce_score(*, clean: float, spliced: float, zero: float) -> float:
    """Loss recovered: 1 when splicing costs nothing, 0 when it is as bad as zero-ablation."""
    return _ratio(zero - spliced, zero - clean)


def kl_score(*, spliced: float, zero: float) -> float:
    """The same from divergences KL(clean || spliced) and KL(clean || zero-ablated)."""
    return _ratio(zero - spliced, zero)


class SpliceMetrics:
    """Streams next-token log-probabilities of the clean, spliced and zero-ablated model."""

    def __init__(self) -> None:
        self.n_tokens = 0
        self._ce = [0.0, 0.0, 0.0]
        self._kl = [0.0, 0.0]

    @torch.no_grad()
    def add(self, clean: Tensor, spliced: Tensor, zero: Tensor, next_ids: Tensor) -> None:
        """Log-probabilities or logits (N, V) at positions whose next token is next_ids (N,)."""
        log_p = [torch.log_softmax(t.double(), dim=-1) for t in (clean, spliced, zero)]
        at = next_ids.long().unsqueeze(1)
        for i, table in enumerate(log_p):
            self._ce[i] -= float(table.gather(1, at).sum())
        for i, table in enumerate(log_p[1:]):
            self._kl[i] += float((log_p[0].exp() * (log_p[0] - table)).nan_to_num(0.0).sum())
        self.n_tokens += int(next_ids.numel())

    @property
    def cross_entropy(self) -> tuple[float, float, float]:
        """(clean, spliced, zero-ablated) in nats a token."""
        clean, spliced, zero = (_ratio(total, self.n_tokens) for total in self._ce)
        return clean, spliced, zero

    @property
    def divergence(self) -> tuple[float, float]:
        """(spliced, zero-ablated) KL from the clean model, nats a token."""
        return _ratio(self._kl[0], self.n_tokens), _ratio(self._kl[1], self.n_tokens)

    @property
    def ce_score(self) -> float:
        clean, spliced, zero = self.cross_entropy
        return ce_score(clean=clean, spliced=spliced, zero=zero)

    @property
    def kl_score(self) -> float:
        spliced, zero = self.divergence
        return kl_score(spliced=spliced, zero=zero)

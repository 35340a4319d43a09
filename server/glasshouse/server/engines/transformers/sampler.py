"""Logits to tokens: each row by its own temperature, top_k, top_p and seed, all rows in a few operations.

A row's randomness is one uniform number a token from a counter-based generator keyed by its seed (Philox, Salmon et al.
2011), turned into a token through the inverse of the cumulative distribution in float64. It depends on the seed and
the number of the token alone, never on the other rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from glasshouse.server.types.generation import Sampling


class RowSampler:
    """The rule and the random stream of one row."""

    __slots__ = ("_random", "greedy", "sampling")

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.greedy = sampling.temperature == 0.0
        self._random: np.random.Generator | None = None

    def uniform(self) -> float:
        """The next number in [0, 1)."""
        if self._random is None:
            # Here, for greedy rows draw none. A negative seed is as good as any: its two's complement.
            self._random = np.random.Generator(np.random.Philox(key=self.sampling.seed & (2**64 - 1)))
        return float(self._random.random())


def choose(logits_BV: Tensor, samplers: Sequence[RowSampler]) -> Tensor:
    """Token ids int64 (B,), one a row of `logits_BV` (float32). Advances the random stream of sampled rows."""
    if all(sampler.greedy for sampler in samplers):
        return logits_BV.argmax(dim=-1)
    greedy = [sampler.greedy for sampler in samplers]
    sampled = [row for row, is_greedy in enumerate(greedy) if not is_greedy]
    everything = len(sampled) == len(samplers)
    rules = [samplers[row].sampling for row in sampled]
    device = logits_BV.device
    logits_NV = logits_BV if everything else logits_BV[torch.tensor(sampled, device=device)]
    temperature_N1 = torch.tensor([[rule.temperature] for rule in rules], dtype=torch.float64, device=device)
    scaled_NV = logits_NV.double() / temperature_N1
    uniform_N1 = torch.tensor(
        [[samplers[row].uniform()] for row in sampled], dtype=torch.float64, device=device
    )
    if any(rule.top_k or rule.top_p < 1.0 for rule in rules):
        tokens_N = _from_filtered(scaled_NV, rules, uniform_N1)
    else:
        tokens_N = _inverse_cdf(torch.softmax(scaled_NV, dim=-1), uniform_N1)
    if everything:
        return tokens_N
    tokens_B = logits_BV.argmax(dim=-1)
    tokens_B[torch.tensor(sampled, device=device)] = tokens_N
    return tokens_B


def _from_filtered(scaled_NV: Tensor, rules: Sequence[Sampling], uniform_N1: Tensor) -> Tensor:
    """Sampling from the distribution cut by top_k, then by top_p."""
    vocab_size = scaled_NV.shape[-1]
    ordered_NV, ids_NV = scaled_NV.sort(dim=-1, descending=True, stable=True)
    device = scaled_NV.device
    keep_N1 = torch.tensor(
        [[min(rule.top_k, vocab_size) if rule.top_k else vocab_size] for rule in rules], device=device
    )
    rank_V = torch.arange(vocab_size, device=device)
    ordered_NV = ordered_NV.masked_fill(rank_V >= keep_N1, float("-inf"))
    probabilities_NV = torch.softmax(ordered_NV, dim=-1)
    top_p_N1 = torch.tensor([[rule.top_p] for rule in rules], dtype=torch.float64, device=device)
    # A token stays while the mass before it is below top_p: the smallest set that reaches it.
    before_NV = probabilities_NV.cumsum(dim=-1) - probabilities_NV
    drop_NV = (before_NV >= top_p_N1) & (top_p_N1 < 1.0)
    chosen_N = _inverse_cdf(probabilities_NV.masked_fill(drop_NV, 0.0), uniform_N1)
    return ids_NV.gather(-1, chosen_N[:, None])[:, 0]


def _inverse_cdf(weights_NV: Tensor, uniform_N1: Tensor) -> Tensor:
    """The first index whose cumulative weight exceeds u times the total. `weights_NV` need not sum to one."""
    cumulative_NV = weights_NV.cumsum(dim=-1)
    total_N1 = cumulative_NV[:, -1:]
    # u < 1, but u * total may round up to the total, past every token that has weight.
    below_N1 = torch.minimum(uniform_N1 * total_N1, torch.nextafter(total_N1, torch.zeros_like(total_N1)))
    return torch.searchsorted(cumulative_NV, below_N1, right=True)[:, 0]

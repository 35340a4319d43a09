"""What calls that are no operations will take: a rate measured once for each model, and sizes.

Forward passes and passes with gradients are timed on a few rows of a short input; a call is so many rows of so many
tokens. Rough, and enough to refuse what would take a thousand times longer than it may.
"""

from __future__ import annotations

import threading
from weakref import WeakKeyDictionary

import torch
from torch import nn

from glasshouse.server.attribution.gradient_model import GradientModel
from glasshouse.server.attribution.metrics import LogitDifference
from glasshouse.server.types.configuration import AttributionSettings

from .budget import Estimate, timed

_ROWS, _TOKENS = 4, 16


class Costs:
    """Rates of the models served, in seconds a row and token."""

    def __init__(self, settings: AttributionSettings) -> None:
        self._settings = settings
        self._rates: WeakKeyDictionary[nn.Module, tuple[float, float]] = WeakKeyDictionary()
        self._lock = threading.Lock()

    def estimate(
        self, model: GradientModel, *, n_rows: int, n_tokens: int, gradients: bool, at_once: int = 1
    ) -> Estimate:
        """What `n_rows` passes over `n_tokens` tokens take, `at_once` of them together."""
        with self._lock:
            rates = self._rates.get(model.loaded.model)
            if rates is None:
                rates = self._rates[model.loaded.model] = _measured(model)
        return Estimate(
            memory_bytes=at_once * row_bytes(model, n_tokens),
            seconds=n_rows * n_tokens * rates[gradients],
            passes=n_rows,
            size=n_rows,
        )

    def batch_size(self, model: GradientModel, asked: int, n_tokens: int, *, default: int) -> int:
        """Rows of a batch: those asked for, or the default, as far as memory allows; at least one."""
        most = self._settings.max_memory_bytes // row_bytes(model, n_tokens)
        return max(1, min(asked or default, most))


def row_bytes(model: GradientModel, n_tokens: int) -> int:
    """Upper bound of what a row of a pass with gradients holds: activations, attention maps, logits of one position."""
    loaded = model.loaded
    per_token = loaded.n_layers * (16 * loaded.d_model + 6 * loaded.d_mlp) + 4 * loaded.d_model
    maps = 4 * loaded.n_layers * loaded.n_heads * n_tokens * n_tokens
    return 4 * (per_token * n_tokens + maps + 3 * loaded.vocab_size)


def _measured(model: GradientModel) -> tuple[float, float]:
    tokens = torch.zeros(_ROWS, _TOKENS, dtype=torch.int64, device=model.loaded.device)
    metric = LogitDifference(targets=(0,))

    def forward() -> None:
        with torch.no_grad():
            metric(model.forward(tokens))

    def backward() -> None:
        run = model.forward(tokens, differentiate=["hook_embed"])
        run.gradients(metric(run).sum())

    return timed(forward) / tokens.numel(), timed(backward) / tokens.numel()

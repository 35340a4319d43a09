"""Muon: momentum whose update is orthogonalised, for the weight matrices of the layers.

1. Nesterov momentum on the gradient.
2. The update's singular values are pushed towards one by five Newton-Schulz iterations with a quintic
   polynomial.
3. The step is scaled by sqrt(max(1, rows / columns)); weight decay is decoupled.

Keller Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/. Matrices of one shape are stacked and
orthogonalised together, since on a small model the number of calls is what costs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch

_QUINTIC = (3.4445, -4.7750, 2.0315)
_STEPS = 5


def orthogonalised(matrices_NRC: torch.Tensor) -> torch.Tensor:
    """(n, rows, columns) -> the same: approximately U V^T of each matrix's singular value decomposition."""
    a, b, c = _QUINTIC
    x = matrices_NRC.bfloat16()
    wide = x.size(-2) <= x.size(-1)
    if not wide:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    orthogonal: torch.Tensor = x if wide else x.mT
    return orthogonal.to(matrices_NRC.dtype)


class Muon(torch.optim.Optimizer):
    """The optimiser of the two-dimensional weights inside the layers; embeddings and norms go to AdamW."""

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update from the gradients in place."""
        assert closure is None
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.nn.Parameter]] = defaultdict(list)
            for param in group["params"]:
                if param.grad is not None:
                    by_shape[param.shape].append(param)
            for shape, params in by_shape.items():
                self._update(params, shape, group)

    def _update(self, params: list[torch.nn.Parameter], shape: torch.Size, group: dict[str, Any]) -> None:
        directions = []
        for param in params:
            assert param.grad is not None
            buffer = self.state[param].setdefault("momentum", torch.zeros_like(param))
            buffer.lerp_(param.grad, 1 - group["momentum"])
            directions.append(param.grad.lerp(buffer, group["momentum"]))
        updates = orthogonalised(torch.stack(directions))
        scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
        for param, update in zip(params, updates, strict=True):
            param.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-scale)

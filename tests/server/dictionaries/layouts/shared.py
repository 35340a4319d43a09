"""What every layout shares: sizes, seeded tensors, a case, the forward pass of an ordinary SAE."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

N, D, F = 11, 16, 160


@dataclass(kw_only=True)
class Case:
    """query: settings after the path. expect: facts that must hold."""

    path: Path
    x: Tensor
    f: Tensor
    y: Tensor
    architecture: str
    query: str = ""
    hook_in: str = ""
    expect: dict[str, Any] = field(default_factory=dict)


class Draw:
    """Tensors from one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=self.generator) * scale


def dump(path: Path, config: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config))


def pieces(draw: Draw, d: int = D, f: int = F) -> dict[str, Tensor]:
    return {
        "W_enc": draw(d, f, scale=0.3),
        "W_dec": draw(f, d, scale=0.3),
        "b_enc": draw(f, scale=0.2),
        "b_dec": draw(d, scale=0.4),
    }


def forward(
    p: dict[str, Tensor], x: Tensor, rule: Callable[[Tensor], Tensor], subtract: bool
) -> tuple[Tensor, Tensor]:
    """(f, y) of an ordinary SAE in float64."""
    d = {name: tensor.double() for name, tensor in p.items()}
    h = (x - d["b_dec"] if subtract else x) @ d["W_enc"] + d.get("b_enc", torch.zeros(())).double()
    f = rule(h)
    return f, f @ d["W_dec"] + d["b_dec"]


def contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}

"""What every writer shares. Runs under the peers' interpreter, which has none of the server's code.

A writer saves OUT/<case>/ with the owner library and OUT/<case>/expected/expected.safetensors: x, the owner's
own features f (N, F) and output y; beside it `expected.json` with the path to open, relative to OUT/<case>.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

N, D, F = 24, 32, 320


def seed(value: int) -> None:
    torch.manual_seed(value)


def x_of(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def randomise(module: torch.nn.Module, **scales: float) -> None:
    """Every floating parameter and buffer drawn afresh, so that no bias stays zero."""
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.is_floating_point() and tensor.ndim:
                tensor.copy_(torch.randn(tensor.shape) * scales.get(name, 0.3))
                if "threshold" in name:
                    tensor.abs_()


def expected(case: Path, x: torch.Tensor, f: torch.Tensor, y: torch.Tensor, opens: str = ".") -> None:
    folder = case / "expected"
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"x": x, "f": f, "y": y}
    save_file(
        {k: v.detach().float().contiguous() for k, v in tensors.items()}, folder / "expected.safetensors"
    )
    (folder / "expected.json").write_text(json.dumps({"opens": opens}))

"""Graphs of long prompts on a small model stay within their estimate, and the estimate near what they take."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from glasshouse.server.attribution.influence import Edges, above_threshold

from .long_graph import N_ACTIVE, N_LAYERS

ROOT = Path(__file__).parents[3]
STATED_BYTES = 640 << 20


def traced(n_positions: int, max_features: int) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "tests.server.attribution.long_graph",
        str(n_positions),
        str(max_features),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["n_active"] == N_LAYERS * N_ACTIVE * (n_positions - 1)
    assert found["n_edges"] <= found["expected"]["n_edges"]
    assert 0 < found["n_nodes_kept"] < found["n_nodes"]
    assert found["expected"]["seconds"] > 0
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_a_thousand_tokens() -> None:
    """1,024 of 31,968 features: which rows come is not known beforehand, the longest are counted."""
    found = traced(1000, 1024)
    expected = found["expected"]["memory_bytes"]
    assert found["n_features"] == 1024
    assert found["peak_bytes"] <= expected < STATED_BYTES
    assert expected < 4 * found["peak_bytes"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_every_feature() -> None:
    """Everything is known beforehand."""
    found = traced(250, 10**9)
    expected = found["expected"]["memory_bytes"]
    assert found["n_features"] == found["n_active"]
    assert found["n_edges"] > 0.9 * found["expected"]["n_edges"]
    assert found["peak_bytes"] <= expected < 2 * found["peak_bytes"]


@pytest.mark.parametrize("threshold", [0.2, 0.8, 0.98])
def test_a_selection_is_what_a_full_sort_selects(threshold: float) -> None:
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(60_000, generator=generator).exp().pow(2)
    scores[:30_000] = 0
    ordered = scores.double().sort(descending=True).values
    place = int((ordered.cumsum(0) < threshold * ordered.sum()).sum())
    found = above_threshold(scores, threshold)
    assert abs(int(found.sum()) - (place + 1)) <= 1
    assert float(scores[found].min()) >= float(scores[~found].max())
    alike = torch.ones(10_000)
    assert bool(above_threshold(alike, threshold).all())


def test_edges_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Influence is the same however many edges are taken at a time."""
    generator = torch.Generator().manual_seed(5)
    targets = torch.randint(1, 50, (400,), generator=generator)
    sources = (targets * torch.rand(400, generator=generator)).int()
    weights = torch.randn(400, generator=generator)
    edges = Edges(targets=targets.int(), sources=sources, weights=weights, n_nodes=50)
    start = torch.rand(50, generator=generator)
    dense = torch.zeros(50, 50, dtype=torch.float64)
    dense.index_put_((targets, sources.long()), weights.abs().double(), accumulate=True)
    dense /= dense.sum(1, keepdim=True).clamp_min(1e-10)
    expected, current = torch.zeros(50, dtype=torch.float64), start.double()
    for _ in range(50):
        current = current @ dense
        expected += current
    for at_once in (1 << 22, 7):
        monkeypatch.setattr("glasshouse.server.attribution.influence.EDGES_AT_ONCE", at_once)
        torch.testing.assert_close(edges.influence(start).double(), expected, rtol=1e-4, atol=1e-5)

"""Things to publish."""

from __future__ import annotations

from typing import Any

import numpy as np

from glasshouse.server.registry.names import Kind
from glasshouse.server.registry.records import Draft, Provenance

PROVENANCE = Provenance(
    model_revision="abc123",
    hook_points=("blocks.3.hook_resid_post",),
    method="difference_in_means",
    data_hash="0" * 64,
    metrics={"auroc": 0.98, "accuracy": 0.9},
    author="ada",
)


def direction(name: str = "mood", *, seed: int = 0, **changes: Any) -> Draft:
    vector = np.random.default_rng(seed).normal(size=64).astype(np.float32)
    whole: dict[str, Any] = {
        "kind": Kind.DIRECTION,
        "model": "fable",
        "name": name,
        "provenance": PROVENANCE,
        "body": {"threshold": 0.5, "text": "größe ✓"},
        "tensors": {"vector": vector},
    }
    return Draft(**{**whole, **changes})


def probe(name: str = "mood", **changes: Any) -> Draft:
    return direction(name, kind=Kind.PROBE, **changes)

"""What is generated in every bar: fable's own stories, cut to prompts of differing lengths."""

from __future__ import annotations

import numpy as np

from glasshouse import fable

N_STREAMS = 32
N_TOKENS = 64
N_VECTORS = 256


def texts(n: int) -> list[str]:
    """`n` beginnings of stories, 24 to 160 characters."""
    stories = [record["text"] for record in fable.labelled("mood") if record["kind"] == "story"]
    return [stories[i % len(stories)][: 24 + 17 * (i % 9)].strip() for i in range(n)]


def vectors(n: int, width: int, norm: float) -> np.ndarray:
    """`n` steering vectors (n, width) float32, no two alike."""
    drawn = np.random.default_rng(5).standard_normal((n, width)).astype(np.float32)
    return drawn * (norm / np.linalg.norm(drawn, axis=1, keepdims=True))

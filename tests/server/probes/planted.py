"""Activations with a direction planted in them, as a residual stream might carry it."""

from __future__ import annotations

import numpy as np

from glasshouse.server.probes.examples import LabelledActivations, PairedActivations, Task

POINTS = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post", "blocks.2.hook_resid_post")
WIDTH = 24


def direction(seed: int = 0, width: int = WIDTH) -> np.ndarray:
    vector = np.random.default_rng(seed).normal(size=width)
    return vector / np.linalg.norm(vector)


def noise(n: int, seed: int, width: int = WIDTH) -> np.ndarray:
    """Rows with a large common mean and one coordinate a hundred times the others', as language models have."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(n, width)) + 5.0
    rows[:, 3] = rows[:, 3] * 2.0 + 500.0
    return rows


def examples(
    n: int = 2000, strengths: tuple[float, ...] = (0.5, 6.0, 2.0), seed: int = 1
) -> LabelledActivations:
    """Binary examples: the positive ones moved along `direction()` by `strengths`, one a hook point."""
    labels = (np.arange(n) % 2).astype(np.int64)
    activations = {
        name: noise(n, seed + i) + strength * labels[:, None] * direction()
        for i, (name, strength) in enumerate(zip(POINTS, strengths, strict=True))
    }
    return LabelledActivations(activations=activations, labels=labels, label_names=("sad", "happy"))


def pairs(n: int = 500, strength: float = 6.0, seed: int = 2) -> PairedActivations:
    common = noise(n, seed)
    rng = np.random.default_rng(seed + 100)
    jitter = [rng.normal(size=(n, WIDTH)) * 0.3 for _ in range(2)]
    name = POINTS[1]
    return PairedActivations(
        positive={name: common + strength * direction() + jitter[0]}, negative={name: common + jitter[1]}
    )


def classes(n: int = 600, k: int = 3, seed: int = 3) -> LabelledActivations:
    labels = (np.arange(n) % k).astype(np.int64)
    means = np.random.default_rng(seed).normal(size=(k, WIDTH)) * 2.0
    rows = noise(n, seed) + means[labels]
    return LabelledActivations(
        activations={POINTS[0]: rows},
        labels=labels,
        label_names=tuple(f"class {i}" for i in range(k)),
        task=Task.MULTI_CLASS,
    )


def many_labels(n: int = 600, k: int = 3, seed: int = 4) -> LabelledActivations:
    labels = np.random.default_rng(seed).integers(0, 2, size=(n, k))
    rows = noise(n, seed) + sum(3.0 * labels[:, [i]] * direction(10 + i) for i in range(k))
    return LabelledActivations(
        activations={POINTS[0]: rows},
        labels=labels.astype(np.int64),
        label_names=tuple(f"label {i}" for i in range(k)),
        task=Task.MULTI_LABEL,
    )

"""How well directions and probes find what is known to be there, and how long they take.

- `auroc_mood`, `auroc_gender`, `auroc_number`: held-out AUROC of a direction of fable's latents at the best layer, computed
  through the server from the packaged labelled sets.
- `planted_cosine`, `planted_auroc`: a direction planted in a model's residual stream, the lowest over the layers.
- `shuffled_auroc`: the same with labels that mean nothing; the farthest from 0.5 over the layers.
- `sklearn_difference`: the largest difference of a logistic direction from scikit-learn's on the same activations.
- `probe_seconds`: training one probe at each of six layers on 800 texts, from the call to the result; `direction_seconds`
  likewise. No bar holds for these two.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from tests.server.operations import planted_model

from glasshouse import fable
from glasshouse.client import AsyncModel, Example
from glasshouse.server.engines.transformers.engine import TransformersEngine
from glasshouse.server.operations.compute_directions import DirectionsRequest, compute
from glasshouse.server.operations.examples import labelling
from glasshouse.server.operations.gathering import GatherOptions
from glasshouse.server.operations.manager import Progress
from glasshouse.server.probes.directions import DirectionMethod
from glasshouse.server.probes.library import ConceptLibrary
from glasshouse.server.probes.pooling import Pooling
from glasshouse.server.probes.saved import DirectionAt
from glasshouse.server.types.limits import Limits

from ..harness import Report
from ..workbench import Workbench

LATENTS = {"mood": "sad", "gender": "girl", "number": "plural"}
LAYERS = [f"blocks.{layer}.hook_resid_post" for layer in range(6)]
BAR_AUROC, BAR_COSINE, BAR_SKLEARN = 0.98, 0.99, 1e-6


def run(bench: Workbench, report: Report) -> None:
    """auroc_*, planted_*, shuffled_auroc, sklearn_difference, probe_seconds, direction_seconds"""
    model = bench.served_model
    for name, positive in LATENTS.items():
        direction, seconds = bench.run(_direction(model, name, positive))
        auroc = direction.held_out.auroc
        where = f"best at {direction.best_hook_point}, interval {auroc.low:.3f} to {auroc.high:.3f}"
        report(f"auroc_{name}", auroc.value, "AUROC", where, f">= {BAR_AUROC}", auroc.value >= BAR_AUROC)
        if name == "mood":
            report("direction_seconds", seconds, "s", "none", "none", True)
    seconds = bench.run(_probe(model))
    report("probe_seconds", seconds, "s", "none", "none", True)
    difference = bench.run(_from_sklearn(model))
    report(
        "sklearn_difference",
        difference,
        "absolute",
        "scikit-learn on the same activations",
        f"<= {BAR_SKLEARN:g}",
        difference <= BAR_SKLEARN,
    )
    found, shuffled = bench.run(_planted())
    planted = planted_model.direction()
    cosine = min(float(at.vector @ planted / np.linalg.norm(at.vector)) for at in found)
    report("planted_cosine", cosine, "cosine", "lowest of 3 layers", f">= {BAR_COSINE}", cosine >= BAR_COSINE)
    lowest = min(at.held_out.auroc.value for at in found)
    report("planted_auroc", lowest, "AUROC", "lowest of 3 layers", f">= {BAR_COSINE}", lowest >= BAR_COSINE)
    worst = max((at.held_out.auroc for at in shuffled), key=lambda auroc: abs(auroc.value - 0.5))
    held = all(at.held_out.auroc.low <= 0.5 <= at.held_out.auroc.high for at in shuffled)
    report(
        "shuffled_auroc",
        worst.value,
        "AUROC",
        f"interval {worst.low:.3f} to {worst.high:.3f}",
        "0.5 in every interval",
        held,
    )


def _examples(name: str) -> list[Example]:
    records = fable.labelled(name)
    return [Example(r["text"], r["label"], held_out=r["split"] == "test") for r in records]


async def _direction(model: AsyncModel, name: str, positive: str) -> tuple[Any, float]:
    begun = time.perf_counter()
    operation = await model.compute_directions(_examples(name), positive=positive, hook_points=LAYERS)
    return await operation.result(), time.perf_counter() - begun


async def _probe(model: AsyncModel) -> float:
    begun = time.perf_counter()
    operation = await model.train_probe(_examples("mood"), positive="sad", hook_points=LAYERS, best=True)
    await operation.result()
    return time.perf_counter() - begun


async def _from_sklearn(model: AsyncModel) -> float:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    examples, hook = _examples("number"), LAYERS[2]
    operation = await model.compute_directions(
        examples, positive="plural", hook_points=hook, method="logistic"
    )
    ours = (await operation.result()).vector
    learnt = [example for example in examples if not example.held_out]
    texts = [example.input for example in learnt]
    activations = await model.activations(texts, hook_points=hook)
    rows = np.stack([one[hook][-1] for one in activations]).astype(np.float64)
    scaler = StandardScaler().fit(rows)
    fitted = LogisticRegression(max_iter=2000).fit(
        scaler.transform(rows), [example.label == "plural" for example in learnt]
    )
    return float(np.abs(ours - fitted.coef_[0] / scaler.scale_).max())


async def _planted() -> tuple[list[DirectionAt], list[DirectionAt]]:
    engine = TransformersEngine(planted_model.load(), limits=Limits(), threads=1)
    await engine.start()
    try:
        found = []
        for shuffled in (False, True):
            examples = planted_model.examples(shuffled=shuffled)
            request = DirectionsRequest(
                hook_points=tuple(p for p in engine.hook_points if p.name.endswith("hook_resid_post")),
                options=GatherOptions(pooling=Pooling.LAST, held_out_share=0.25, seed=0, max_bytes=1 << 28),
                method=DirectionMethod.DIFFERENCE_IN_MEANS,
                made_by="difference_in_means",
                examples=examples,
                labelling=labelling(examples),
            )
            found.append(list((await compute(engine, ConceptLibrary(), request, Progress())).direction.at))
        return found[0], found[1]
    finally:
        await engine.stop()

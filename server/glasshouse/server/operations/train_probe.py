"""A probe trained on a model: examples read in bulk, fitted, calibrated, judged, published.

With several hook points either one probe reads them side by side, or one is trained at each and the best is kept: the
best on out-of-fold training examples, so that the held-out figures stay what they claim to be. Training runs in a
thread; cancelling takes effect between two probes.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace

import numpy as np

from glasshouse.server.engines.engine import Engine
from glasshouse.server.probes.discrimination import auroc
from glasshouse.server.probes.library import ConceptLibrary
from glasshouse.server.probes.saved import Origin, ProbeSummary, SavedProbe, probe_draft
from glasshouse.server.probes.training import ProbeSpec, TrainedProbe, train_probe
from glasshouse.server.registry.records import Provenance
from glasshouse.server.types.hook_points import HookPoint
from glasshouse.server.types.selectors import EVERYWHERE, Selector

from .compute_directions import Publication
from .examples import Example, Labelling, data_hash
from .gathering import GatheredExamples, GatherOptions, gather_examples
from .manager import Progress


@dataclass(frozen=True, kw_only=True, eq=False)
class ProbeRequest:
    """What to train. `each`: one probe a hook point, the best kept; else one that reads them all."""

    hook_points: tuple[HookPoint, ...]
    options: GatherOptions
    spec: ProbeSpec
    examples: tuple[Example, ...]
    labelling: Labelling
    each: bool = False
    positions: Selector = EVERYWHERE
    publication: Publication | None = None
    author: str = ""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A hook point that was tried: mean AUROCs over the columns."""

    hook_point: str
    out_of_fold_auroc: float
    held_out_auroc: float


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainedOnModel:
    """The result. `candidates`: one a hook point where the best was chosen."""

    probe: SavedProbe
    candidates: tuple[Candidate, ...] = ()


async def train(
    engine: Engine, library: ConceptLibrary, request: ProbeRequest, progress: Progress
) -> TrainedOnModel:
    """Trains and publishes; raises as `compute_directions.compute` does."""
    gathered = await gather_examples(
        engine, request.examples, request.labelling, request.hook_points, request.options, progress
    )
    names = tuple(point.name for point in request.hook_points)
    groups = [(name,) for name in names] if request.each else [names]
    progress.phase, progress.done, progress.total = "training", 0, len(groups)
    spec = replace(request.spec, pooling=request.options.pooling, model_name=engine.info.name)
    best: TrainedProbe | None = None
    candidates: list[Candidate] = []
    for group in groups:
        trained = await asyncio.to_thread(train_probe, gathered.labelled, group, spec, sides=gathered.sides)
        candidates.append(_candidate(group[0], trained, gathered))
        if best is None or _rank(candidates[-1]) > max(_rank(other) for other in candidates[:-1]):
            best = trained
        progress.done += 1
    assert best is not None, "a request names a hook point"
    notes = gathered.notes
    if request.each and len(groups) > 1 and best.report.n_folds == 0:
        notes = (
            *notes,
            "Without folds the hook point was chosen by the held-out figures: they are flattered.",
        )
    probe = SavedProbe(
        facts=best.probe.facts,
        calibration=request.spec.calibration.value if best.probe.calibration is not None else "none",
        positions=request.positions,
        report=ProbeSummary.of(best.report, gathered.summary, notes),
        served=best.probe,
        calibration_scores=best.calibration_scores,
        origin=Origin(
            description="" if request.publication is None else request.publication.description,
            provenance=Provenance(
                model_revision=engine.info.revision,
                hook_points=best.probe.facts.hook_points,
                method=f"probe_{request.spec.kind}",
                data_hash=data_hash(request.examples),
                metrics=best.report.metrics,
                author=request.author,
            ),
        ),
    )
    if request.publication is not None:
        progress.phase = "publishing"
        probe = await asyncio.to_thread(publish, library, probe, engine.info.name, request.publication)
    return TrainedOnModel(probe=probe, candidates=tuple(candidates) if request.each else ())


def publish(library: ConceptLibrary, probe: SavedProbe, model: str, publication: Publication) -> SavedProbe:
    """Publishes `probe`; returns it with its name. Blocks."""
    kept = replace(probe, origin=replace(probe.origin, description=publication.description))
    record = library.publish(
        probe_draft(kept, model=model, name=publication.name, version=publication.version)
    )
    return replace(kept, origin=replace(kept.origin, name=str(record.reference), created=record.created))


def _candidate(hook_point: str, trained: TrainedProbe, gathered: GatheredExamples) -> Candidate:
    scores = trained.calibration_scores
    truth = gathered.labelled.columns[gathered.sides.train]
    out_of_fold = (
        float(np.mean([auroc(scores[:, c], truth[:, c]).value for c in range(scores.shape[1])]))
        if len(scores)
        else float("nan")
    )
    held_out = float(np.mean([column.discrimination.auroc.value for column in trained.report.columns]))
    return Candidate(hook_point=hook_point, out_of_fold_auroc=out_of_fold, held_out_auroc=held_out)


def _rank(candidate: Candidate) -> float:
    if np.isnan(candidate.out_of_fold_auroc):
        return candidate.held_out_auroc
    return candidate.out_of_fold_auroc

"""Directions computed on a model: examples read in bulk, a direction at each hook point, judged, published.

1. Examples or pairs are read at every hook point in the same forward passes (`gathering`) and split once.
2. At each hook point, one after the other in a thread: the method makes a direction from the training rows, the
   held-out rows judge it. Cancelling takes effect between two hook points.
3. Vectors that are given (raw, or a dictionary feature's decoder row) are judged in the same way; their threshold is
   the middle between the projected means of the training rows.
4. The best hook point is named, and what was asked for is published.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from glasshouse.server.engines.engine import Engine
from glasshouse.server.probes.directions import DirectionMethod, best_of, compute_directions
from glasshouse.server.probes.discrimination import Discrimination, discriminate
from glasshouse.server.probes.examples import FloatRows, Task
from glasshouse.server.probes.library import ConceptLibrary
from glasshouse.server.probes.saved import DirectionAt, Origin, SavedDirection, direction_draft
from glasshouse.server.registry.names import Kind
from glasshouse.server.registry.records import Provenance
from glasshouse.server.types.errors import InvalidArgument
from glasshouse.server.types.hook_points import HookPoint
from glasshouse.server.types.selectors import EVERYWHERE, Selector
from glasshouse.wire import reasons

from .examples import Example, Labelling, Pair, data_hash
from .gathering import GatheredExamples, GatherOptions, gather_examples, gather_pairs
from .manager import Progress


@dataclass(frozen=True, kw_only=True)
class Publication:
    """Under which name a result is published; `version` None is the next free one."""

    name: str
    version: int | None = 1
    description: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class DirectionsRequest:
    """What to compute. `method` None: `vectors` float64 (width,) by hook point are given, and `made_by` says by what.
    Either `examples` with their `labelling`, or `pairs`, or where vectors are given neither.
    """

    hook_points: tuple[HookPoint, ...]
    options: GatherOptions
    method: DirectionMethod | None
    made_by: str
    vectors: Mapping[str, FloatRows] = field(default_factory=dict)
    examples: tuple[Example, ...] = ()
    labelling: Labelling | None = None
    pairs: tuple[Pair, ...] = ()
    positions: Selector = EVERYWHERE
    inverse_l2: float = 1.0
    n_clusters: int = 2
    publication: Publication | None = None
    best_only: bool = False
    author: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class ComputedDirections:
    """The result: every hook point's direction with its vectors; `notes` are whole sentences."""

    direction: SavedDirection
    notes: tuple[str, ...]


async def compute(
    engine: Engine, library: ConceptLibrary, request: DirectionsRequest, progress: Progress
) -> ComputedDirections:
    """Computes, judges and publishes.

    Raises:
        InvalidArgument: examples that cannot be learnt from, or classes that coincide.
        ResourceExhausted: more activations than the budget.
        AlreadyExists: the name or version is taken.
        Unavailable: the engine or the registry does not answer.
    """
    gathered = await _gather(engine, request, progress)
    progress.phase, progress.done, progress.total = "computing", 0, len(request.hook_points)
    found: list[DirectionAt] = []
    for point in request.hook_points:
        found.append(await asyncio.to_thread(_at, point, request, gathered))
        progress.done += 1
    names = ("negative", "positive") if gathered is None else gathered.labelled.label_names
    held_out = {at.hook_point: at.held_out for at in found if at.held_out is not None}
    best = best_of(held_out) if held_out else found[0].hook_point
    items: Sequence[Example] | Sequence[Pair] = request.examples or request.pairs
    direction = SavedDirection(
        method=request.made_by,
        at=tuple(found),
        best=best,
        negative_label=names[0],
        positive_label=names[1],
        pooling=request.options.pooling,
        positions=request.positions,
        split=None if gathered is None else gathered.summary,
        origin=Origin(
            description="" if request.publication is None else request.publication.description,
            provenance=Provenance(
                model_revision=engine.info.revision,
                hook_points=tuple(point.name for point in request.hook_points),
                method=request.made_by,
                data_hash=data_hash(items) if items else "",
                metrics=held_out[best].metrics if held_out else {},
                author=request.author,
            ),
        ),
    )
    if request.publication is not None:
        progress.phase = "publishing"
        direction = await asyncio.to_thread(
            publish, library, direction, engine.info.name, request.publication, best_only=request.best_only
        )
    return ComputedDirections(direction=direction, notes=_notes(gathered, found))


def publish(
    library: ConceptLibrary,
    direction: SavedDirection,
    model: str,
    publication: Publication,
    *,
    best_only: bool = False,
) -> SavedDirection:
    """Publishes `direction`, or its best hook point alone; returns it with its name. Blocks."""
    origin = replace(direction.origin, description=publication.description)
    kept = replace(direction, origin=origin)
    if best_only:
        kept = replace(
            kept,
            at=tuple(at for at in kept.at if at.hook_point == kept.best),
            origin=replace(origin, provenance=replace(origin.provenance, hook_points=(kept.best,))),
        )
    record = library.publish(
        direction_draft(kept, model=model, name=publication.name, version=publication.version)
    )
    return replace(
        direction,
        origin=replace(kept.origin, name=str(record.reference), created=record.created),
    )


def check_publication(library: ConceptLibrary, kind: Kind, model: str, publication: Publication) -> None:
    """Refuses a name or version that is taken before any work is done. Blocks; see `ConceptLibrary.check_free`."""
    library.check_free(kind, model=model, name=publication.name, version=publication.version)


async def _gather(engine: Engine, request: DirectionsRequest, progress: Progress) -> GatheredExamples | None:
    if request.pairs:
        return await gather_pairs(engine, request.pairs, request.hook_points, request.options, progress)
    if request.labelling is None:
        return None
    if request.labelling.task is not Task.BINARY:
        raise InvalidArgument(
            f"a direction separates two labels, there are {len(request.labelling.names)}: "
            f"{', '.join(request.labelling.names[:8])}",
            reason=reasons.FIELD_CONFLICT,
            field="examples.labels",
            value=len(request.labelling.names),
            remedy="compute one direction a label against the rest, or train a probe",
        )
    return await gather_examples(
        engine, request.examples, request.labelling, request.hook_points, request.options, progress
    )


def _at(point: HookPoint, request: DirectionsRequest, gathered: GatheredExamples | None) -> DirectionAt:
    name = point.name
    if request.method is not None:
        assert gathered is not None, "a method has examples"
        report = compute_directions(
            gathered.at(name),
            request.method,
            sides=gathered.sides,
            inverse_l2=request.inverse_l2,
            n_clusters=request.n_clusters,
            seed=request.options.seed,
        )
        made = report.directions[name]
        return DirectionAt(
            hook_point=name,
            width=point.width,
            norm=made.norm,
            threshold=made.threshold,
            held_out=report.held_out[name],
            vector=made.vector,
        )
    vector = np.asarray(request.vectors[name], dtype=np.float64)
    threshold, held_out = (None, None) if gathered is None else _judged(vector, name, gathered)
    return DirectionAt(
        hook_point=name,
        width=point.width,
        norm=float(np.linalg.norm(vector)),
        threshold=threshold,
        held_out=held_out,
        vector=vector,
    )


def _judged(vector: FloatRows, name: str, gathered: GatheredExamples) -> tuple[float, Discrimination]:
    """A given vector's threshold from the training rows, and its figures on the held-out ones."""
    projected = gathered.labelled.rows(name) @ vector
    labels, sides = gathered.labelled.labels, gathered.sides
    train, truth = projected[sides.train], labels[sides.train]
    threshold = float((train[truth == 1].mean() + train[truth == 0].mean()) / 2)
    judged = discriminate(projected[sides.held_out], labels[sides.held_out], threshold=threshold)
    return threshold, judged


def _notes(gathered: GatheredExamples | None, found: Sequence[DirectionAt]) -> tuple[str, ...]:
    if gathered is None:
        return ("There were no examples: nothing is known of how well it separates anything.",)
    notes = list(gathered.notes)
    if gathered.summary.n_left_out:
        notes.append(
            f"{gathered.summary.n_left_out} held-out rows were left out: copies of them are learnt from."
        )
    if len(found) > 1:
        notes.append(
            f"The best of {len(found)} hook points was chosen by the same figures: its own are a little flattered."
        )
    return tuple(notes)

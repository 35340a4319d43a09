"""What a watch scores and how it steers, found and checked before any request is watched."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from glasshouse.server.probes.concepts import ConceptStore
from glasshouse.server.readouts.score_columns import ColumnSource, FeatureColumnSource, ProbeColumnSource
from glasshouse.server.types.conditions import FeatureColumn, ProbeColumn
from glasshouse.server.types.errors import FailedPrecondition, ServingError
from glasshouse.server.types.hook_points import HookPoint
from glasshouse.server.types.interventions import Intervention
from glasshouse.wire import reasons

from .concepts import in_place, look_up
from .preparation import Preparation

_UNEMBED = "unembed"


async def score_source(
    check: Preparation, store: ConceptStore, column: ProbeColumn | FeatureColumn, *, field: str
) -> ColumnSource:
    """What scores `column` on live activations.

    Raises:
        NotFound: no such probe, dictionary or feature.
        InvalidArgument: a probe of several labels and none named.
        FailedPrecondition: it does not fit the model, or reads what is not computed at every position of every step.
    """
    if isinstance(column, FeatureColumn):
        path = f"{field}.feature.dictionary"
        kept = check.dictionaries.get(column.dictionary, field=path).live(path)
        kept.dictionary.check_feature_ids(torch.tensor([column.feature]), field=f"{field}.feature.feature")
        _check_points(kept.points_in, path)
        return FeatureColumnSource(points=kept.points_in, dictionary=kept.dictionary, feature=column.feature)
    path = f"{field}.probe.probe"
    held = await store.probe(column.probe, field=path)
    points = check.probes.points(held, path)
    _check_points(points, path)
    return ProbeColumnSource(
        points=points,
        probe=check.probes.of(held),
        column=held.probe.column(column.label, field=f"{field}.probe.label"),
        output=column.output,
    )


async def steering(
    check: Preparation, store: ConceptStore, interventions: Sequence[Intervention], *, field: str
) -> tuple[Intervention, ...]:
    """`interventions` with the vectors of what they name, tried out on a request that could be anyone's. Raises what
    keeps them from being applied.
    """
    try:
        concepts = await look_up(store, interventions)
        placed = tuple(
            in_place(one, concepts, check.table, f"interventions[{index}]")[0]
            for index, one in enumerate(interventions)
        )
        check.edits(placed, prompt=(0,), n_fed=2)
    except ServingError as error:
        raise error.at(field) from None
    return placed


def _check_points(points: Sequence[HookPoint], field: str) -> None:
    for point in points:
        if point.kind == "attention" or point.name == _UNEMBED:
            raise FailedPrecondition(
                f"{point.name} cannot be watched: it is not there at every position of every step",
                reason=reasons.HOOK_POINT_NOT_READABLE,
                field=field,
                value=point.name,
                remedy="use a probe of the residual stream, or of what is written into it",
            )

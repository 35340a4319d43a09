"""Edits of a fake model: where they are made, what is read after them, and their receipts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from glasshouse.client.testing.fake_model import FakeModel, select
from glasshouse.client.testing.fake_probes import FakeCondition, probe_labels
from glasshouse.v1 import conditions_pb2, interventions_pb2
from glasshouse.v1.tensors_pb2 import DTYPE_UNSPECIFIED, DType
from glasshouse.wire.tensors import numpy_dtype


def read_at(
    model: FakeModel,
    name: str,
    ids: Sequence[int],
    positions: Sequence[int],
    interventions: Sequence[interventions_pb2.Intervention],
    n_prompt: int,
    dtype: int,
) -> NDArray[Any]:
    """The activations at some positions, after the edits at that hook point, in a wire dtype."""
    everywhere = model.activations(name, ids, range(len(ids)))
    if name in model.residual:
        for n, edit in enumerate(interventions):
            if model.edited_point(edit, f"interventions[{n}]") == name:
                at = steered(model, edit, ids, n_prompt)
                everywhere[at] = model.edit(everywhere[at], edit)
        chosen = everywhere[list(positions)]
    else:
        chosen = everywhere[:, list(positions)]
    return chosen.astype(numpy_dtype(dtype if dtype != DTYPE_UNSPECIFIED else DType.DTYPE_F32))


def conditions(
    edits: Sequence[interventions_pb2.Intervention], model: FakeModel, field: str = "interventions"
) -> list[FakeCondition]:
    """Their conditions, checked."""
    return [
        FakeCondition(model, edit.condition, f"{field}.condition")
        for edit in edits
        if edit.HasField("condition")
    ]


def abort(ends: Sequence[FakeCondition], ids: Sequence[int], n_prompt: int) -> conditions_pb2.Abort | None:
    """What ends a generation at the last of `ids`: the earliest position that passes."""
    found = []
    for index, condition in enumerate(ends):
        passed = condition.passed(ids, n_prompt)
        if passed:
            at = min(passed)
            found.append((at, index, passed[at], condition.threshold))
    if not found:
        return None
    at, index, score, threshold = min(found)
    return conditions_pb2.Abort(condition=index, position=at, score=score, threshold=threshold)


def salt(
    model: FakeModel,
    interventions: Sequence[interventions_pb2.Intervention],
    ids: Sequence[int],
    n_prompt: int,
) -> bytes:
    """What text depends on: the edits that have been made so far."""
    for n, edit in enumerate(interventions):
        model.check_edit(edit, f"interventions[{n}]")
    return b"".join(
        edit.SerializeToString(deterministic=True)
        for edit in interventions
        if not edit.HasField("condition") or steered(model, edit, ids, n_prompt)
    )


def steered(
    model: FakeModel, edit: interventions_pb2.Intervention, ids: Sequence[int], n_prompt: int
) -> list[int]:
    """The positions at which an edit is made."""
    positions = covered(edit, ids, n_prompt)
    for condition in conditions([edit], model):
        passed = condition.passed(ids, n_prompt)
        positions = [position for position in positions if position in passed]
    return positions


def covered(edit: interventions_pb2.Intervention, ids: Sequence[int], n_prompt: int) -> list[int]:
    """The positions its selector covers."""
    return select(edit.positions if edit.HasField("positions") else None, ids, n_prompt)


def _resources(model: FakeModel, edit: interventions_pb2.Intervention) -> list[str]:
    names = [model.direction(name, "direction")[0] for name in model.named_directions(edit)]
    if edit.condition.HasField("probe"):
        names.append(probe_labels(model, edit.condition.probe.probe, "condition")[0])
    return names


def receipt(
    model: FakeModel,
    interventions: Sequence[interventions_pb2.Intervention],
    ids: Sequence[int],
    n_prompt: int,
) -> list[interventions_pb2.InterventionReceipt]:
    """What was done, one entry an edit."""
    return [
        interventions_pb2.InterventionReceipt(
            index=index,
            edit=edit.WhichOneof("edit") or "",
            hook_point=model.edited_point(edit, "interventions"),
            positions_applied=len(covered(edit, ids, n_prompt)),
            hook_points=[model.edited_point(edit, "interventions")],
            positions_steered=len(steered(model, edit, ids, n_prompt)),
            resources=_resources(model, edit),
            content_hash=hashlib.sha256(edit.SerializeToString(deterministic=True)).hexdigest(),
        )
        for index, edit in enumerate(interventions)
    ]

"""Probes: types to protobuf, and the numbers of an imported one back."""

from __future__ import annotations

import numpy as np
import torch
from google.protobuf.message import Message

from glasshouse.server.operations.manager import Progress
from glasshouse.server.operations.train_probe import TrainedOnModel
from glasshouse.server.probes.calibration import (
    Calibration,
    CalibrationMethod,
    IsotonicScaling,
    PlattScaling,
)
from glasshouse.server.probes.examples import Task
from glasshouse.server.probes.operating_points import OperatingPoint
from glasshouse.server.probes.saved import ProbeSummary, SavedProbe
from glasshouse.server.probes.served import Affine, ProbeKind, ServedProbe, affine
from glasshouse.server.probes.training import ColumnReport
from glasshouse.server.types.errors import InvalidArgument
from glasshouse.v1 import probes_pb2 as pb
from glasshouse.wire import reasons
from glasshouse.wire.tensors import pack

from . import fields, tensors
from .concept_messages import (
    discrimination_message,
    interval_message,
    pooling_number,
    provenance_message,
    split_message,
    timestamp,
)
from .direction_messages import stage_fraction
from .selectors import selector_message

KINDS: dict[int, ProbeKind] = {
    pb.PROBE_KIND_UNSPECIFIED: "logistic",
    pb.PROBE_KIND_LOGISTIC: "logistic",
    pb.PROBE_KIND_MASS_MEAN: "mass_mean",
    pb.PROBE_KIND_MASS_MEAN_CORRECTED: "mass_mean_corrected",
    pb.PROBE_KIND_MLP: "mlp",
}
TASKS: dict[int, Task | None] = {
    pb.PROBE_TASK_UNSPECIFIED: None,
    pb.PROBE_TASK_BINARY: Task.BINARY,
    pb.PROBE_TASK_MULTI_CLASS: Task.MULTI_CLASS,
    pb.PROBE_TASK_MULTI_LABEL: Task.MULTI_LABEL,
}
CALIBRATIONS: dict[int, CalibrationMethod] = {
    pb.CALIBRATION_METHOD_UNSPECIFIED: CalibrationMethod.PLATT,
    pb.CALIBRATION_METHOD_NONE: CalibrationMethod.NONE,
    pb.CALIBRATION_METHOD_PLATT: CalibrationMethod.PLATT,
    pb.CALIBRATION_METHOD_ISOTONIC: CalibrationMethod.ISOTONIC,
}
# Weights that would take more are left out of a response.
MOST_WEIGHT_BYTES = 3 << 20


def probe_message(probe: SavedProbe, *, with_weights: bool = False) -> pb.Probe:
    """A probe; with its numbers where they are asked for."""
    facts, origin = probe.facts, probe.origin
    return pb.Probe(
        name=origin.name,
        kind=next(pb.ProbeKind.ValueType(n) for n, kind in KINDS.items() if n and kind == facts.kind),
        task=next(pb.ProbeTask.ValueType(n) for n, task in TASKS.items() if task is facts.task),
        labels=facts.label_names,
        columns=facts.columns,
        hook_points=facts.hook_points,
        widths=facts.widths,
        pooling=pooling_number(facts.pooling),
        positions=selector_message(probe.positions),
        calibration=next(
            pb.CalibrationMethod.ValueType(n)
            for n, method in CALIBRATIONS.items()
            if n and method.value == probe.calibration
        ),
        report=None if probe.report is None else _report_message(probe.report),
        description=origin.description,
        provenance=provenance_message(origin.provenance),
        create_time=timestamp(origin.created),
        built_in=origin.built_in,
        weights=weights_message(probe.served) if with_weights and probe.served is not None else None,
    )


def trained_message(trained: TrainedOnModel) -> pb.TrainProbeResponse:
    """The result of TrainProbe."""
    fits = trained.probe.nbytes <= 2 * MOST_WEIGHT_BYTES
    return pb.TrainProbeResponse(
        probe=probe_message(trained.probe, with_weights=fits),
        candidates=[
            pb.ProbeCandidate(
                hook_point=tried.hook_point,
                out_of_fold_auroc=tried.out_of_fold_auroc,
                held_out_auroc=tried.held_out_auroc,
            )
            for tried in trained.candidates
        ],
    )


def training_metadata(progress: Progress) -> Message:
    """Progress of TrainProbe: `done` counts examples while they are read, then probes."""
    reading = progress.phase == "reading"
    return pb.TrainProbeMetadata(
        phase=progress.phase,
        fraction=stage_fraction(progress, "training"),
        examples_done=progress.done if reading else 0,
        examples_total=progress.total if reading else 0,
    )


def weights_message(probe: ServedProbe) -> pb.ProbeWeights:
    """A probe's numbers; weights as float32, which is what it is served in."""
    message = pb.ProbeWeights(
        layers=[
            pb.AffineLayer(
                weights=pack(layer.weights.float().numpy()), biases=pack(layer.biases.float().numpy())
            )
            for layer in probe.layers
        ]
    )
    match probe.calibration:
        case PlattScaling(slopes, offsets):
            message.platt.CopyFrom(pb.PlattCalibration(slopes=slopes.tolist(), offsets=offsets.tolist()))
        case IsotonicScaling(margins, probabilities):
            message.isotonic.CopyFrom(
                pb.IsotonicCalibration(
                    columns=[
                        pb.IsotonicColumn(margins=at.tolist(), probabilities=to.tolist())
                        for at, to in zip(margins, probabilities, strict=True)
                    ]
                )
            )
        case None:
            pass
    return message


def layers_of(message: pb.ProbeWeights, field: str) -> tuple[Affine, ...]:
    """The layers of an imported probe, in float64."""
    if not 1 <= len(message.layers) <= 2:
        raise fields.out_of_range(f"{field}.layers", f"a list of {len(message.layers)}", "one or two layers")
    found = []
    for index, layer in enumerate(message.layers):
        path = f"{field}.layers[{index}]"
        weights = tensors.floats(layer.weights, layer.HasField("weights"), f"{path}.weights")
        biases = tensors.vector(layer.biases, layer.HasField("biases"), f"{path}.biases")
        if weights.ndim != 2:
            raise _shape(f"{path}.weights", weights.shape, "(n_in, n_out)")
        found.append(affine(weights, biases))
    return tuple(found)


def calibration_of(message: pb.ProbeWeights, n_columns: int, field: str) -> Calibration | None:
    """The calibration of an imported probe of `n_columns`."""
    match message.WhichOneof("calibration"):
        case "platt":
            parts = []
            for name in ("slopes", "offsets"):
                numbers = list(getattr(message.platt, name))
                path = f"{field}.platt.{name}"
                if len(numbers) != n_columns:
                    raise _shape(path, len(numbers), f"{n_columns}, one a score column")
                parts.append(
                    torch.tensor(
                        [fields.finite(number, f"{path}[{at}]") for at, number in enumerate(numbers)],
                        dtype=torch.float64,
                    )
                )
            return PlattScaling(*parts)
        case "isotonic":
            columns = message.isotonic.columns
            if len(columns) != n_columns:
                raise _shape(f"{field}.isotonic.columns", len(columns), f"{n_columns}, one a score column")
            knots = [_knots(column, f"{field}.isotonic.columns[{at}]") for at, column in enumerate(columns)]
            return IsotonicScaling(tuple(at for at, _ in knots), tuple(to for _, to in knots))
        case _:
            return None


def _knots(column: pb.IsotonicColumn, field: str) -> tuple[torch.Tensor, torch.Tensor]:
    at, to = np.array(column.margins), np.array(column.probabilities)
    fine = (
        len(at) == len(to) > 0
        and bool(np.isfinite(at).all())
        and bool((np.diff(at) > 0).all() and (np.diff(to) >= 0).all())
        and bool((to >= 0).all() and (to <= 1).all())
    )
    if not fine:
        raise InvalidArgument(
            f"{field} holds no ascending margins with probabilities from 0 to 1",
            reason=reasons.VALUE_MALFORMED,
            field=field,
            value=f"{len(at)} margins, {len(to)} probabilities",
            remedy="send margins in ascending order and as many probabilities, not descending",
        )
    return torch.from_numpy(at), torch.from_numpy(to)


def _shape(field: str, found: object, expected: str) -> InvalidArgument:
    return InvalidArgument(
        f"{field} has shape {found}, expected {expected}",
        reason=reasons.WRONG_WIDTH,
        field=field,
        value=found,
        remedy=f"give {expected}",
    )


def _report_message(report: ProbeSummary) -> pb.ProbeReport:
    return pb.ProbeReport(
        columns=[_column_message(column) for column in report.columns],
        accuracy=interval_message(report.accuracy),
        control_accuracy=interval_message(report.control_accuracy),
        selectivity=report.selectivity,
        split=split_message(report.split),
        n_folds=report.n_folds,
        converged=report.converged,
        notes=report.notes,
    )


def _column_message(column: ColumnReport) -> pb.ProbeColumnReport:
    return pb.ProbeColumnReport(
        label=column.name,
        held_out=discrimination_message(column.discrimination),
        ece_before=column.ece_before,
        ece=column.ece,
        brier=column.brier,
        operating_points=[_point_message(point) for point in column.operating_points],
        control_auroc=interval_message(column.control_auroc),
    )


def _point_message(point: OperatingPoint) -> pb.OperatingPoint:
    return pb.OperatingPoint(
        wanted_false_positive_rate=point.wanted_false_positive_rate,
        threshold=point.threshold,
        resolved=point.resolved,
        false_positive_rate=interval_message(point.false_positive_rate),
        true_positive_rate=interval_message(point.true_positive_rate),
    )

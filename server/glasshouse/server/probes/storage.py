"""A probe on disk: `probe.json` (what it is) beside `probe.safetensors` (its tensors). No pickle, nothing executed.

The same two halves, a JSON object and named tensors, are what the registry keeps of a probe.

    layers.{i}.weights, layers.{i}.biases
    calibration.slopes, calibration.offsets                     Platt
    calibration.margins.{c}, calibration.probabilities.{c}      isotonic, a column
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors
from torch import Tensor

from glasshouse.server.probes.calibration import Calibration, IsotonicScaling, PlattScaling
from glasshouse.server.probes.examples import Task
from glasshouse.server.probes.pooling import Pooling
from glasshouse.server.probes.served import Affine, ProbeFacts, ProbeKind, ServedProbe
from glasshouse.server.types.errors import FailedPrecondition
from glasshouse.wire import reasons

FORMAT = 1

Arrays = Mapping[str, np.ndarray[Any, Any]]


def to_parts(probe: ServedProbe) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    """The JSON object and the tensors (float64) of a probe."""
    facts = probe.facts
    tensors: dict[str, Tensor] = {}
    for i, layer in enumerate(probe.layers):
        tensors[f"layers.{i}.weights"], tensors[f"layers.{i}.biases"] = layer.weights, layer.biases
    kind = "none"
    match probe.calibration:
        case PlattScaling():
            kind = "platt"
            tensors["calibration.slopes"] = probe.calibration.slopes
            tensors["calibration.offsets"] = probe.calibration.offsets
        case IsotonicScaling():
            kind = "isotonic"
            for c, (at, to) in enumerate(zip(probe.calibration.margins, probe.calibration.probabilities)):
                tensors[f"calibration.margins.{c}"], tensors[f"calibration.probabilities.{c}"] = at, to
        case None:
            pass
    body = {
        "format": FORMAT,
        "kind": facts.kind,
        "task": facts.task.value,
        "label_names": list(facts.label_names),
        "hook_points": list(facts.hook_points),
        "widths": list(facts.widths),
        "pooling": facts.pooling.value,
        "model_name": facts.model_name,
        "n_layers": len(probe.layers),
        "calibration": kind,
    }
    arrays = {name: t.detach().double().cpu().contiguous().numpy() for name, t in tensors.items()}
    return body, arrays


def facts_of(body: Mapping[str, Any], *, path: str = "probe") -> ProbeFacts:
    """What the JSON object of `to_parts` says of its probe. Raises `FailedPrecondition` as `from_parts` does."""
    if body.get("format") != FORMAT:
        raise _malformed(path, f"format {body.get('format')!r} is not {FORMAT}")
    if body.get("kind") not in get_args(ProbeKind):
        raise _malformed(path, f"kind {body.get('kind')!r} is not one of {', '.join(get_args(ProbeKind))}")
    try:
        return ProbeFacts(
            kind=body["kind"],
            task=Task(body["task"]),
            label_names=tuple(map(str, body["label_names"])),
            hook_points=tuple(map(str, body["hook_points"])),
            widths=tuple(map(int, body["widths"])),
            pooling=Pooling(body["pooling"]),
            model_name=str(body.get("model_name", "")),
        )
    except KeyError as error:
        raise _malformed(path, f"{error.args[0]!r} is missing") from None
    except (TypeError, ValueError) as error:
        raise _malformed(path, str(error)) from None


def from_parts(body: Mapping[str, Any], arrays: Arrays, *, path: str = "probe") -> ServedProbe:
    """The probe of `to_parts`.

    Raises:
        FailedPrecondition: a format of the future, parts that are missing or disagree, values that are not finite.
    """
    facts = facts_of(body, path=path)
    try:
        tensors = {
            name: torch.from_numpy(np.array(array, dtype=np.float64)) for name, array in arrays.items()
        }
        layers = tuple(
            Affine(tensors[f"layers.{i}.weights"], tensors[f"layers.{i}.biases"])
            for i in range(int(body["n_layers"]))
        )
        probe = ServedProbe(
            facts=facts, layers=layers, calibration=_calibration(body["calibration"], tensors, facts)
        )
    except KeyError as error:
        raise _malformed(path, f"{error.args[0]!r} is missing") from None
    except (TypeError, ValueError) as error:
        raise _malformed(path, str(error)) from None
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise _malformed(path, f"{name} holds values that are not finite")
    _check_shapes(probe, path)
    return probe


def _calibration(kind: str, tensors: Mapping[str, Tensor], facts: ProbeFacts) -> Calibration | None:
    match kind:
        case "none":
            return None
        case "platt":
            return PlattScaling(tensors["calibration.slopes"], tensors["calibration.offsets"])
        case "isotonic":
            columns = range(len(facts.columns))
            return IsotonicScaling(
                tuple(tensors[f"calibration.margins.{c}"] for c in columns),
                tuple(tensors[f"calibration.probabilities.{c}"] for c in columns),
            )
        case _:
            raise ValueError(f"calibration {kind!r} is not known")


def _check_shapes(probe: ServedProbe, path: str) -> None:
    facts, n_columns = probe.facts, len(probe.facts.columns)
    if not probe.layers or len(facts.widths) != len(facts.hook_points) or not facts.hook_points:
        raise _malformed(path, "layers, hook points and widths do not fit together")
    width = facts.width
    for i, layer in enumerate(probe.layers):
        out = n_columns if i == len(probe.layers) - 1 else layer.biases.numel()
        if layer.weights.shape != (width, out) or layer.biases.shape != (out,):
            raise _malformed(
                path,
                f"layers.{i} has shapes {tuple(layer.weights.shape)} and {tuple(layer.biases.shape)}, expected "
                f"({width}, {out}) and ({out},)",
            )
        width = out
    match probe.calibration:
        case PlattScaling(slopes, offsets):
            if slopes.shape != (n_columns,) or offsets.shape != (n_columns,):
                raise _malformed(path, f"the calibration has not one number for each of {n_columns} columns")
        case IsotonicScaling(margins, probabilities):
            for at, to in zip(margins, probabilities):
                if at.ndim != 1 or at.shape != to.shape or not len(at) or not bool((at.diff() > 0).all()):
                    raise _malformed(path, "a calibration's knots are not ascending pairs")
        case None:
            pass


def save(probe: ServedProbe, folder: Path) -> None:
    """Writes the two files into `folder`, made where it is missing."""
    body, arrays = to_parts(probe)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "probe.safetensors").write_bytes(save_tensors(arrays))
    (folder / "probe.json").write_text(json.dumps(body, indent=2) + "\n")


def load(folder: Path) -> ServedProbe:
    """The probe of `save`. Raises `FailedPrecondition` for files that are missing or damaged."""
    try:
        body = json.loads((folder / "probe.json").read_text())
        arrays = load_tensors((folder / "probe.safetensors").read_bytes())
    except FileNotFoundError as error:
        raise _malformed(str(folder), f"{Path(error.filename).name} is missing") from None
    except (ValueError, SafetensorError) as error:
        raise _malformed(str(folder), f"cannot be read: {error}") from None
    if not isinstance(body, dict):
        raise _malformed(str(folder), "probe.json is not an object")
    return from_parts(body, arrays, path=str(folder))


def _malformed(path: str, message: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"{path}: {message}",
        reason=reasons.PROBE_MALFORMED,
        field="path",
        value=path,
        remedy="train or export the probe again",
        metadata={"path": path},
    )

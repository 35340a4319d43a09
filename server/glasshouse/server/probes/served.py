"""A fitted probe as it is served: a few tensors, one affine map (two with a ReLU between for an MLP).

Legend: N rows, D = sum of the hook points' widths, C score columns.

1. logits = x @ W + b (an MLP: relu(x @ W1 + b1) @ W2 + b2). Standardisation is already folded into the first map.
2. margins (N, C): each column's log-odds. A binary probe and independent labels: the logits themselves. Several
   classes: log p_k - log(1 - p_k) of the softmax, which is logit_k - logsumexp of the others.
3. scores (N, C): the calibration of the margins, or sigma(margins) without one, which of several classes is the
   softmax. Calibrated scores of several classes are divided by their sum.

Columns: the positive class alone in a binary task, else one a class or label, in the order of `facts.columns`. Tensors
are float64 when fitted and loaded; `to` casts them for serving, where float32 is enough.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from glasshouse.server.probes.calibration import Calibration, IsotonicScaling, PlattScaling
from glasshouse.server.probes.examples import Task
from glasshouse.server.probes.pooling import Pooling
from glasshouse.server.types.errors import InvalidArgument
from glasshouse.wire import reasons

ProbeKind = Literal["logistic", "mass_mean", "mass_mean_corrected", "mlp"]


@dataclass(frozen=True, kw_only=True)
class ProbeFacts:
    """What a probe is, without its weights. `hook_points` and their `widths` are in the order of x's columns."""

    kind: ProbeKind
    task: Task
    label_names: tuple[str, ...]
    hook_points: tuple[str, ...]
    widths: tuple[int, ...]
    pooling: Pooling
    model_name: str = ""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the score columns."""
        return self.label_names[1:] if self.task is Task.BINARY else self.label_names

    @property
    def width(self) -> int:
        """D."""
        return sum(self.widths)


@dataclass(frozen=True, eq=False)
class Affine:
    """x @ weights + biases: `weights` (D_in, D_out), `biases` (D_out,)."""

    weights: Tensor
    biases: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class ServedProbe:
    """One probe; immutable, safe to use from several threads."""

    facts: ProbeFacts
    layers: tuple[Affine, ...]
    calibration: Calibration | None = None

    def score(self, x: Tensor) -> Tensor:
        """Scores (N, C) in [0, 1], in the probe's dtype, of rows x (N, D) of any float dtype. Raises `InvalidArgument`."""
        return self.score_margins(self.margins(x))

    def margins(self, x: Tensor) -> Tensor:
        """Log-odds (N, C) of rows x (N, D), before calibration.

        Raises:
            InvalidArgument: x of another width.
        """
        if x.ndim != 2 or x.shape[1] != self.facts.width:
            raise InvalidArgument(
                f"activations have shape {tuple(x.shape)}, the probe reads (n, {self.facts.width}) from "
                f"{' + '.join(self.facts.hook_points)}",
                reason=reasons.WRONG_WIDTH,
                field="activations",
                value=tuple(x.shape),
                remedy=f"give shape (n, {self.facts.width})",
            )
        first = self.layers[0]
        logits = torch.addmm(first.biases, x.to(first.weights.dtype), first.weights)
        for layer in self.layers[1:]:
            logits = torch.addmm(layer.biases, logits.relu(), layer.weights)
        return self.margins_of(logits)

    def margins_of(self, logits_NC: Tensor) -> Tensor:
        """Log-odds (N, C) of logits (N, C)."""
        if self.facts.task is not Task.MULTI_CLASS:
            return logits_NC
        n_columns = logits_NC.shape[1]
        others = logits_NC.unsqueeze(1).expand(-1, n_columns, -1)
        own = torch.eye(n_columns, dtype=torch.bool, device=logits_NC.device)
        return logits_NC - others.masked_fill(own, -torch.inf).logsumexp(-1)

    def score_margins(self, margins_NC: Tensor) -> Tensor:
        """Scores (N, C) of margins (N, C)."""
        if self.calibration is None:
            return torch.sigmoid(margins_NC)
        scores = self.calibration(margins_NC)
        if self.facts.task is Task.MULTI_CLASS:
            scores = scores / scores.sum(1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
        return scores

    def join(self, parts: Mapping[str, Tensor]) -> Tensor:
        """x (N, D) from the activations (N, W) captured at each of the probe's hook points."""
        rows = [parts[name] for name in self.facts.hook_points]
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)

    def column(self, name: str = "", *, field: str = "label") -> int:
        """The score column called `name`; the only one for "". Raises `InvalidArgument`."""
        columns = self.facts.columns
        if not name and len(columns) == 1:
            return 0
        if name not in columns:
            raise InvalidArgument(
                f"the probe has no label {name!r}" if name else "the probe has several labels",
                reason=reasons.VALUE_OUT_OF_RANGE if name else reasons.FIELD_REQUIRED,
                field=field,
                value=name,
                remedy=f"use one of: {', '.join(columns)}",
            )
        return columns.index(name)

    @property
    def is_affine(self) -> bool:
        """Whether the margins of a single column are one dot product, which the edit kernels can take over."""
        return len(self.layers) == 1

    def calibrated(self, calibration: Calibration | None) -> ServedProbe:
        """The same probe with another calibration."""
        return replace(self, calibration=calibration)

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> ServedProbe:
        """The same probe with its tensors on `device`, in `dtype`."""
        return replace(
            self,
            layers=tuple(
                Affine(layer.weights.to(device, dtype), layer.biases.to(device, dtype))
                for layer in self.layers
            ),
            calibration=None if self.calibration is None else self.calibration.to(device, dtype),
        )


@dataclass(frozen=True, eq=False)
class ProbeBank:
    """Affine probes that read the same x, as one product: what serves many monitors at one hook point.

    `weights` (D, sum of C), `biases` (sum of C,). Where a probe's score is sigma of an affine map (no calibration or
    Platt's, columns independent), the calibration is folded in too: `folded` says of which.
    """

    probes: tuple[ServedProbe, ...]
    weights: Tensor
    biases: Tensor
    folded: tuple[bool, ...]

    @classmethod
    def of(cls, probes: Sequence[ServedProbe]) -> ProbeBank:
        """Stacks affine probes of equal hook points, on one device in one dtype."""
        assert all(probe.is_affine for probe in probes), "an MLP has no place in a bank"
        assert len({probe.facts.hook_points for probe in probes}) == 1, "a bank reads one x"
        parts: list[Affine] = []
        folded: list[bool] = []
        for probe in probes:
            layer, calibration = probe.layers[0], probe.calibration
            independent = probe.facts.task is not Task.MULTI_CLASS
            if independent and isinstance(calibration, PlattScaling):
                slopes = calibration.slopes
                layer = Affine(layer.weights * slopes, layer.biases * slopes + calibration.offsets)
            folded.append(independent and not isinstance(calibration, IsotonicScaling))
            parts.append(layer)
        return cls(
            tuple(probes),
            torch.cat([part.weights for part in parts], dim=1),
            torch.cat([part.biases for part in parts]),
            tuple(folded),
        )

    def margins(self, x: Tensor) -> list[Tensor]:
        """Log-odds (N, C) of each probe, none of them calibrated, on rows x (N, D)."""
        assert all(probe.calibration is None for probe in self.probes), "calibrations are folded in"
        widths = [probe.layers[0].biases.shape[0] for probe in self.probes]
        logits = torch.addmm(self.biases, x.to(self.weights.dtype), self.weights)
        parts = torch.split(logits, widths, dim=1)
        return [probe.margins_of(part) for probe, part in zip(self.probes, parts, strict=True)]

    def score(self, x: Tensor) -> list[Tensor]:
        """Scores (N, C) of each probe on rows x (N, D)."""
        widths = [probe.layers[0].biases.shape[0] for probe in self.probes]
        logits = torch.addmm(self.biases, x.to(self.weights.dtype), self.weights)
        plain = torch.split(torch.sigmoid(logits), widths, dim=1)
        if all(self.folded):
            return list(plain)
        parts = torch.split(logits, widths, dim=1)
        return [
            score if folded else probe.score_margins(probe.margins_of(part))
            for probe, score, part, folded in zip(self.probes, plain, parts, self.folded, strict=True)
        ]


def affine(weights: Any, biases: Any) -> Affine:
    """An `Affine` of arrays: contiguous float64 of its own, so that a saved copy computes bit for bit the same."""

    def own(array: Any) -> Tensor:
        return torch.tensor(np.ascontiguousarray(array, dtype=np.float64))

    return Affine(own(weights), own(biases))

"""Which tokens a metric rests on: gradient x input and integrated gradients, at the embeddings or any hook point.

Integrated gradients (Sundararajan et al. 2017, https://arxiv.org/abs/1703.01365), with x the activation at the
hook point and b the baseline:

1. Replace the activation at every position by b + a(x - b), several values of a as rows of one batch.
2. Average the gradient of the metric over the path, a from 0 to 1, and multiply by (x - b).
3. The attributions then sum to m(x) - m(b): what is missing is the *residual*, reported with them.

The baseline is by default that of the average token (`baselines`); for gradient x input it is zero, as the name says.

Placement of the steps. A norm divides the stream by its own size, so that where a path begins near zero a model turns
within a ~ sqrt(eps) / |x|, and evenly spaced steps jump over it at any affordable number. But the error is
known piece by piece: over a stretch of the path the attributions should sum to the change of the metric. So
the path is walked in steps that crowd at the baseline the more the smaller it is, cut into pieces of `NODES`
Gauss-Legendre steps, and the pieces that miss most are halved until the steps are spent; `steps` counts every gradient,
those of discarded pieces too. A path from zero may still turn too often for its steps (RMS norms and sandwich norms
do): the residual says so.

What is held fixed: nothing, unless a `Freeze` is given. Positions of learned position embeddings stay (the
token's part of the input is attributed, `hook_embed`).

Shapes: B batch, T positions, D width of the hook point.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from glasshouse.server.attribution.baselines import EMBED, average_input
from glasshouse.server.attribution.editing import setting
from glasshouse.server.attribution.freezing import NOTHING_FROZEN, Freeze
from glasshouse.server.attribution.gradient_model import GradientModel, Pass
from glasshouse.server.attribution.metrics import Metric
from glasshouse.server.attribution.progress import Progress, silent
from glasshouse.server.types.errors import InvalidArgument
from glasshouse.wire import reasons

NODES = 4
"""Gradients of one piece of the path."""

CROWDING = 18.0
"""The path is walked as a = (e^ct - 1) / (e^c - 1), so that every decade down to e^-c gets its share of steps: c is the
logarithm of how many times longer the path is than its baseline, at most this.
"""

FIRST = 4
"""One part in so many of the pieces is spent on the first, even cut."""

SPLIT_SHARE = 0.3
"""Pieces that miss at least this share of what the worst one misses are halved with it."""

Method = Literal["gradient_x_input", "integrated_gradients"]


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenAttribution:
    """attributions: (T, D), summed over D in `scores` (T,). `residual` = value - baseline_value - sum of scores.

    For gradient x input the residual says how far the model is from linear along the path.
    """

    attributions: Tensor
    value: float
    baseline_value: float

    @property
    def scores(self) -> Tensor:
        return self.attributions.sum(-1)

    @property
    def residual(self) -> float:
        return self.value - self.baseline_value - float(self.attributions.double().sum())


def attribute_tokens(
    model: GradientModel,
    tokens_T: Tensor,
    metric: Metric,
    *,
    hook_point: str = EMBED,
    method: Method = "integrated_gradients",
    steps: int = 64,
    baseline: Tensor | None = None,
    freeze: Freeze = NOTHING_FROZEN,
    batch_size: int = 16,
    progress: Progress = silent,
) -> TokenAttribution:
    """Attribute `metric` on one input to the activation at `hook_point`.

    baseline: (T, D) or (D,). By default the activation of an input of average tokens, and zeros for gradient x input,
    whose input is the difference from the baseline.
    """
    if steps < 1:
        raise InvalidArgument(
            f"steps is {steps}",
            reason=reasons.VALUE_OUT_OF_RANGE,
            field="steps",
            value=steps,
            remedy="Use at least 1 step; 64 is usual.",
        )
    tokens = model.tokens(tokens_T)
    plain = model.forward(tokens, read=(hook_point, *metric.reads), freeze=freeze)
    x = plain.readings[hook_point].detach()
    if baseline is None and method == "integrated_gradients":
        baseline = average_input(model, tokens, hook_point)
    start = _baseline(baseline, x)
    at_baseline = _at(model, tokens, hook_point, start, metric, freeze)
    if method == "gradient_x_input":
        run = model.forward(tokens, read=metric.reads, differentiate=[hook_point], freeze=freeze)
        gradient = run.gradients(metric(run).sum())[hook_point][0]
    else:
        walk = _Walk(model, tokens, metric, hook_point, start, x - start, freeze, batch_size)
        gradient = walk.mean_gradient(steps, progress)
    return TokenAttribution(
        attributions=gradient * (x - start)[0],
        value=float(metric(plain)[0].detach()),
        baseline_value=float(metric(at_baseline)[0].detach()),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Piece:
    """A stretch of the path: its share of the mean gradient, (T, D), and what its attributions miss."""

    low: float
    high: float
    gradient: Tensor
    missing: float


class _Walk:
    """The path from `start` along `difference`, (1, T, D) each, and the metric's gradients on it."""

    def __init__(
        self,
        model: GradientModel,
        tokens: Tensor,
        metric: Metric,
        hook_point: str,
        start: Tensor,
        difference: Tensor,
        freeze: Freeze,
        batch_size: int,
    ) -> None:
        self._model, self._tokens, self._metric, self._hook_point = model, tokens, metric, hook_point
        self._start, self._difference, self._freeze, self._batch_size = start, difference, freeze, batch_size
        self._crowding = _crowding(start, difference)
        self._values: dict[float, float] = {}

    def mean_gradient(self, steps: int, progress: Progress) -> Tensor:
        """(T, D), the integral of the gradient over the path, from `steps` gradients."""
        nodes = min(NODES, steps)
        n_left = steps // nodes
        n_first = max(1, n_left // FIRST)
        pieces = self._pieces([(i / n_first, (i + 1) / n_first) for i in range(n_first)], nodes)
        n_left -= n_first
        while n_left >= 2:
            pieces.sort(key=lambda piece: abs(piece.missing), reverse=True)
            worst = abs(pieces[0].missing)
            n_split = sum(abs(piece.missing) > SPLIT_SHARE * worst for piece in pieces)
            n_split = min(n_split, n_left // 2)
            halves = [half for piece in pieces[:n_split] for half in _halves(piece.low, piece.high)]
            pieces = pieces[n_split:] + self._pieces(halves, nodes)
            n_left -= len(halves)
            progress(steps - n_left * nodes, steps)
        return torch.stack([piece.gradient for piece in pieces]).sum(0)

    def _pieces(self, spans: list[tuple[float, float]], nodes: int) -> list[_Piece]:
        x, w = np.polynomial.legendre.leggauss(nodes)
        places = [low + (high - low) * (node + 1) / 2 for low, high in spans for node in x.tolist()]
        gradients = self._gradients(places).view(len(spans), nodes, *self._start.shape[1:])
        self._note_values([end for span in spans for end in span])
        pieces = []
        for i, (low, high) in enumerate(spans):
            speeds = [_speed(t, self._crowding) for t in places[i * nodes : (i + 1) * nodes]]
            weights = torch.tensor(
                w * speeds * (high - low) / 2, dtype=torch.float32, device=gradients.device
            )
            gradient = torch.einsum("ntd,n->td", gradients[i], weights)
            change = self._values[high] - self._values[low]
            missing = change - float((gradient * self._difference[0]).sum())
            pieces.append(_Piece(low=low, high=high, gradient=gradient, missing=missing))
        return pieces

    def _gradients(self, places: list[float]) -> Tensor:
        """(len, T, D)."""
        found = []
        for rows in self._rows(places):
            run = self._pass(rows, gradients=True)
            found.append(run.gradients(self._metric(run).sum())[self._hook_point])
        return torch.cat(found)

    def _note_values(self, places: list[float]) -> None:
        new = sorted(set(places) - self._values.keys())
        values = [self._metric(self._pass(rows, gradients=False)).tolist() for rows in self._rows(new)]
        self._values.update(zip(new, (value for row in values for value in row)))

    def _rows(self, places: list[float]) -> list[Tensor]:
        """Activations (B, T, D) at these places of the path, in batches."""
        along = [_alpha(t, self._crowding) for t in places]
        alpha = torch.tensor(along, dtype=torch.float32, device=self._start.device)[:, None, None]
        return (
            [self._start + some * self._difference for some in torch.split(alpha, self._batch_size)]
            if places
            else []
        )

    def _pass(self, rows: Tensor, *, gradients: bool) -> Pass:
        return _at(
            self._model, self._tokens, self._hook_point, rows, self._metric, self._freeze, gradients=gradients
        )


def _crowding(start: Tensor, difference: Tensor) -> float:
    """How much the steps crowd at the baseline, 0 for not at all: by the position where it is smallest for its path."""
    far = difference.norm(dim=-1) / start.norm(dim=-1)
    most = float(far.nan_to_num(nan=0.0).max())  # a position that stays at zero has no path
    return min(max(math.log(most), 0.0), CROWDING) if most else 0.0


def _alpha(t: float, crowding: float) -> float:
    """How far along the path: from 0 at t = 0 to 1 at t = 1."""
    return math.expm1(crowding * t) / math.expm1(crowding) if crowding else t


def _speed(t: float, crowding: float) -> float:
    return crowding * math.exp(crowding * t) / math.expm1(crowding) if crowding else 1.0


def _halves(low: float, high: float) -> list[tuple[float, float]]:
    middle = (low + high) / 2
    return [(low, middle), (middle, high)]


def _at(
    model: GradientModel,
    tokens: Tensor,
    hook_point: str,
    activation_BTD: Tensor,
    metric: Metric,
    freeze: Freeze,
    gradients: bool = False,
) -> Pass:
    """A pass whose rows have the given activations at the hook point."""
    return model.forward(
        tokens.expand(activation_BTD.shape[0], -1),
        read=metric.reads,
        differentiate=[hook_point] if gradients else (),
        edits={hook_point: [setting(activation_BTD)]},
        freeze=freeze,
    )


def _baseline(baseline: Tensor | None, x: Tensor) -> Tensor:
    """(1, T, D)."""
    if baseline is None:
        return torch.zeros_like(x)
    if baseline.shape not in (x.shape[1:], x.shape[2:]):
        raise InvalidArgument(
            f"The baseline has shape {tuple(baseline.shape)}, the activation {tuple(x.shape[1:])}.",
            reason=reasons.WRONG_WIDTH,
            field="baseline",
            value=tuple(baseline.shape),
            remedy="Give one vector, or one a position.",
        )
    return baseline.to(x).expand_as(x)

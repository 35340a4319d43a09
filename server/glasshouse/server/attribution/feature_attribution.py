"""Which features of a dictionary a metric rests on, with what the dictionary misses as a node of its own.

https://arxiv.org/abs/2403.19647 (sparse feature circuits)

1. The activation at the dictionary's hook point is taken apart, at every position:
   x = sum_s a_s W_dec_s + bias + error (for a transcoder: its output point).
2. Gradient: (a_s - a'_s) W_dec_s . dm/dx, and the same for the error; a' and error' are zero, or those of another
   input. The sum over s is a product with x's gradient, so no feature needs a pass of its own.
3. Integrated gradients: features and error move together from the baseline to their values in `steps` steps and
   the gradient is averaged over them: 10 is the convention.

The scores of features and errors sum to m(x) - m(baseline) up to the residual, which is reported.

Shapes: T positions, D width of the hook point.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from glasshouse.server.attribution.editing import setting
from glasshouse.server.attribution.gradient_model import GradientModel
from glasshouse.server.attribution.metrics import Metric
from glasshouse.server.dictionaries.dictionary import Dictionary
from glasshouse.server.dictionaries.features import SparseFeatures
from glasshouse.server.types.errors import FailedPrecondition, InvalidArgument
from glasshouse.wire import reasons


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureAttribution:
    """features: CSR by position, the values are the attributions. errors: (T,). Metric with and without."""

    features: SparseFeatures
    errors: Tensor
    value: float
    baseline_value: float

    @property
    def residual(self) -> float:
        whole = float(self.features.values.double().sum() + self.errors.double().sum())
        return self.value - self.baseline_value - whole


@dataclass(frozen=True, kw_only=True, eq=False)
class _Parts:
    """fired features, what each writes a unit (T, 1) scaled, the error (T, D), and the activation itself (T, D)."""

    fired: SparseFeatures
    scale: Tensor
    error: Tensor
    activation: Tensor


def attribute_features(
    model: GradientModel,
    tokens_T: Tensor,
    dictionary: Dictionary,
    metric: Metric,
    *,
    steps: int = 10,
    baseline_T: Tensor | None = None,
) -> FeatureAttribution:
    """Attribute to a dictionary's features: by the gradient alone where `steps` is 0.

    baseline_T: another input of the same length; None removes every feature and the error.
    """
    point = _output(model, dictionary)
    tokens = model.tokens(tokens_T)
    here = _take_apart(model, tokens, dictionary, point)
    fired, error, start = here.fired, here.error, here.activation - here.error
    if baseline_T is None:
        start = start - _written(dictionary, fired, here.scale)
    else:
        other_tokens = model.tokens(baseline_T)
        if other_tokens.shape != tokens.shape:
            raise InvalidArgument(
                f"The inputs have {tokens.shape[1]} and {other_tokens.shape[1]} tokens.",
                reason=reasons.VALUE_OUT_OF_RANGE,
                field="baseline",
                value=other_tokens.shape[1],
                remedy="Use inputs of equal length.",
            )
        other = _take_apart(model, other_tokens, dictionary, point)
        fired, error, start = _difference(fired, other.fired), error - other.error, other.activation
    gradient, value, baseline_value = _mean_gradient(
        model, tokens, metric, point, start, here.activation, steps
    )
    ids = fired.ids.long()
    pulls = (gradient * here.scale)[fired.rows]
    scores = fired.values * (dictionary.decoder_rows(ids) * pulls).sum(-1)
    return FeatureAttribution(
        features=fired.with_values(scores),
        errors=(gradient * error).sum(-1),
        value=value,
        baseline_value=baseline_value,
    )


def _mean_gradient(
    model: GradientModel, tokens: Tensor, metric: Metric, point: str, start: Tensor, end: Tensor, steps: int
) -> tuple[Tensor, float, float]:
    """(T, D) mean gradient on the way from `start` to `end`, and the metric at both ends."""
    places = torch.tensor(
        [1.0] if steps == 0 else [(k + 0.5) / steps for k in range(steps)], device=end.device
    )
    rows = start + places[:, None, None] * (end - start)
    run = model.forward(
        tokens.expand(len(places), -1),
        read=metric.reads,
        differentiate=[point],
        edits={point: [setting(rows)]},
    )
    gradient = run.gradients(metric(run).sum())[point].mean(0)
    with torch.no_grad():
        ends = torch.stack([end, start])
        at_ends = model.forward(tokens.expand(2, -1), read=metric.reads, edits={point: [setting(ends)]})
        value, baseline_value = metric(at_ends).tolist()
    return gradient, value, baseline_value


@torch.no_grad()
def _take_apart(model: GradientModel, tokens: Tensor, dictionary: Dictionary, point: str) -> _Parts:
    points = dictionary.facts.hook_points_in
    run = model.forward(tokens, read=[*points, point])
    sites = [run.readings[name][0] for name in points]
    x = sites[0] if len(sites) == 1 else torch.stack(sites, dim=1)
    fired = dictionary.encode(x)
    activation = run.readings[point][0]
    error = activation - dictionary.decode(fired, x)
    return _Parts(fired=fired, scale=dictionary.output_scale(x), error=error, activation=activation)


def _written(dictionary: Dictionary, fired: SparseFeatures, scale: Tensor) -> Tensor:
    """(T, D): what the features write, without the decoder's bias."""
    rows = dictionary.decoder_rows(fired.ids.long()) * fired.values[:, None]
    out = torch.zeros(fired.n_positions, rows.shape[-1], device=rows.device)
    return out.index_add_(0, fired.rows, rows) * scale


def _difference(a: SparseFeatures, b: SparseFeatures) -> SparseFeatures:
    """a - b, feature by feature."""
    keys = torch.cat([f.rows * f.d_sae + f.ids for f in (a, b)])
    distinct, place = keys.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    values = torch.zeros(distinct.numel(), device=keys.device)
    values.index_add_(0, place, torch.cat([a.values, -b.values]))
    return SparseFeatures.from_entries(
        distinct // a.d_sae, distinct % a.d_sae, values, a.n_positions, a.d_sae
    )


def _output(model: GradientModel, dictionary: Dictionary) -> str:
    facts = dictionary.facts
    if len(facts.hook_points_out) != 1:
        raise FailedPrecondition(
            f"Dictionary {facts.name!r} writes at {len(facts.hook_points_out)} hook points.",
            reason=reasons.DICTIONARY_MISMATCH,
            field="dictionary",
            value=facts.name,
            remedy="Use a dictionary of one hook point, or an attribution graph for a cross-layer transcoder.",
        )
    return model.table.resolve(facts.hook_points_out[0]).name

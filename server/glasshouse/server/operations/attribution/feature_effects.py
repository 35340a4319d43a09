"""What features set to values bring about: measured, and as direct effects predict.

1. The prompt runs through the mode asked for twice, without and with the settings.
2. The prediction is that of the direct effects alone: read off a graph's edges where a graph is given, (v - a) / a times
   the edge from the feature for each setting v of an activation a; else measured with everything else held
   (`constrained` at every layer), which is what an edge is.
3. Predicted and measured are compared on the pre-activations of the reported features, and on demeaned logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glasshouse.server.attribution.attribution_graph import AttributionGraph
from glasshouse.server.attribution.feature_interventions import (
    FeatureSetting,
    InterventionResult,
    Mode,
    intervene,
)
from glasshouse.server.attribution.gradient_model import GradientModel
from glasshouse.server.attribution.local_model import LocalModel
from glasshouse.server.attribution.transcoders import ActiveFeatures, Transcoders
from glasshouse.server.dictionaries.dictionary import Dictionary
from glasshouse.server.dictionaries.features import SparseFeatures
from glasshouse.server.types.errors import InvalidArgument
from glasshouse.wire import reasons


@dataclass(frozen=True, kw_only=True, eq=False)
class EffectsRequest:
    """What is set, and how the rest is held. `graph`: where predictions come from."""

    tokens: tuple[int, ...]
    dictionaries: Sequence[Dictionary]
    settings: Sequence[FeatureSetting]
    mode: Mode = "constrained"
    layers: tuple[int, ...] | None = None
    graph: AttributionGraph | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Effects:
    """features: those reported, n of them. before, after, predicted: pre-activations and their predicted change, (n,).
    activations_*: (n,). logits_*: (V,), before any soft cap. predicted_logits: (V,) change of the demeaned logits, nan
    where nothing predicts it.
    """

    features: ActiveFeatures
    before: Tensor
    after: Tensor
    predicted: Tensor
    activations_before: Tensor
    activations_after: Tensor
    logits_before: Tensor
    logits_after: Tensor
    predicted_logits: Tensor


def measure(model: GradientModel, asked: EffectsRequest) -> Effects:
    """Runs the prompt two to four times."""
    local = LocalModel(model, Transcoders(model, asked.dictionaries), torch.tensor(asked.tokens))
    before = intervene(local, (), mode=asked.mode, layers=asked.layers)
    after = intervene(local, asked.settings, mode=asked.mode, layers=asked.layers)
    features = local.features if asked.graph is None else asked.graph.features
    if asked.graph is not None:
        predicted, logits = _from_edges(asked.graph, asked.settings, len(before.logits))
    elif asked.mode == "constrained" and asked.layers is None:
        predicted, logits = _change(local, features, before, after)
    else:
        direct = [intervene(local, some) for some in ((), asked.settings)]
        predicted, logits = _change(local, features, direct[0], direct[1])
    return Effects(
        features=features,
        before=before.pre_activations(local, features),
        after=after.pre_activations(local, features),
        predicted=predicted,
        activations_before=_values(before.features, features),
        activations_after=_values(after.features, features),
        logits_before=before.logits,
        logits_after=after.logits,
        predicted_logits=logits,
    )


def _change(
    local: LocalModel, features: ActiveFeatures, before: InterventionResult, after: InterventionResult
) -> tuple[Tensor, Tensor]:
    moved = after.logits - before.logits
    return (
        after.pre_activations(local, features) - before.pre_activations(local, features),
        moved - moved.mean(),
    )


def _from_edges(
    graph: AttributionGraph, settings: Sequence[FeatureSetting], vocab_size: int
) -> tuple[Tensor, Tensor]:
    """(n,) and (V,) changes that the edges predict."""
    features = graph.features
    factors = torch.zeros(graph.edges.n_nodes)
    for index, setting in enumerate(settings):
        position = setting.position % graph.n_positions
        here = (
            (features.layers == setting.layer)
            & (features.indices == setting.index)
            & (features.positions == position)
        )
        found = here.nonzero().squeeze(1).tolist()
        if not found:
            raise InvalidArgument(
                f"feature {setting.index} of layer {setting.layer} at position {position} is no node of the graph",
                reason=reasons.FEATURE_OUT_OF_RANGE,
                field=f"settings[{index}]",
                value=f"{setting.layer}_{setting.index}_{position}",
                remedy="set nodes of the graph, or give the input without the graph",
            )
        (node,) = found
        activation = float(features.values[node])
        factors[node] = (setting.value - activation) / activation
    edges = graph.edges
    change = torch.zeros(edges.n_nodes).index_add_(
        0, edges.targets, edges.weights.cpu() * factors[edges.sources]
    )
    logits = torch.full((vocab_size,), float("nan"))
    for node, logit in enumerate(graph.logits, start=graph.first_logit):
        if logit.token_id is not None:
            logits[logit.token_id] = change[node]
    return change[: graph.first_error], logits


def _values(fired: Sequence[SparseFeatures], features: ActiveFeatures) -> Tensor:
    """(n,): the activations of `features` in what fired."""
    found = torch.zeros(len(features))
    for d, sparse in enumerate(fired):
        mine = (features.dictionaries == d).nonzero().squeeze(1)
        if not mine.numel():
            continue
        known = (sparse.rows * sparse.d_sae + sparse.ids).cpu()
        order = known.argsort()
        wanted = features.positions[mine].cpu() * sparse.d_sae + features.ids[mine].cpu()
        place = torch.searchsorted(known[order], wanted).clamp_max(max(known.numel() - 1, 0))
        if known.numel():
            hit = known[order][place] == wanted
            found[mine.cpu()] = torch.where(hit, sparse.values.float().cpu()[order][place], 0.0)
    return found


def correlation(predicted: NDArray[np.float64], measured: NDArray[np.float64]) -> float:
    """Pearson's r of what is predicted; nan where it is not defined."""
    known = np.isfinite(predicted) & np.isfinite(measured)
    a, b = predicted[known], measured[known]
    if len(a) < 2 or a.std() < 1e-12 or b.std() < 1e-12:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])

"""Input-invariant weights between transcoder features: decoder . encoder, without running a prompt.

The direct weight of feature s (which writes at a layer) on feature t (which reads a later stream) is W_dec_s . W_enc_t:
what one unit of s adds to t's pre-activation at the same position through the stream, before t's norm scales it. For
a cross-layer transcoder the writes of every layer before the one that t reads are summed. Where the feature reads
behind a norm, that norm's gain and a constant scale of one stand in: weights rank connections of one target, and are
not comparable between targets that read through norms of different scale. A post-norm on the way is not in them.

https://transformer-circuits.pub/2025/attribution-graphs/methods.html (virtual weights)

Shapes: D d_model, F features of one layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from glasshouse.server.attribution.transcoders import ActiveFeatures, Transcoders
from glasshouse.server.types.errors import NotFound
from glasshouse.wire import reasons

_FEATURES_AT_A_TIME = 4096


@dataclass(frozen=True, kw_only=True)
class Connection:
    """The weight between the asked feature and `index` of `layer`."""

    layer: int
    index: int
    weight: float


def incoming(transcoders: Transcoders, layer: int, index: int, *, top: int = 10) -> list[Connection]:
    """The features of earlier layers with the largest weights on this one, by magnitude."""
    encoder = transcoders.encoder_rows(_one(transcoders, layer, index))[0]
    found: list[Connection] = []
    for features in _all(transcoders, [other for other in transcoders.reads if other < layer]):
        weights = torch.zeros(len(features), device=encoder.device)
        for written, (places, rows) in transcoders.decoder_rows(features).items():
            if written < layer:
                weights[places] += rows @ encoder
        found = _best(found, features, weights, top)
    return found


def outgoing(transcoders: Transcoders, layer: int, index: int, *, top: int = 10) -> list[Connection]:
    """The features of later layers on which this one has the largest weights, by magnitude."""
    writes = {
        w: rows[0] for w, (_, rows) in transcoders.decoder_rows(_one(transcoders, layer, index)).items()
    }
    found: list[Connection] = []
    for later in [other for other in transcoders.reads if other > layer]:
        reached = [row for written, row in writes.items() if written < later]
        if not reached:
            continue
        written_D = torch.stack(reached).sum(0)
        for features in _all(transcoders, [later]):
            found = _best(found, features, transcoders.encoder_rows(features) @ written_D, top)
    return found


def _best(found: list[Connection], features: ActiveFeatures, weights: Tensor, top: int) -> list[Connection]:
    places = weights.abs().topk(min(top, weights.numel())).indices.tolist()
    more = [
        Connection(layer=int(features.layers[i]), index=int(features.indices[i]), weight=float(weights[i]))
        for i in places
    ]
    return sorted([*found, *more], key=lambda connection: abs(connection.weight), reverse=True)[:top]


def _all(transcoders: Transcoders, layers: list[int]) -> Iterator[ActiveFeatures]:
    """Every feature of the layers, some at a time, as if each fired with value one."""
    for layer in layers:
        size = transcoders.n_features(layer)
        for first in range(0, size, _FEATURES_AT_A_TIME):
            yield transcoders.named(layer, torch.arange(first, min(first + _FEATURES_AT_A_TIME, size)))


def _one(transcoders: Transcoders, layer: int, index: int) -> ActiveFeatures:
    if transcoders.find(layer, index) is None:
        raise NotFound(
            f"There is no feature {index} of layer {layer}.",
            reason=reasons.FEATURE_OUT_OF_RANGE,
            resource_type="feature",
            resource_name=f"{layer}/{index}",
            field="feature",
            remedy="Use a layer with a transcoder and one of its features.",
        )
    return transcoders.named(layer, torch.tensor([index]))

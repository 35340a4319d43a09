"""Testing a graph's claims: features set to values, and what then happens to every other and to the logits.

An intervention sets the activation of a feature at a position: delta = (value - a) * decoder row, added to every MLP
contribution that the feature writes.

- *constrained*: attention patterns, norm scales and the MLP contributions of `layers` (all by default) are held at
  the prompt's own. What moves are direct effects: exactly the graph's edges.
- *frozen_attention*: patterns alone are held; norms and MLPs respond.
- *open*: nothing is held.

Within held layers a is the activation on the prompt, elsewhere the one at that moment, encoded anew. For the graph's
prediction logits are taken before the final soft cap.

Shapes: T positions, D d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from glasshouse.server.attribution.freezing import NOTHING_FROZEN, Freeze
from glasshouse.server.attribution.gradient_model import Edit
from glasshouse.server.attribution.local_model import LocalModel
from glasshouse.server.attribution.transcoders import ActiveFeatures
from glasshouse.server.dictionaries.features import SparseFeatures
from glasshouse.server.types.errors import InvalidArgument
from glasshouse.wire import reasons

Mode = Literal["constrained", "frozen_attention", "open"]


@dataclass(frozen=True, kw_only=True)
class FeatureSetting:
    """Feature `index` of the transcoder that reads `layer`, at `position`, set to `value`."""

    layer: int
    position: int
    index: int
    value: float


@dataclass(frozen=True, kw_only=True, eq=False)
class InterventionResult:
    """logits: (V,) at the last position, before the final soft cap. inputs: what transcoders read, hook point ->
    (T, D). features: what every dictionary fires then.
    """

    logits: Tensor
    inputs: dict[str, Tensor]
    features: tuple[SparseFeatures, ...]

    def pre_activations(self, local: LocalModel, features: ActiveFeatures) -> Tensor:
        """(n,): encoder row . input of each feature at its position, without the encoder's bias."""
        rows = local.transcoders.encoder_rows(features)
        points = [local.transcoders.reads[layer] for layer in features.layers.tolist()]
        positions = features.positions.tolist()
        x = torch.stack([self.inputs[name][position] for name, position in zip(points, positions)])
        return (rows * x).sum(-1)


@torch.no_grad()
def intervene(
    local: LocalModel,
    settings: Sequence[FeatureSetting],
    *,
    mode: Mode = "constrained",
    layers: Sequence[int] | None = None,
) -> InterventionResult:
    """Run the prompt with features set. Without settings it is the mode's own base line."""
    transcoders, n_layers = local.transcoders, local.model.n_layers
    held = set(range(n_layers) if layers is None else layers) if mode == "constrained" else set()
    inputs: dict[str, Tensor] = {}
    edits: dict[str, list[Edit]] = {name: [_noting(inputs, name)] for name in local.inputs}
    for layer, name in enumerate(transcoders.written):
        steps = edits.setdefault(name, [])
        if layer in held:
            steps.append(_holding(local, inputs, layer))
    for setting in settings:
        for layer, step in _set(local, setting, inputs, setting.layer in held).items():
            edits[transcoders.written[layer]].append(step)
    run = local.model.forward(local.tokens, edits=edits, freeze=_freeze(local, mode))
    found = {name: x[0] for name, x in inputs.items()}
    return InterventionResult(
        logits=run.logits(capped=False)[0], inputs=found, features=tuple(transcoders.encode(inputs))
    )


def _freeze(local: LocalModel, mode: Mode) -> Freeze:
    if mode == "open":
        return NOTHING_FROZEN
    return Freeze(patterns=True, norms=mode == "constrained", held=local.held)


def _noting(inputs: dict[str, Tensor], name: str) -> Edit:
    def edit(live: Tensor) -> None:
        inputs[name] = live.clone()

    return edit


def _holding(local: LocalModel, inputs: dict[str, Tensor], layer: int) -> Edit:
    """The contribution as on the prompt, but for what skip connections carry."""
    skips = [(read, W) for read, written, W in local.transcoders.skips() if written == layer]

    def edit(live: Tensor) -> None:
        moved = sum((inputs[read] - local.inputs[read]) @ W for read, W in skips)
        live.copy_(local.mlp_out[layer] + moved)

    return edit


def _set(
    local: LocalModel, setting: FeatureSetting, inputs: dict[str, Tensor], held: bool
) -> dict[int, Edit]:
    """Layer written -> the edit that adds the feature's change there."""
    feature = _feature(local, setting)
    read = local.transcoders.reads[setting.layer]
    dictionary = int(feature.dictionaries[0])

    def delta() -> float:
        seen = local.inputs if held else {**local.inputs, **inputs}
        fired = local.transcoders.encode(seen)[dictionary]
        ids, values = fired.row(setting.position % local.tokens.shape[1])
        now = values[ids == int(feature.ids[0])]
        return setting.value - (float(now[0]) if now.numel() else 0.0)

    def adding(row: Tensor) -> Edit:
        def edit(live: Tensor) -> None:
            assert read in inputs, "a transcoder reads before it writes"
            live[:, setting.position] += delta() * row

        return edit

    return {layer: adding(rows[0]) for layer, (_, rows) in local.transcoders.decoder_rows(feature).items()}


def _feature(local: LocalModel, setting: FeatureSetting) -> ActiveFeatures:
    """The setting's feature as one entry, whether it fires on the prompt or not."""
    transcoders = local.transcoders
    where = transcoders.find(setting.layer, setting.index)
    if where is None or not -local.tokens.shape[1] <= setting.position < local.tokens.shape[1]:
        raise InvalidArgument(
            f"There is no feature {setting.index} of layer {setting.layer} at position {setting.position}.",
            reason=reasons.FEATURE_OUT_OF_RANGE if where is None else reasons.POSITION_UNREACHABLE,
            field="settings",
            value=(setting.layer, setting.index, setting.position),
            remedy="Use a layer with a transcoder, one of its features and a position of the prompt.",
        )
    return transcoders.named(
        setting.layer, torch.tensor([setting.index]), position=setting.position % local.tokens.shape[1]
    )

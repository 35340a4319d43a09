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
from dataclasses import dataclass, replace
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
    for read in sorted({setting.layer for setting in settings}):
        some = [setting for setting in settings if setting.layer == read]
        for layer, step in _set(local, some, inputs, read in held).items():
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
    local: LocalModel, settings: Sequence[FeatureSetting], inputs: dict[str, Tensor], held: bool
) -> dict[int, Edit]:
    """Layer written -> the edit that adds there what features of one layer change by."""
    features = _features(local, settings)
    read, dictionary = local.transcoders.reads[settings[0].layer], int(features.dictionaries[0])
    known: list[Tensor] = []

    def change() -> Tensor:
        """(n,), once: what is read does not move any more when the first of them writes."""
        if not known:
            seen = local.inputs if held else {**local.inputs, **inputs}
            distinct, which = features.ids.unique(return_inverse=True)  # type: ignore[no-untyped-call]
            now = local.transcoders.values_of(dictionary, distinct, seen)
            known.append(features.values - now[features.positions, which])
        return known[0]

    def adding(places: Tensor, rows: Tensor) -> Edit:
        def edit(live: Tensor) -> None:
            assert read in inputs, "a transcoder reads before it writes"
            added = change()[places, None] * rows
            live.index_add_(1, features.positions[places], added.expand(live.shape[0], -1, -1))

        return edit

    return {
        layer: adding(places, rows)
        for layer, (places, rows) in local.transcoders.decoder_rows(features).items()
    }


def _features(local: LocalModel, settings: Sequence[FeatureSetting]) -> ActiveFeatures:
    """The settings' features of one layer, whether they fire on the prompt or not; `values` are those to be set."""
    transcoders, n_positions = local.transcoders, local.tokens.shape[1]
    for setting in settings:
        where = transcoders.find(setting.layer, setting.index)
        if where is None or not -n_positions <= setting.position < n_positions:
            raise InvalidArgument(
                f"There is no feature {setting.index} of layer {setting.layer} at position {setting.position}.",
                reason=reasons.FEATURE_OUT_OF_RANGE if where is None else reasons.POSITION_UNREACHABLE,
                field="settings",
                value=(setting.layer, setting.index, setting.position),
                remedy="Use a layer with a transcoder, one of its features and a position of the prompt.",
            )
    found = transcoders.named(settings[0].layer, torch.tensor([setting.index for setting in settings]))
    device = found.ids.device
    return replace(
        found,
        positions=torch.tensor([setting.position % n_positions for setting in settings], device=device),
        values=torch.tensor([setting.value for setting in settings], device=device),
    )

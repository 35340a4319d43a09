"""The transcoders that stand in for a model's MLPs: one a layer, or one cross-layer transcoder.

Both are the same here: features that read one hook point each and write at the MLP contributions of one or more
layers. An active feature is one (position, feature) with a non-zero activation. Per-layer sets may leave layers
out; such an MLP is all error.

Shapes: T positions, D d_model, n active features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glasshouse.server.attribution.frozen_paths import FrozenPaths
from glasshouse.server.attribution.gradient_model import GradientModel
from glasshouse.server.dictionaries.dictionary import Dictionary
from glasshouse.server.dictionaries.features import SparseFeatures
from glasshouse.server.dictionaries.linear import LinearDictionary
from glasshouse.server.types.errors import FailedPrecondition
from glasshouse.wire import reasons

_KINDS = ("transcoder", "cross_layer_transcoder")


@dataclass(frozen=True, kw_only=True, eq=False)
class ActiveFeatures:
    """n features, int64 (n,) each: the layer read, the position, the index within the layer, the dictionary and
    the flat id in it; values (n,) float32. Ordered by layer, position, index.
    """

    layers: Tensor
    positions: Tensor
    indices: Tensor
    dictionaries: Tensor
    ids: Tensor
    values: Tensor

    def __len__(self) -> int:
        return int(self.ids.numel())

    def select(self, which: Tensor) -> ActiveFeatures:
        """The features at these places, in this order."""
        return ActiveFeatures(
            layers=self.layers[which],
            positions=self.positions[which],
            indices=self.indices[which],
            dictionaries=self.dictionaries[which],
            ids=self.ids[which],
            values=self.values[which],
        )


class Transcoders:
    """A checked set of transcoders for one model.

    reads: layer -> hook point that its features read. n_layers MLP contributions are written to.
    """

    def __init__(self, model: GradientModel, dictionaries: Sequence[Dictionary]) -> None:
        self.model = model
        self.dictionaries = tuple(dictionaries)
        self.written = [f"blocks.{layer}.hook_mlp_out" for layer in range(model.n_layers)]
        self.reads: dict[int, str] = {}
        self._points_in: list[list[str]] = []
        self._layers_in: list[list[int]] = []
        self._layers_out: list[list[int]] = []
        for dictionary in self.dictionaries:
            self._check(dictionary)
            facts = dictionary.facts
            points = [model.table.resolve(name) for name in facts.hook_points_in]
            outs = [model.table.resolve(name).name for name in facts.hook_points_out]
            if any(name not in self.written for name in outs):
                raise _mismatch(
                    facts.name, f"it writes at {', '.join(outs)}", "Use transcoders of hook_mlp_out."
                )
            self._points_in.append([point.name for point in points])
            self._layers_in.append([point.layer or 0 for point in points])
            self._layers_out.append([self.written.index(name) for name in outs])
            for point, out in zip(points, outs):
                if not FrozenPaths.readable(model, point.name):
                    raise _mismatch(
                        facts.name,
                        f"it reads {point.name}",
                        "Use transcoders that read the stream, directly or through one norm (ln2.hook_out).",
                    )
                if model.table.position(point.name) >= model.table.position(out):
                    raise _mismatch(
                        facts.name, f"{point.name} runs after {out}", "Use a transcoder of an MLP."
                    )
                if (point.layer or 0) in self.reads:
                    raise _mismatch(facts.name, f"layer {point.layer} has a transcoder", "Give one a layer.")
                self.reads[point.layer or 0] = point.name

    def encode(self, readings: Mapping[str, Tensor]) -> list[SparseFeatures]:
        """Every dictionary's features on readings of `reads`, (1, T, D) each."""
        return [
            dictionary.encode(self._inputs(d, readings)) for d, dictionary in enumerate(self.dictionaries)
        ]

    def values_of(self, d: int, ids: Tensor, readings: Mapping[str, Tensor]) -> Tensor:
        """(T, len(ids)): activations of some of a dictionary's features, by flat id."""
        return self.dictionaries[d].encode_features(self._inputs(d, readings), ids)

    def active(self, fired: Sequence[SparseFeatures], *, skip_first: bool) -> ActiveFeatures:
        """What fired, in order; `skip_first` leaves position 0 out."""
        columns: list[list[Tensor]] = []
        for d, features in enumerate(fired):
            sizes = torch.tensor(self.dictionaries[d].facts.group_sizes, device=features.ids.device)
            ids = features.ids.long()
            ends = sizes.cumsum(0)
            groups = torch.bucketize(ids, ends, right=True)
            layers = torch.tensor(self._layers_in[d], device=ids.device)[groups]
            indices = ids - (ends - sizes)[groups]
            columns.append([layers, features.rows, indices, torch.full_like(ids, d), ids, features.values])
        layers, positions, indices, which, ids, values = (torch.cat(parts) for parts in zip(*columns))
        keep = positions > 0 if skip_first else positions >= 0
        found = ActiveFeatures(
            layers=layers, positions=positions, indices=indices, dictionaries=which, ids=ids, values=values
        ).select(keep.nonzero().squeeze(1))
        order = torch.arange(len(found), device=ids.device)
        for key in (found.indices, found.positions, found.layers):
            order = order[key[order].argsort(stable=True)]
        return found.select(order)

    def find(self, layer: int, index: int) -> tuple[int, int] | None:
        """(dictionary, flat id) of a layer's feature; None where there is none."""
        for d, layers in enumerate(self._layers_in):
            if layer in layers:
                group = layers.index(layer)
                facts = self.dictionaries[d].facts
                return (d, facts.flat_id(group, index)) if 0 <= index < facts.group_sizes[group] else None
        return None

    def n_features(self, layer: int) -> int:
        """How many features read a layer."""
        for d, layers in enumerate(self._layers_in):
            if layer in layers:
                return self.dictionaries[d].facts.group_sizes[layers.index(layer)]
        return 0

    def named(self, layer: int, indices: Tensor, *, position: int = 0) -> ActiveFeatures:
        """Features of a layer by their indices, as if each fired with value one."""
        first = self.find(layer, 0)
        assert first is not None, "asked of layers with a transcoder"
        indices = indices.to(self.model.loaded.device)

        def same(value: int) -> Tensor:
            return torch.full_like(indices, value)

        return ActiveFeatures(
            layers=same(layer),
            positions=same(position),
            indices=indices,
            dictionaries=same(first[0]),
            ids=indices + first[1],
            values=torch.ones(indices.numel(), device=indices.device),
        )

    def encoder_rows(self, features: ActiveFeatures) -> Tensor:
        """(n, D): what each feature reads at its own hook point."""
        rows = torch.zeros(len(features), self.model.loaded.d_model, device=features.ids.device)
        for d, dictionary in enumerate(self.dictionaries):
            mine = (features.dictionaries == d).nonzero().squeeze(1)
            if mine.numel():
                found = dictionary.encoder_rows(features.ids[mine])
                if found.ndim == 3:
                    layers = torch.tensor(self._layers_in[d], device=mine.device)
                    site = (features.layers[mine][:, None] == layers).long().argmax(1)
                    found = found[torch.arange(mine.numel()), site]
                rows[mine] = found
        return rows

    def decoder_rows(self, features: ActiveFeatures) -> dict[int, tuple[Tensor, Tensor]]:
        """Layer written -> (places among the features (m,), what one unit of each writes there (m, D))."""
        parts: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for d, dictionary in enumerate(self.dictionaries):
            mine = (features.dictionaries == d).nonzero().squeeze(1)
            if not mine.numel():
                continue
            rows = dictionary.decoder_rows(features.ids[mine])
            rows = rows[:, None] if rows.ndim == 2 else rows
            for site, layer in enumerate(self._layers_out[d]):
                writes = rows[:, site].abs().amax(-1) > 0
                if bool(writes.any()):
                    parts.setdefault(layer, []).append((mine[writes], rows[writes, site]))
        return {
            layer: (torch.cat([p for p, _ in found]), torch.cat([r for _, r in found]))
            for layer, found in parts.items()
        }

    def writers(self, layer: int) -> list[int]:
        """The layers whose features can write at a layer's MLP contribution."""
        return sorted(
            read
            for d, outs in enumerate(self._layers_out)
            if layer in outs
            for group, read in enumerate(self._layers_in[d])
            if self.dictionaries[d].writes_at(group, outs.index(layer))
        )

    def rows_at(self, read: int, indices: Tensor, written: int) -> Tensor:
        """(m, D): what one unit of each feature of a layer (by index) writes at the contribution of layer `written`."""
        found = self.find(read, 0)
        assert found is not None, "asked of `writers`"
        d, first = found
        return self.dictionaries[d].decoder_rows_at(indices + first, self._layers_out[d].index(written))

    def reconstruction(self, fired: Sequence[SparseFeatures], readings: Mapping[str, Tensor]) -> Tensor:
        """(L, T, D): what features, biases and skip connections make of every MLP contribution."""
        n_positions = next(iter(readings.values())).shape[1]
        out = torch.zeros(
            self.model.n_layers, n_positions, self.model.loaded.d_model, device=self.model.loaded.device
        )
        for d, dictionary in enumerate(self.dictionaries):
            made = dictionary.decode(fired[d], self._inputs(d, readings))
            made = made[:, None] if made.ndim == 2 else made
            for site, layer in enumerate(self._layers_out[d]):
                out[layer] += made[:, site]
        return out

    def skips(self) -> list[tuple[str, int, Tensor]]:
        """(hook point read, layer written, W_skip (D, D)) of every skip connection."""
        found = []
        for d, dictionary in enumerate(self.dictionaries):
            if isinstance(dictionary, LinearDictionary):
                for skip in dictionary.parameters.skips:
                    read, layer = self._points_in[d][skip.site_in], self._layers_out[d][skip.site_out]
                    found.append((read, layer, skip.W_skip.float()))
        return found

    def _inputs(self, d: int, readings: Mapping[str, Tensor]) -> Tensor:
        """(T, D), or (T, S, D) for a dictionary that reads several hook points."""
        sites = [readings[name][0] for name in self._points_in[d]]
        return sites[0] if len(sites) == 1 else torch.stack(sites, dim=1)

    def _check(self, dictionary: Dictionary) -> None:
        facts, d_model = dictionary.facts, self.model.loaded.d_model
        if facts.kind not in _KINDS:
            raise _mismatch(facts.name, f"it is a {facts.kind}", "Use per-layer or cross-layer transcoders.")
        if facts.normalisation != "none":
            what = f"it normalises its inputs ({facts.normalisation})"
            raise _mismatch(facts.name, what, "Use a transcoder whose features are linear in what they read.")
        if facts.has_skip and not isinstance(dictionary, LinearDictionary):
            raise _mismatch(facts.name, "its skip connection cannot be read", "Use one without it.")
        if (facts.d_in, facts.d_out) != (d_model, d_model):
            what = f"it maps {facts.d_in} to {facts.d_out} dimensions and the model has {d_model}"
            raise _mismatch(facts.name, what, "Use a transcoder of this model.")


def _mismatch(name: str, what: str, remedy: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"Dictionary {name!r} cannot stand in for MLPs: {what}.",
        reason=reasons.DICTIONARY_MISMATCH,
        field="dictionaries",
        value=name,
        remedy=remedy,
    )

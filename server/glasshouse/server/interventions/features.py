"""Edits of a dictionary's features, the dictionary's error kept.

1. The features are read from the activation at the dictionary's input hook point, as it stands when the edit's turn comes.
2. Each edited feature becomes a f + b: set is a = 0, b = value; scale is a = factor, b = 0.
3. The output hook point gets sum_i (a_i f_i + b_i - f_i) d_i, nothing else changes: what the dictionary does not explain
   stays as it was ("error preserved").

An SAE reads and writes the same point; a transcoder reads before its MLP and writes after it; a cross-layer transcoder's
feature reads at its own layer and writes there and at later ones. A crosscoder reads layers that come after those
it writes, which no single forward pass can do: it is refused.

Rows of all requests that edit through one dictionary are encoded together, for the union of their features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from glasshouse.server.dictionaries.dictionary import Dictionary
from glasshouse.server.types.errors import FailedPrecondition, InvalidArgument
from glasshouse.server.types.hook_points import HookPoint
from glasshouse.server.types.interventions import Intervention, ScaleFeatures, SetFeatures
from glasshouse.server.types.selectors import ResolvedPositions
from glasshouse.wire import reasons

from . import kernels
from .conditions import Gate
from .edits import GatedCells, PreparedIntervention, content_hash, finite

MAX_FEATURES = 4096


@dataclass(frozen=True, kw_only=True)
class FeaturePath:
    """Where some features of an edit are read and written: indices into the dictionary's input and output points."""

    source: int
    sinks: tuple[int, ...]
    # Which of the edit's features, by place in `feature_ids`.
    members: tuple[int, ...]


@dataclass(eq=False, kw_only=True)
class PreparedFeatureEdit(PreparedIntervention):
    """An edit of features `feature_ids` (int64 (F,), host): each becomes factor f + offset, float32 (F,) both."""

    dictionary: Dictionary
    points_in: tuple[HookPoint, ...]
    points_out: tuple[HookPoint, ...]
    feature_ids: tuple[int, ...]
    factors: tuple[float, ...]
    offsets: tuple[float, ...]


def prepare(
    intervention: Intervention,
    *,
    index: int,
    dictionary: Dictionary,
    points_in: tuple[HookPoint, ...],
    points_out: tuple[HookPoint, ...],
    positions: ResolvedPositions,
    field: str,
) -> PreparedFeatureEdit:
    """Checks a feature edit. `points_in` and `points_out` are the dictionary's, resolved; `field` the edit's path.

    Raises:
        InvalidArgument: no features, features twice, values that do not fit or are not finite, a hook point given.
        NotFound: a feature index out of range.
        FailedPrecondition: a dictionary that no single forward pass can steer.
    """
    edit = intervention.edit
    assert isinstance(edit, SetFeatures | ScaleFeatures)
    path = f"{field}.{edit.kind}"
    facts = dictionary.facts
    if intervention.hook_point:
        raise InvalidArgument(
            f"{edit.kind} takes no hook point: the dictionary names it",
            reason=reasons.FIELD_CONFLICT,
            field=f"{field}.hook_point",
            value=intervention.hook_point,
            remedy="leave hook_point empty",
        )
    if len(points_in) > 1 and facts.kind != "cross_layer_transcoder":
        raise FailedPrecondition(
            f"{facts.name} is a {facts.kind}: it reads hook points that come after those it writes",
            reason=reasons.CAPABILITY_MISSING,
            field=f"{path}.dictionary",
            value=facts.name,
            remedy="steer by its decoder rows with add_vector, or use an SAE or a transcoder",
        )
    _check_features(edit.features, path)
    dictionary.check_feature_ids(torch.tensor(edit.features, dtype=torch.int64), field=f"{path}.features")
    if isinstance(edit, SetFeatures):
        offsets = _each(edit.values, len(edit.features), f"{path}.values")
        factors = (0.0,) * len(offsets)
    else:
        factors = _each(edit.factors, len(edit.features), f"{path}.factors")
        offsets = (0.0,) * len(factors)
    return PreparedFeatureEdit(
        index=index,
        kind=edit.kind,
        hook_points=_written(points_out, dictionary, edit.features),
        positions=positions,
        preserve_norm=intervention.preserve_norm,
        content_hash=content_hash(
            (edit.kind, facts.name, intervention.preserve_norm, edit.features),
            positions,
            np.array([factors, offsets], dtype=np.float32),
        ),
        dictionary=dictionary,
        points_in=points_in,
        points_out=points_out,
        feature_ids=edit.features,
        factors=factors,
        offsets=offsets,
    )


def _check_features(features: Sequence[int], path: str) -> None:
    if not features:
        raise InvalidArgument(
            "no features are named",
            reason=reasons.FIELD_REQUIRED,
            field=f"{path}.features",
            remedy="name at least one feature",
        )
    if len(features) > MAX_FEATURES:
        raise InvalidArgument(
            f"{len(features)} features, {MAX_FEATURES} may be edited at once",
            reason=reasons.VALUE_OUT_OF_RANGE,
            field=f"{path}.features",
            value=len(features),
            remedy="name fewer features",
        )
    if len(set(features)) != len(features):
        twice = next(feature for feature in features if features.count(feature) > 1)
        raise InvalidArgument(
            f"feature {twice} is named twice",
            reason=reasons.FIELD_CONFLICT,
            field=f"{path}.features",
            value=twice,
            remedy="name each feature once",
        )


def _each(values: Sequence[float], n_features: int, field: str) -> tuple[float, ...]:
    if len(values) not in (1, n_features):
        raise InvalidArgument(
            f"{len(values)} values for {n_features} features",
            reason=reasons.FIELD_CONFLICT if values else reasons.FIELD_REQUIRED,
            field=field,
            value=len(values),
            remedy="give one value each, or one for all",
        )
    checked = tuple(finite(value, field) for value in values)
    return checked if len(checked) == n_features else checked * n_features


def paths(dictionary: Dictionary, n_points_out: int, feature_ids: Sequence[int]) -> list[FeaturePath]:
    """Which points the features are read and written at. A cross-layer transcoder's groups are its source layers."""
    if dictionary.facts.kind != "cross_layer_transcoder":
        return [
            FeaturePath(source=0, sinks=tuple(range(n_points_out)), members=tuple(range(len(feature_ids))))
        ]
    by_source: dict[int, list[int]] = {}
    for place, feature in enumerate(feature_ids):
        by_source.setdefault(dictionary.facts.group_of(feature)[0], []).append(place)
    return [
        FeaturePath(source=source, sinks=tuple(range(source, n_points_out)), members=tuple(members))
        for source, members in sorted(by_source.items())
    ]


def _written(
    points_out: tuple[HookPoint, ...], dictionary: Dictionary, feature_ids: Sequence[int]
) -> tuple[HookPoint, ...]:
    sinks = {sink for path in paths(dictionary, len(points_out), feature_ids) for sink in path.sinks}
    return tuple(points_out[sink] for sink in sorted(sinks))


class FeatureGroup:
    """Edits through one dictionary, in one round, of N cells: measured at its input points, written at its output points.

    `edits` with the number of cells of each; `owner_N` which edit a cell belongs to.
    """

    def __init__(
        self,
        edits: Sequence[PreparedFeatureEdit],
        counts: Sequence[int],
        rows_N: Tensor,
        columns_N: Tensor,
        owner_N: Tensor,
        gate: Gate | None = None,
    ) -> None:
        self.dictionary = edits[0].dictionary
        self.points_in, self.points_out = edits[0].points_in, edits[0].points_out
        self._edits, self._counts = edits, counts
        self._rows_N, self._columns_N = rows_N, columns_N
        self._gate = gate
        union = sorted({feature for edit in edits for feature in edit.feature_ids})
        place = {feature: index for index, feature in enumerate(union)}
        factors_EF = torch.ones(len(edits), len(union))
        offsets_EF = torch.zeros(len(edits), len(union))
        for index, edit in enumerate(edits):
            at = [place[feature] for feature in edit.feature_ids]
            factors_EF[index, at] = torch.tensor(edit.factors)
            offsets_EF[index, at] = torch.tensor(edit.offsets)
        device = rows_N.device
        self._gain_NF = (factors_EF.to(device) - 1.0)[owner_N]
        self._offset_NF = offsets_EF.to(device)[owner_N]
        keeps = [edit.preserve_norm for edit in edits]
        self._keep_norm_N1 = torch.tensor(keeps, device=device)[owner_N, None] if any(keeps) else None
        self.paths = paths(self.dictionary, len(self.points_out), union)
        ids = torch.tensor(union, dtype=torch.int64, device=device)
        self._members = [torch.tensor(path.members, device=device) for path in self.paths]
        self._ids = [ids[members] for members in self._members]
        # (F', E), or (F', M, E) where it writes several points: the edited features' rows and no others.
        self._decoder = [self.dictionary.decoder_rows(ids) for ids in self._ids]
        self._delta_NF: dict[int, Tensor] = {}
        self._scale: dict[int, Tensor] = {}
        self._first_sink = min(sink for path in self.paths for sink in path.sinks)

    @property
    def gated(self) -> GatedCells | None:
        """What its conditions let through in the pass that ran last; None where its edits have no condition."""
        if self._gate is None:
            return None
        return GatedCells(self._edits, self._gate, self._rows_N, self._columns_N)

    def measure(self, tensor_BTW: Tensor, path: int) -> None:
        """Reads the features of `paths[path]` at their input point and works out what is to change."""
        x_ND = tensor_BTW[self._rows_N, self._columns_N]
        source = self.paths[path].source
        if len(self.points_in) > 1:
            # Features of one source layer read that layer alone: the others' rows may be anything.
            x = x_ND.new_zeros((x_ND.shape[0], len(self.points_in), x_ND.shape[1]))
            x[:, source] = x_ND
        else:
            x = x_ND
            self._scale[path] = self.dictionary.output_scale(x)
        values_NF = self.dictionary.encode_features(x, self._ids[path])
        members = self._members[path]
        self._delta_NF[path] = self._gain_NF[:, members] * values_NF + self._offset_NF[:, members]

    def is_first(self, sink: int) -> bool:
        """Whether `sink` is the first point it writes."""
        return sink == self._first_sink

    def write(self, tensor_BTW: Tensor, sink: int) -> None:
        """Adds the change at output point `sink`, in place."""
        cells = tensor_BTW[self._rows_N, self._columns_N]
        s_NW = cells.float()
        edited = s_NW
        for index, path in enumerate(self.paths):
            if sink not in path.sinks:
                continue
            rows = self._decoder[index]
            several = rows.dim() == 3
            change = self._delta_NF[index] @ (rows[:, sink] if several else rows)
            scale = self._scale.get(index)
            if scale is not None:
                change = change * (scale[:, sink] if scale.dim() == 3 else scale)
            edited = edited + change
        if self._keep_norm_N1 is not None:
            edited = kernels.restore_norm(edited, s_NW, self._keep_norm_N1)
        if self._gate is not None:
            open_N1 = self._gate.open()
            edited = torch.where(open_N1, edited, s_NW)
            if sink == self._first_sink:
                self._gate.count(open_N1)
        tensor_BTW[self._rows_N, self._columns_N] = edited.to(tensor_BTW.dtype)
        if sink == self._first_sink:
            for edit, count in zip(self._edits, self._counts, strict=True):
                edit.applied += count


@dataclass(frozen=True, eq=False)
class FeatureMeasurement:
    """A feature group's reading at one of its input points."""

    group: FeatureGroup
    path: int

    def apply(self, tensor_BTW: Tensor) -> None:
        """Reads; changes nothing."""
        self.group.measure(tensor_BTW, self.path)


@dataclass(frozen=True, eq=False)
class FeatureWriting:
    """A feature group's writing at one of its output points."""

    group: FeatureGroup
    sink: int

    @property
    def counts(self) -> bool:
        """Whether this writing is the one that counts the edits: the first of a group's."""
        return self.group.is_first(self.sink)

    def apply(self, tensor_BTW: Tensor) -> None:
        """Edits in place."""
        self.group.write(tensor_BTW, self.sink)

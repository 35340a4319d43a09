"""Edits of the forward pass as plain values. Vectors are float32 numpy arrays; `engines.preparation` checks them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .selectors import EVERYWHERE, Selector

FloatArray = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


@dataclass(frozen=True, kw_only=True)
class AddVector:
    """s + c v, or with `norm_scaled` s + c |s| v/|v|. `vector`: (width,)."""

    vector: FloatArray
    coefficient: float = 1.0
    norm_scaled: bool = False
    kind = "add_vector"


@dataclass(frozen=True, kw_only=True)
class AblateDirection:
    """s - (s.v^) v^. `vector`: (width,)."""

    vector: FloatArray
    kind = "ablate_direction"


@dataclass(frozen=True, kw_only=True)
class CapProjection:
    """s with s.v^ clamped to [minimum, maximum], either of them absent. `vector`: (width,)."""

    vector: FloatArray
    maximum: float | None = None
    minimum: float | None = None
    kind = "cap_projection"


@dataclass(frozen=True, kw_only=True)
class Rotate:
    """s turned to `angle_radians` within the plane of `first` and `second`, both (width,) (angular steering)."""

    first: FloatArray
    second: FloatArray
    angle_radians: float = 0.0
    kind = "rotate"


@dataclass(frozen=True, kw_only=True)
class Replace:
    """s replaced by `activations`: (n, width), one row a selected position in ascending order, or (width,)."""

    activations: FloatArray
    kind = "replace"


@dataclass(frozen=True, kw_only=True)
class SetFeatures:
    """Features of a dictionary set to `values` (one each, or one for all), the rest of the activation kept."""

    dictionary: str
    features: tuple[int, ...]
    values: tuple[float, ...]
    kind = "set_features"


@dataclass(frozen=True, kw_only=True)
class ScaleFeatures:
    """Features of a dictionary multiplied by `factors` (one each, or one for all)."""

    dictionary: str
    features: tuple[int, ...]
    factors: tuple[float, ...]
    kind = "scale_features"


FeatureEdit = SetFeatures | ScaleFeatures
Edit = AddVector | AblateDirection | CapProjection | Rotate | Replace | FeatureEdit


@dataclass(frozen=True, kw_only=True)
class Intervention:
    """One edit: where, at which positions, what. A feature edit leaves `hook_point` empty: its dictionary names it."""

    hook_point: str
    edit: Edit
    positions: Selector = EVERYWHERE
    preserve_norm: bool = False


@dataclass(frozen=True, kw_only=True)
class InterventionReceipt:
    """What was done for one intervention, counted where it was done."""

    index: int
    edit: str
    hook_points: tuple[str, ...]
    positions_applied: int
    content_hash: str

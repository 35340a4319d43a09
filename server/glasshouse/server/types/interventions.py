"""Edits of the forward pass as plain values. Vectors are float32 numpy arrays; `engines.preparation` checks them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .conditions import Condition
from .selectors import EVERYWHERE, Selector

FloatArray = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


@dataclass(frozen=True)
class NamedDirection:
    """A direction by its name; the engine puts its vector in place."""

    name: str


Direction = FloatArray | NamedDirection


@dataclass(frozen=True, kw_only=True)
class AddVector:
    """s + c v, or with `norm_scaled` s + c |s| v/|v|. `vector`: (width,)."""

    vector: Direction
    coefficient: float = 1.0
    norm_scaled: bool = False
    kind = "add_vector"


@dataclass(frozen=True, kw_only=True)
class AblateDirection:
    """s - (s.v^) v^. `vector`: (width,)."""

    vector: Direction
    kind = "ablate_direction"


@dataclass(frozen=True, kw_only=True)
class CapProjection:
    """s with s.v^ clamped to [minimum, maximum], either of them absent. `vector`: (width,)."""

    vector: Direction
    maximum: float | None = None
    minimum: float | None = None
    kind = "cap_projection"


@dataclass(frozen=True, kw_only=True)
class Rotate:
    """s turned to `angle_radians` within the plane of `first` and `second`, both (width,) (angular steering)."""

    first: Direction
    second: Direction
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
    """One edit: where, at which positions, what, and under which condition. A feature edit leaves `hook_point` empty: its
    dictionary names it; an edit by a named direction may.
    """

    hook_point: str
    edit: Edit
    positions: Selector = EVERYWHERE
    preserve_norm: bool = False
    condition: Condition | None = None


@dataclass(frozen=True, kw_only=True)
class InterventionReceipt:
    """What was done for one intervention, counted where it was done. `positions_steered`: of those applied, where its
    condition held. `resources`: the named directions and probes that it used, with their versions.
    """

    index: int
    edit: str
    hook_points: tuple[str, ...]
    positions_applied: int
    content_hash: str
    positions_steered: int = 0
    resources: tuple[str, ...] = ()

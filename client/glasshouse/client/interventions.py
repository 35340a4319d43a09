"""Edits of the forward pass: plain frozen values, made by one function each.

Every edit is a hook point, the positions where it applies (default: every position), and what is done to the
activation s there; an edit of features names a dictionary, which says where. `builders` holds the table from these
classes to messages; a new edit is a class here and a row there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, SupportsIndex, TypeAlias

import numpy as np
from numpy.typing import NDArray

from glasshouse.client.arrays import VectorLike, as_float32
from glasshouse.client.dictionaries.names import DictionaryLike, as_features, as_numbers, dictionary_name
from glasshouse.client.positions import Positions, PositionsLike, as_positions

Vector: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class Intervention:
    """One edit. `preserve_norm` rescales each edited activation to the norm it had before this edit."""

    hook_point: str
    positions: Positions | None = None
    preserve_norm: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class AddVector(Intervention):
    """s + coefficient * v; with scale "norm", s + coefficient * |s| * v / |v|. vector: (width,) float32."""

    vector: Vector
    coefficient: float = 1.0
    scale: Literal["plain", "norm"] = "plain"


@dataclass(frozen=True, kw_only=True, eq=False)
class AblateDirection(Intervention):
    """s - (s . v^) v^ with v^ = v / |v|. vector: (width,) float32."""

    vector: Vector


@dataclass(frozen=True, kw_only=True, eq=False)
class CapProjection(Intervention):
    """s with its projection on v^ clamped to [min, max]. vector: (width,) float32."""

    vector: Vector
    max: float | None = None
    min: float | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Rotate(Intervention):
    """s with its part in the plane of first and second turned to an angle. first, second: (width,)
    float32."""

    first: Vector
    second: Vector
    angle_radians: float = 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Replace(Intervention):
    """s replaced. activations: (n, width) for n selected positions ascending, or (width,) for each;
    float32."""

    activations: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureEdit(Intervention):
    """An edit of features. The dictionary says where: `hook_point` stays empty."""

    hook_point: str = ""
    dictionary: str
    features: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class SetFeatures(FeatureEdit):
    """s + sum_i (value_i - f_i(x)) d_i: what the dictionary does not explain is kept. values: one each, or one."""

    values: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class ScaleFeatures(FeatureEdit):
    """s + sum_i (factor_i - 1) f_i(x) d_i. factors: one each, or one for all."""

    factors: tuple[float, ...]


def add_vector(
    hook_point: str,
    vector: VectorLike,
    coefficient: float = 1.0,
    positions: PositionsLike | None = None,
    scale: Literal["plain", "norm"] = "plain",
    preserve_norm: bool = False,
) -> AddVector:
    """Adds coefficient * vector (steering).

    vector: (width,) of the hook point. `scale="norm"` measures the coefficient in units of each activation's
    own norm, along the unit vector. `preserve_norm` then rescales the result to the norm it had.
    """
    return AddVector(
        hook_point=hook_point,
        vector=as_float32(vector, "vector"),
        coefficient=coefficient,
        positions=as_positions(positions),
        scale=scale,
        preserve_norm=preserve_norm,
    )


def ablate_direction(
    hook_point: str, vector: VectorLike, positions: PositionsLike | None = None, preserve_norm: bool = False
) -> AblateDirection:
    """Removes what the activation has along `vector`: (width,), not zero, any length."""
    return AblateDirection(
        hook_point=hook_point,
        vector=as_float32(vector, "vector"),
        positions=as_positions(positions),
        preserve_norm=preserve_norm,
    )


def cap_projection(
    hook_point: str,
    vector: VectorLike,
    max: float | None = None,
    min: float | None = None,
    positions: PositionsLike | None = None,
    preserve_norm: bool = False,
) -> CapProjection:
    """Clamps the projection on the unit vector along `vector`, (width,). At least one of max and min."""
    return CapProjection(
        hook_point=hook_point,
        vector=as_float32(vector, "vector"),
        max=max,
        min=min,
        positions=as_positions(positions),
        preserve_norm=preserve_norm,
    )


def rotate(
    hook_point: str,
    first: VectorLike,
    second: VectorLike,
    angle_radians: float,
    positions: PositionsLike | None = None,
    preserve_norm: bool = False,
) -> Rotate:
    """Turns the activation's part in the plane of two (width,) vectors TO an angle: 0 points along
    `first`."""
    return Rotate(
        hook_point=hook_point,
        first=as_float32(first, "first"),
        second=as_float32(second, "second"),
        angle_radians=angle_radians,
        positions=as_positions(positions),
        preserve_norm=preserve_norm,
    )


def replace(hook_point: str, activations: VectorLike, positions: PositionsLike | None = None) -> Replace:
    """Puts given activations in place (activation patching).

    activations: (n, width) for the n selected positions in ascending order, which `positions` must then list
    or span; or (width,) for the same at each.
    """
    return Replace(
        hook_point=hook_point,
        activations=as_float32(activations, "activations"),
        positions=as_positions(positions),
    )


def set_feature(
    dictionary: DictionaryLike,
    feature: SupportsIndex | Sequence[SupportsIndex],
    value: float | Sequence[float],
    positions: PositionsLike | None = None,
) -> SetFeatures:
    """Sets a feature of a dictionary, or several, to a value each or one for all.

    What the dictionary does not explain is kept. A transcoder's features are set where it writes.
    """
    return SetFeatures(
        dictionary=dictionary_name(dictionary),
        features=as_features(feature),
        values=as_numbers(value),
        positions=as_positions(positions),
    )


def scale_feature(
    dictionary: DictionaryLike,
    feature: SupportsIndex | Sequence[SupportsIndex],
    factor: float | Sequence[float],
    positions: PositionsLike | None = None,
) -> ScaleFeatures:
    """Multiplies a feature of a dictionary, or several, by a factor each or one for all."""
    return ScaleFeatures(
        dictionary=dictionary_name(dictionary),
        features=as_features(feature),
        factors=as_numbers(factor),
        positions=as_positions(positions),
    )


def ablate_feature(
    dictionary: DictionaryLike,
    feature: SupportsIndex | Sequence[SupportsIndex],
    positions: PositionsLike | None = None,
) -> SetFeatures:
    """Sets a feature of a dictionary, or several, to 0."""
    return set_feature(dictionary, feature, 0.0, positions)

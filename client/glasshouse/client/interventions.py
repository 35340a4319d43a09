"""Edits of the forward pass: plain frozen values, made by one function each.

Every edit is a hook point, the positions where it applies (default: every position), and what is done to the
activation s there. An edit of features names a dictionary, which says where; one by a named direction may leave it to
that. Each can be put under a condition: `add_vector(...).when(probe, above=0.9)`. `builders` holds the table from
these classes to messages; a new edit is a class here and a row there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, SupportsIndex, TypeAlias, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from glasshouse.client.arrays import VectorLike, as_float32
from glasshouse.client.conditions import Aggregate, Condition, ProbeOutput, Scope, Source, when
from glasshouse.client.dictionaries.names import DictionaryLike, as_features, as_numbers, dictionary_name
from glasshouse.client.names import DirectionLike, is_number, place_and_direction
from glasshouse.client.positions import Positions, PositionsLike, as_positions

Vector: TypeAlias = NDArray[np.float32]
Edited = TypeVar("Edited", bound="Intervention")


@dataclass(frozen=True, kw_only=True, eq=False)
class Intervention:
    """One edit. `preserve_norm` rescales each edited activation to the norm it had before this edit."""

    hook_point: str
    positions: Positions | None = None
    preserve_norm: bool = False
    condition: Condition | None = None

    def when(
        self: Edited,
        source: Condition | Source,
        *,
        above: float | None = None,
        below: float | None = None,
        over: Scope = "position",
        label: str = "",
        output: ProbeOutput = "score",
        aggregate: Aggregate | None = None,
        positions: PositionsLike | None = None,
    ) -> Edited:
        """The same edit, applied only where a condition holds: one made by `when`, or what makes one.

        At each position, the score is read no later in the forward pass than the edit is made; where both are at the
        same hook point, before it.
        """
        if not isinstance(source, Condition):
            source = when(
                source,
                above=above,
                below=below,
                over=over,
                label=label,
                output=output,
                aggregate=aggregate,
                positions=positions,
            )
        return dataclasses.replace(self, condition=source)


@dataclass(frozen=True, kw_only=True, eq=False)
class AddVector(Intervention):
    """s + coefficient * v; with scale "norm", s + coefficient * |s| * v / |v|. vector: (width,) float32, or a
    direction's name."""

    vector: Vector | str
    coefficient: float = 1.0
    scale: Literal["plain", "norm"] = "plain"


@dataclass(frozen=True, kw_only=True, eq=False)
class AblateDirection(Intervention):
    """s - (s . v^) v^ with v^ = v / |v|. vector: (width,) float32, or a direction's name."""

    vector: Vector | str


@dataclass(frozen=True, kw_only=True, eq=False)
class CapProjection(Intervention):
    """s with its projection on v^ clamped to [min, max]. vector: (width,) float32, or a direction's name."""

    vector: Vector | str
    max: float | None = None
    min: float | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Rotate(Intervention):
    """s with its part in the plane of first and second turned to an angle. first, second: (width,)
    float32, or directions' names."""

    first: Vector | str
    second: Vector | str
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


def _placed(hook_point: Any, vector: Any) -> tuple[str, Vector | str]:
    place, direction = place_and_direction(hook_point, vector)
    return place, direction if isinstance(direction, str) else as_float32(direction, "vector")


@overload
def add_vector(
    hook_point: str,
    vector: VectorLike | DirectionLike,
    coefficient: float = 1.0,
    positions: PositionsLike | None = None,
    scale: Literal["plain", "norm"] = "plain",
    preserve_norm: bool = False,
    condition: Condition | None = None,
) -> AddVector: ...


@overload
def add_vector(
    hook_point: DirectionLike,
    vector: Literal[""] = "",
    coefficient: float = 1.0,
    positions: PositionsLike | None = None,
    scale: Literal["plain", "norm"] = "plain",
    preserve_norm: bool = False,
    condition: Condition | None = None,
) -> AddVector: ...


@overload
def add_vector(
    hook_point: DirectionLike,
    vector: float,
    *,
    positions: PositionsLike | None = None,
    scale: Literal["plain", "norm"] = "plain",
    preserve_norm: bool = False,
    condition: Condition | None = None,
) -> AddVector: ...


def add_vector(
    hook_point: Any,
    vector: Any = "",
    coefficient: float = 1.0,
    positions: PositionsLike | None = None,
    scale: Literal["plain", "norm"] = "plain",
    preserve_norm: bool = False,
    condition: Condition | None = None,
) -> AddVector:
    """Adds coefficient * vector (steering).

    vector: (width,) of the hook point, or a direction's handle or name. A direction alone is added at its own hook point:
    `add_vector("joy", 4.0)`. `scale="norm"` measures the coefficient in units of each activation's own norm, along the
    unit vector. `preserve_norm` then rescales the result to the norm it had.
    """
    if is_number(vector):
        vector, coefficient = "", float(vector)
    place, direction = _placed(hook_point, vector)
    return AddVector(
        hook_point=place,
        vector=direction,
        coefficient=coefficient,
        positions=as_positions(positions),
        scale=scale,
        preserve_norm=preserve_norm,
        condition=condition,
    )


def ablate_direction(
    hook_point: str | DirectionLike,
    vector: VectorLike | DirectionLike = "",
    positions: PositionsLike | None = None,
    preserve_norm: bool = False,
    condition: Condition | None = None,
) -> AblateDirection:
    """Removes what the activation has along `vector`: (width,), not zero, any length, or a direction's handle or name.

    A direction alone is removed at its own hook point.
    """
    place, direction = _placed(hook_point, vector)
    return AblateDirection(
        hook_point=place,
        vector=direction,
        positions=as_positions(positions),
        preserve_norm=preserve_norm,
        condition=condition,
    )


def cap_projection(
    hook_point: str | DirectionLike,
    vector: VectorLike | DirectionLike = "",
    max: float | None = None,
    min: float | None = None,
    positions: PositionsLike | None = None,
    preserve_norm: bool = False,
    condition: Condition | None = None,
) -> CapProjection:
    """Clamps the projection on the unit vector along `vector`: (width,), or a direction's handle or name. At least one of
    max and min. A direction alone is capped at its own hook point.
    """
    place, direction = _placed(hook_point, vector)
    return CapProjection(
        hook_point=place,
        vector=direction,
        max=max,
        min=min,
        positions=as_positions(positions),
        preserve_norm=preserve_norm,
        condition=condition,
    )


def rotate(
    hook_point: str,
    first: VectorLike | DirectionLike,
    second: VectorLike | DirectionLike,
    angle_radians: float,
    positions: PositionsLike | None = None,
    preserve_norm: bool = False,
    condition: Condition | None = None,
) -> Rotate:
    """Turns the activation's part in the plane of two (width,) vectors TO an angle: 0 points along
    `first`. Either may be a direction's handle or name; a hook point of "" is then the direction's own."""
    places, directions = zip(*(_placed(hook_point, vector) for vector in (first, second)))
    return Rotate(
        hook_point=hook_point or next(filter(None, places), ""),
        first=directions[0],
        second=directions[1],
        angle_radians=angle_radians,
        positions=as_positions(positions),
        preserve_norm=preserve_norm,
        condition=condition,
    )


def replace(
    hook_point: str,
    activations: VectorLike,
    positions: PositionsLike | None = None,
    condition: Condition | None = None,
) -> Replace:
    """Puts given activations in place (activation patching).

    activations: (n, width) for the n selected positions in ascending order, which `positions` must then list
    or span; or (width,) for the same at each.
    """
    return Replace(
        hook_point=hook_point,
        activations=as_float32(activations, "activations"),
        positions=as_positions(positions),
        condition=condition,
    )


def set_feature(
    dictionary: DictionaryLike,
    feature: SupportsIndex | Sequence[SupportsIndex],
    value: float | Sequence[float],
    positions: PositionsLike | None = None,
    condition: Condition | None = None,
) -> SetFeatures:
    """Sets a feature of a dictionary, or several, to a value each or one for all.

    What the dictionary does not explain is kept. A transcoder's features are set where it writes.
    """
    return SetFeatures(
        dictionary=dictionary_name(dictionary),
        features=as_features(feature),
        values=as_numbers(value),
        positions=as_positions(positions),
        condition=condition,
    )


def scale_feature(
    dictionary: DictionaryLike,
    feature: SupportsIndex | Sequence[SupportsIndex],
    factor: float | Sequence[float],
    positions: PositionsLike | None = None,
    condition: Condition | None = None,
) -> ScaleFeatures:
    """Multiplies a feature of a dictionary, or several, by a factor each or one for all."""
    return ScaleFeatures(
        dictionary=dictionary_name(dictionary),
        features=as_features(feature),
        factors=as_numbers(factor),
        positions=as_positions(positions),
        condition=condition,
    )


def ablate_feature(
    dictionary: DictionaryLike,
    feature: SupportsIndex | Sequence[SupportsIndex],
    positions: PositionsLike | None = None,
    condition: Condition | None = None,
) -> SetFeatures:
    """Sets a feature of a dictionary, or several, to 0."""
    return set_feature(dictionary, feature, 0.0, positions, condition)

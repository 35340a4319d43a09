"""What is patched: grids of nodes, and single nodes. Plain frozen values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from glasshouse.client.dictionaries.names import DictionaryLike, dictionary_name
from glasshouse.client.positions import Positions, PositionsLike, as_positions

Direction: TypeAlias = "Literal['noise', 'denoise']"
Replacement: TypeAlias = "Literal['interchange', 'zero', 'mean', 'resample']"
Held: TypeAlias = "Literal['attention_patterns', 'norm_scales']"

ERROR = -1
"""The column of a feature grid that is the dictionary's error."""


@dataclass(frozen=True)
class PatchGrid:
    """See `patch_grid` and `feature_grid`."""

    component: str = ""
    dictionary: str = ""
    layers: tuple[int, ...] = ()
    by_head: bool = False
    heads: tuple[int, ...] = ()
    units: tuple[int, ...] = ()
    features: tuple[int, ...] = ()
    positions: Positions | None = None
    all_positions_at_once: bool = False


PatchGridLike: TypeAlias = "str | PatchGrid"
"""A grid, or the name of a component: that of every layer and position."""


@dataclass(frozen=True)
class PatchNode:
    """See `patch_node`."""

    hook_point: str
    position: int | None = None
    head: int | None = None
    unit: int | None = None

    def __str__(self) -> str:
        part = f".head{self.head}" if self.head is not None else ""
        part += f".unit{self.unit}" if self.unit is not None else ""
        return self.hook_point + part + ("" if self.position is None else f"@{self.position}")


def patch_grid(
    component: str,
    *,
    layers: Sequence[int] = (),
    by_head: bool = False,
    heads: Sequence[int] = (),
    units: Sequence[int] = (),
    positions: PositionsLike | None = None,
    all_positions_at_once: bool = False,
) -> PatchGrid:
    """Nodes of a component, a hook point without ``blocks.{L}.`` such as ``hook_resid_pre`` or ``attn.hook_z``.

    Layers x heads x positions, all of each by default: the whole vector, split `by_head`, or single `units`.
    """
    return PatchGrid(
        component=component,
        layers=tuple(layers),
        by_head=by_head,
        heads=tuple(heads),
        units=tuple(units),
        positions=as_positions(positions),
        all_positions_at_once=all_positions_at_once,
    )


def feature_grid(
    dictionary: DictionaryLike,
    features: Sequence[int] = (),
    *,
    positions: PositionsLike | None = None,
    all_positions_at_once: bool = False,
) -> PatchGrid:
    """Nodes of a dictionary's features; by default those active at the positions, and the error (`ERROR`)."""
    return PatchGrid(
        dictionary=dictionary_name(dictionary),
        features=tuple(features),
        positions=as_positions(positions),
        all_positions_at_once=all_positions_at_once,
    )


def patch_node(
    hook_point: str, *, position: int | None = None, head: int | None = None, unit: int | None = None
) -> PatchNode:
    """One activation: whole, or one head or element of it; at a position, or at all."""
    return PatchNode(hook_point, position, head, unit)


def as_grids(value: PatchGridLike | Sequence[PatchGridLike]) -> list[PatchGrid]:
    """The canonical form of one grid or several."""
    listed = [value] if isinstance(value, (str, PatchGrid)) else list(value)
    found = [PatchGrid(component=item) if isinstance(item, str) else item for item in listed]
    for item in found:
        if not isinstance(item, PatchGrid):
            raise TypeError(f"grids must be made by patch_grid(...) or name a component, not {item!r}")
    return found

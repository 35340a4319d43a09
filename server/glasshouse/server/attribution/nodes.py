"""What is patched or scored: an activation of one component, whole or one head of it, everywhere or at a position.

A component is a hook point's name without ``blocks.{L}.`` (``hook_resid_pre``, ``attn.hook_z``, ``hook_mlp_out``,
``mlp.hook_post``). Heads of key and value points are key-value heads. A dictionary's features are nodes too
(`feature_nodes`), at the first hook point that the dictionary writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from glasshouse.server.attribution.gradient_model import GradientModel
from glasshouse.server.types.errors import InvalidArgument
from glasshouse.server.types.hook_points import HookPoint
from glasshouse.wire import reasons


@dataclass(frozen=True, kw_only=True)
class Node:
    """A place in the forward pass. `position` None: all positions. `head` or `unit` narrow the vector.

    With a `dictionary` (by name) it is one `feature` of it (flat id), or, without one, the dictionary's error.
    """

    hook_point: str
    position: int | None = None
    head: int | None = None
    unit: int | None = None
    dictionary: str | None = None
    feature: int | None = None

    def columns(self, point: HookPoint) -> slice:
        """Which columns of the activation are meant."""
        if self.head is not None:
            return slice(self.head * point.d_head, (self.head + 1) * point.d_head)
        if self.unit is not None:
            return slice(self.unit, self.unit + 1)
        return slice(None)

    @property
    def positions(self) -> slice:
        """Which positions are meant; never an empty slice for position -1."""
        if self.position is None:
            return slice(None)
        return slice(self.position, self.position + 1 or None)

    def shifted(self, start: int) -> slice:
        """`positions` in a pass that begins at position `start`; an index from the end stays."""
        if self.position is None or self.position < 0:
            return self.positions
        return slice(self.position - start, self.position - start + 1)


def node_grid(
    model: GradientModel,
    component: str,
    *,
    n_positions: int,
    layers: Sequence[int] | None = None,
    positions: Sequence[int | None] | None = None,
    heads: Sequence[int] | None = None,
    by_head: bool = False,
) -> list[Node]:
    """Layer x head x position nodes of a component, layers first.

    `positions` defaults to every one of `n_positions`; [None] patches all positions at once. `heads` (or
    `by_head`, all of them) splits a point that has heads.
    """
    grid = []
    for layer in range(model.n_layers) if layers is None else layers:
        point = model.table.resolve(f"blocks.{layer}.{component}", field="component")
        chosen: Sequence[int | None] = heads if heads is not None else [None]
        if by_head and heads is None:
            chosen = range(point.n_heads)
        check_writable(point)
        _check_heads(point, chosen)
        for head in chosen:
            for position in range(n_positions) if positions is None else positions:
                _check_position(position, n_positions)
                grid.append(Node(hook_point=point.name, position=position, head=head))
    return grid


def check_writable(point: HookPoint) -> None:
    """Refuse maps and logits: they cannot be patched."""
    if not point.writable or point.name == "unembed":
        raise InvalidArgument(
            f"{point.name} cannot be patched.",
            reason=reasons.HOOK_POINT_NOT_WRITABLE,
            field="component",
            value=point.name,
            remedy="Patch attn.hook_q, hook_k or hook_z instead of a map, the last stream instead of logits.",
        )


def _check_heads(point: HookPoint, heads: Sequence[int | None]) -> None:
    for head in heads:
        if head is not None and not 0 <= head < point.n_heads:
            has = f"heads 0 to {point.n_heads - 1}" if point.n_heads else "no heads"
            raise InvalidArgument(
                f"{point.name} has {has}, not head {head}.",
                reason=reasons.VALUE_OUT_OF_RANGE,
                field="heads",
                value=head,
                remedy="Use attn.hook_q, hook_k, hook_v or hook_z, and a head it has.",
            )


def _check_position(position: int | None, n_positions: int) -> None:
    if position is not None and not -n_positions <= position < n_positions:
        raise InvalidArgument(
            f"Position {position} is outside an input of {n_positions} tokens.",
            reason=reasons.POSITION_UNREACHABLE,
            field="positions",
            value=position,
            remedy=f"Use positions 0 to {n_positions - 1}.",
        )

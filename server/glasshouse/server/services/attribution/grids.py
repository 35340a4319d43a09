"""Grids of patch nodes: protobuf to `attribution.nodes.Node`s with their axes, and single nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from glasshouse.server.attribution.feature_nodes import feature_nodes, written
from glasshouse.server.attribution.gradient_model import GradientModel
from glasshouse.server.attribution.nodes import Node, check_writable, node_grid
from glasshouse.server.dictionaries.dictionary import Dictionary
from glasshouse.server.dictionaries.store import HeldDictionary
from glasshouse.server.types.errors import InvalidArgument, ServingError
from glasshouse.server.types.limits import Limits
from glasshouse.server.types.models import ModelInfo
from glasshouse.server.types.selectors import resolve
from glasshouse.v1 import attribution_pb2 as pb
from glasshouse.wire import reasons

from .. import fields
from ..catalogue import ServedModel
from ..selectors import selector

MOST_GRIDS = 64
MOST_NODES = 1_000_000
MOST_FEATURES = 10_000
ERROR = -1
"""The column of a dictionary's error."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Sweep:
    """The nodes of all grids laid end to end, their axes, and the dictionaries that feature nodes name."""

    nodes: list[Node]
    axes: list[pb.SweepAxes]
    dictionaries: Mapping[str, Dictionary]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Grid:
    message: pb.PatchGrid
    positions: Sequence[int | None]
    held: HeldDictionary | None


class GridReader:
    """The grids of one request, checked as far as that needs no model; `nodes` does the rest in a lane."""

    def __init__(
        self, model: ServedModel, limits: Limits, messages: Sequence[pb.PatchGrid], tokens: Sequence[int]
    ) -> None:
        if not messages:
            raise fields.required("grids", "what is to be patched", "give at least one grid")
        if len(messages) > MOST_GRIDS:
            raise fields.out_of_range("grids", f"a list of {len(messages)}", f"at most {MOST_GRIDS}")
        self._tokens = tuple(tokens)
        self._grids = [
            _read(model, limits, message, self._tokens, f"grids[{n}]") for n, message in enumerate(messages)
        ]

    def sweep(self, model: GradientModel, others: Sequence[Sequence[int]]) -> Sweep:
        """Nodes in order. `others`: further inputs whose active features count. Raises ServingErrors of a field."""
        nodes: list[Node] = []
        axes = []
        dictionaries: dict[str, Dictionary] = {}
        for n, grid in enumerate(self._grids):
            field = f"grids[{n}]"
            try:
                if grid.held is None:
                    some, axis = _component(model, grid, len(self._tokens))
                else:
                    dictionaries[grid.held.name] = grid.held.dictionary
                    some, axis = _features(model, grid, [self._tokens, *others])
            except ServingError as error:
                if error.field.startswith("grids["):
                    raise
                raise error.at(field) from error
            nodes += some
            axes.append(axis)
            if len(nodes) > MOST_NODES:
                raise fields.out_of_range(
                    "grids", f"{len(nodes):,} nodes and more", f"at most {MOST_NODES:,}"
                )
        return Sweep(nodes=nodes, axes=axes, dictionaries=dictionaries)


def _read(
    model: ServedModel, limits: Limits, message: pb.PatchGrid, tokens: tuple[int, ...], field: str
) -> _Grid:
    kind = message.WhichOneof("target")
    if kind is None or not getattr(message, kind):
        raise fields.required(
            f"{field}.{kind or 'component'}",
            "what is patched",
            "name a component such as hook_resid_pre, or a dictionary",
        )
    _exclusive(message, field)
    positions: Sequence[int | None] = [None]
    if not message.all_positions_at_once:
        positions = _positions(model.engine.info, limits, message, tokens, f"{field}.positions")
    held = None
    if kind == "dictionary":
        at = f"{field}.dictionary"
        held = model.engine.dictionaries.get(message.dictionary, field=at).attached(at)
        chosen = [feature for feature in message.features if feature != ERROR]
        held.dictionary.check_feature_ids(torch.tensor(chosen), field=f"{field}.features")
    return _Grid(message=message, positions=positions, held=held)


def _exclusive(message: pb.PatchGrid, field: str) -> None:
    """Refuses fields that contradict one another, and entries named twice."""
    by_feature = message.WhichOneof("target") == "dictionary"
    clashes = (
        ("layers", by_feature and bool(message.layers), "the dictionary has its own layer"),
        ("by_head", by_feature and message.by_head, "features have no heads"),
        ("heads", by_feature and bool(message.heads), "features have no heads"),
        ("units", by_feature and bool(message.units), "features are no units"),
        ("features", not by_feature and bool(message.features), "they belong to a dictionary"),
        ("units", bool(message.units) and (message.by_head or bool(message.heads)), "heads are split too"),
        (
            "positions",
            message.all_positions_at_once and message.HasField("positions"),
            "all positions are patched at once",
        ),
    )
    for name, clash, why in clashes:
        if clash:
            raise InvalidArgument(
                f"{field}.{name} is set, but {why}",
                reason=reasons.FIELD_CONFLICT,
                field=f"{field}.{name}",
                remedy=f"leave {name} out",
            )
    for name in ("layers", "heads", "units", "features"):
        entries = list(getattr(message, name))
        if len(set(entries)) < len(entries):
            raise InvalidArgument(
                f"{field}.{name} names an entry twice",
                reason=reasons.FIELD_CONFLICT,
                field=f"{field}.{name}",
                remedy="name each once",
            )


def _positions(
    info: ModelInfo, limits: Limits, message: pb.PatchGrid, tokens: tuple[int, ...], field: str
) -> list[int | None]:
    chosen = selector(message.positions, message.HasField("positions"), field, limits)
    found = resolve(
        chosen,
        prompt=tokens,
        n_fed=len(tokens),
        bos_token_id=info.bos_token_id,
        special_token_ids=info.special_token_ids,
        field=field,
    ).within(0, tokens)
    if not found:
        raise InvalidArgument(
            f"{field} selects none of the input's {len(tokens)} positions",
            reason=reasons.POSITION_UNREACHABLE,
            field=field,
            remedy="select positions of the input",
        )
    return list(found)


def _component(model: GradientModel, grid: _Grid, n_tokens: int) -> tuple[list[Node], pb.SweepAxes]:
    message, positions = grid.message, grid.positions
    layers = list(message.layers) or list(range(model.n_layers))
    units, by_head = list(message.units), message.by_head or bool(message.heads)
    nodes = node_grid(
        model,
        message.component,
        n_positions=n_tokens,
        layers=layers,
        positions=positions,
        heads=list(message.heads) or None,
        by_head=by_head,
    )
    columns = sorted({node.head for node in nodes if node.head is not None})
    if message.heads:
        columns = list(message.heads)
    if units:
        width = model.table.resolve(nodes[0].hook_point).width
        for unit in units:
            if not 0 <= unit < width:
                raise fields.out_of_range("units", unit, f"from 0 to {width - 1}")
        names = dict.fromkeys(node.hook_point for node in nodes)
        nodes = [
            Node(hook_point=name, position=p, unit=unit)
            for name in names
            for unit in units
            for p in positions
        ]
    axis = pb.SweepAxes(
        component=message.component,
        column_kind="unit" if units else "head" if by_head else "",
        layers=layers,
        columns=units or columns,
        positions=[p for p in positions if p is not None],
    )
    return nodes, axis


def _features(
    model: GradientModel, grid: _Grid, inputs: Sequence[Sequence[int]]
) -> tuple[list[Node], pb.SweepAxes]:
    held, positions = grid.held, grid.positions
    assert held is not None
    point = written(model, held.dictionary)[0]
    columns = list(grid.message.features)
    if not columns:
        fit = [p for p in positions if p is None or p < min(map(len, inputs))]
        active = feature_nodes(model, held.name, held.dictionary, inputs, positions=fit, errors=False)
        columns = [*sorted({node.feature for node in active if node.feature is not None}), ERROR]
    if len(columns) > MOST_FEATURES:
        raise fields.out_of_range("features", f"a list of {len(columns)}", f"at most {MOST_FEATURES}")
    nodes = [
        Node(
            hook_point=point,
            position=position,
            dictionary=held.name,
            feature=None if feature == ERROR else feature,
        )
        for feature in columns
        for position in positions
    ]
    axis = pb.SweepAxes(
        component=held.name,
        column_kind="feature",
        layers=[model.table.resolve(point).layer or 0],
        columns=columns,
        positions=[p for p in positions if p is not None],
    )
    return nodes, axis


def single_nodes(
    messages: Sequence[pb.PatchNode], n_tokens: int, field: str, most: int
) -> Callable[[GradientModel], list[Node]]:
    """Listed nodes; the model's part of the checks is made in a lane."""
    if not messages:
        raise fields.required(field, "at least one node", "give a hook_point, and position, head or unit")
    if len(messages) > most:
        raise fields.out_of_range(field, f"a list of {len(messages)}", f"at most {most}")
    return lambda model: list(_single(model, messages, n_tokens, field))


def _single(
    model: GradientModel, messages: Sequence[pb.PatchNode], n_tokens: int, field: str
) -> Iterator[Node]:
    for index, message in enumerate(messages):
        at = f"{field}[{index}]"
        if not message.hook_point:
            raise fields.required(f"{at}.hook_point", "which activation", "name a hook point")
        point = model.table.resolve(message.hook_point, field=f"{at}.hook_point")
        try:
            check_writable(point)
        except ServingError as error:
            error.field = f"{at}.hook_point"
            raise
        position = message.position if message.HasField("position") else None
        head = message.head if message.HasField("head") else None
        unit = message.unit if message.HasField("unit") else None
        if position is not None:
            fields.whole(position, f"{at}.position", 0, n_tokens - 1)
        if head is not None and unit is not None:
            raise InvalidArgument(
                f"{at} names a head and a unit",
                reason=reasons.FIELD_CONFLICT,
                field=f"{at}.unit",
                remedy="name one of them",
            )
        if head is not None and not 0 <= head < point.n_heads:
            bounds = f"from 0 to {point.n_heads - 1}" if point.n_heads else "left out: it has no heads"
            raise fields.out_of_range(f"{at}.head", head, bounds)
        if unit is not None:
            fields.whole(unit, f"{at}.unit", 0, point.width - 1)
        yield Node(hook_point=point.name, position=position, head=head, unit=unit)

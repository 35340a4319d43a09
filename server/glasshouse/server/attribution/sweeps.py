"""Patch sweeps: one node at a time set to what it would have been, over a grid, batched.

Activation patching (interchange intervention): I(n) = m(base | do(n <- other)) - m(base).

1. One pass over the other input (or inputs) reads every hook point of the grid: the replacement values.
   A dictionary's feature is patched by the change of its activation, the error preserved (`feature_nodes`).
   *interchange*: the other run's activation at the same position. Denoising is base = corrupt, other = clean;
   noising the reverse. *zero*. *mean*: over all positions of all other inputs. *resample*: each node takes a
   random one of the other inputs, seeded.
2. Nodes become rows of a batch on copies of the base; each row is edited at its node alone.
3. A batch starts at the earliest layer and position that it patches, on one base run (`resuming`), and ends at the
   position that the metric reads: attention is causal. A freeze needs the whole pass.
4. Results are yielded batch by batch, in the order of the grid.

Causal mediation (https://arxiv.org/abs/2004.12265) reads off the same patches: total effect m(corrupt) - m(clean),
indirect through the node m(clean | n <- corrupt) - m(clean), direct around it m(corrupt | n <- clean) - m(clean).

Shapes: B batch, T positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from glasshouse.server.attribution.feature_nodes import FeatureChanges, feature_changes
from glasshouse.server.attribution.freezing import NOTHING_FROZEN, Freeze
from glasshouse.server.attribution.gradient_model import Edit, GradientModel
from glasshouse.server.attribution.metrics import Metric
from glasshouse.server.attribution.nodes import Node
from glasshouse.server.attribution.progress import Progress, silent
from glasshouse.server.attribution.resuming import Resume
from glasshouse.server.dictionaries.dictionary import Dictionary
from glasshouse.server.types.errors import InvalidArgument
from glasshouse.wire import reasons

Replacement = Literal["interchange", "zero", "mean", "resample"]

TOKENS_AT_ONCE = 256
"""About how many positions a batch runs on a processor."""

Value = Tensor | Mapping[str, Tensor]
"""What a node is set to, (T, width) or (width,); or what is added for it, hook point -> (T, width)."""


@dataclass(frozen=True, kw_only=True)
class PatchResult:
    """`effect` = value - the base's value."""

    node: Node
    value: float
    effect: float


@dataclass(frozen=True, kw_only=True)
class Mediation:
    """Effects of changing the input from clean to corrupt. With no interaction total = direct + indirect."""

    node: Node
    total: float
    direct: float
    indirect: float


def patch_sweep(
    model: GradientModel,
    base_T: Tensor,
    nodes: Sequence[Node],
    metric: Metric,
    *,
    replacement: Replacement = "interchange",
    others: Tensor | None = None,
    seed: int = 0,
    freeze: Freeze = NOTHING_FROZEN,
    dictionaries: Mapping[str, Dictionary] | None = None,
    batch_size: int = 16,
    progress: Progress = silent,
) -> Iterator[list[PatchResult]]:
    """Patch every node of `nodes`, some at a time.

    others: (T,) or (N, T) token ids, not needed for zero; as long as the base except for mean. dictionaries: by the
    names that feature nodes use.
    """
    base = model.tokens(base_T)
    source = _Source(model, base, nodes, replacement, others, dictionaries or {}, seed)
    runner = _Runner(model, base, metric, freeze)
    first = 0
    while first < len(nodes):
        some = nodes[first : first + runner.rows_at_once(nodes[first : first + batch_size])]
        found = runner.values(some, [source.value(node) for node in some])
        yield [
            PatchResult(node=node, value=value, effect=value - runner.base_value)
            for node, value in zip(some, found)
        ]
        first += len(some)
        progress(first, len(nodes))


def mediate(
    model: GradientModel,
    clean_T: Tensor,
    corrupt_T: Tensor,
    nodes: Sequence[Node],
    metric: Metric,
    *,
    dictionaries: Mapping[str, Dictionary] | None = None,
    batch_size: int = 16,
) -> list[Mediation]:
    """Total, direct and indirect effect of the change of input, through each node."""
    clean, corrupt = model.tokens(clean_T), model.tokens(corrupt_T)
    with torch.no_grad():
        before, after = (float(metric(model.forward(t, read=metric.reads))[0]) for t in (clean, corrupt))
    swept = [
        [
            result
            for batch in patch_sweep(
                model, a, nodes, metric, others=b, dictionaries=dictionaries, batch_size=batch_size
            )
            for result in batch
        ]
        for a, b in ((clean, corrupt), (corrupt, clean))
    ]
    return [
        Mediation(node=noised.node, total=after - before, direct=held.value - before, indirect=noised.effect)
        for noised, held in zip(*swept)
    ]


def patching(
    model: GradientModel, nodes: Sequence[Node], values: Sequence[Value], *, start: int = 0
) -> dict[str, list[Edit]]:
    """Edits that give, in row i of a batch, node i its part of `values[i]`.

    `start` is the first position of the pass; no node may be earlier.
    """
    edits: dict[str, list[Edit]] = {}
    for row, (node, value) in enumerate(zip(nodes, values)):
        if not isinstance(value, Tensor):
            for name, delta in value.items():
                added = _add_part(row, node.shifted(start), delta[node.positions])
                edits.setdefault(name, []).append(added)
            continue
        columns = node.columns(model.table.resolve(node.hook_point))
        part = value[..., columns] if value.ndim == 1 else value[node.positions, columns]
        edits.setdefault(node.hook_point, []).append(_set_part(row, node.shifted(start), columns, part))
    return edits


def _set_part(row: int, positions: slice, columns: slice, part: Tensor) -> Edit:
    def edit(live: Tensor) -> None:
        live[row, positions, columns] = part

    return edit


def _add_part(row: int, positions: slice, part: Tensor) -> Edit:
    def edit(live: Tensor) -> None:
        live[row, positions] += part

    return edit


class _Source:
    """What every node is given, drawn in the order of the nodes where it is drawn."""

    def __init__(
        self,
        model: GradientModel,
        base: Tensor,
        nodes: Sequence[Node],
        how: Replacement,
        others: Tensor | None,
        dictionaries: Mapping[str, Dictionary],
        seed: int,
    ) -> None:
        sources = None if others is None else model.tokens(others)
        self._values = _replacements(
            model, base, [node for node in nodes if node.dictionary is None], how, sources
        )
        self._changes: dict[str, FeatureChanges] = feature_changes(
            model, base, nodes, how, sources, dictionaries
        )
        self._choose = torch.Generator().manual_seed(seed)

    def value(self, node: Node) -> Value:
        if node.dictionary is not None:
            changes = self._changes[node.dictionary]
            return changes.change(node, self._choice(changes.n_others))
        values = self._values[node.hook_point]
        return values[self._choice(values.shape[0])]

    def _choice(self, n: int) -> int:
        return int(torch.randint(n, (), generator=self._choose)) if n > 1 else 0


class _Runner:
    """Patched passes over one base, each from the earliest place that it patches to the place that is read."""

    @torch.no_grad()
    def __init__(self, model: GradientModel, base: Tensor, metric: Metric, freeze: Freeze) -> None:
        self._model, self._freeze = model, freeze
        self._n_positions = base.shape[1]
        read_at = metric.position % self._n_positions
        resumes = freeze == NOTHING_FROZEN
        self._base = base[:, : read_at + 1] if resumes else base
        self._read_at = read_at if resumes else self._n_positions - 1
        self._metric = replace(metric, position=-1) if resumes else metric
        self._read_layers = [model.table.resolve(name).layer for name in metric.reads]
        self._run = model.base_run(self._base) if resumes else None
        self.base_value = float(self._metric(model.forward(self._base, read=metric.reads, freeze=freeze))[0])

    def rows_at_once(self, nodes: Sequence[Node]) -> int:
        """How many of the next nodes make a batch: a processor gains nothing by more, and later ones start later."""
        if self._base.is_cuda or self._run is None:
            return len(nodes)
        length = self._n_positions - min(self._position(node) for node in nodes)
        return max(1, min(len(nodes), -(-TOKENS_AT_ONCE // length)))

    @torch.no_grad()
    def values(self, nodes: Sequence[Node], values: Sequence[Value]) -> list[float]:
        live = [i for i, node in enumerate(nodes) if self._position(node) <= self._read_at]
        found = [self.base_value] * len(nodes)  # what comes after the reading changes nothing
        if live:
            some = [self._placed(nodes[i]) for i in live]
            for i, value in zip(live, self._values(some, [self._cut(values[i]) for i in live])):
                found[i] = value
        return found

    def _values(self, nodes: Sequence[Node], values: Sequence[Value]) -> list[float]:
        resume = self._resume(nodes, values)
        run = self._model.forward(
            self._base.expand(len(nodes), -1),
            read=self._metric.reads,
            edits=patching(self._model, nodes, values, start=0 if resume is None else resume.position),
            freeze=self._freeze,
            resume=resume,
        )
        return [float(value) for value in self._metric(run)]

    def _position(self, node: Node) -> int:
        return 0 if node.position is None else node.position % self._n_positions

    def _placed(self, node: Node) -> Node:
        return node if node.position is None else replace(node, position=self._position(node))

    def _cut(self, value: Value) -> Value:
        if not isinstance(value, Tensor):
            return {name: delta[: self._read_at + 1] for name, delta in value.items()}
        return value if value.ndim == 1 else value[: self._read_at + 1]

    def _resume(self, nodes: Sequence[Node], values: Sequence[Value]) -> Resume | None:
        if self._run is None:
            return None
        edited = {node.hook_point for node in nodes}
        edited |= {name for value in values if not isinstance(value, Tensor) for name in value}
        by_point = {name: self._model.table.resolve(name).layer for name in edited}
        layers = [*by_point.values(), *self._read_layers]
        first = min(-1 if layer is None else layer for layer in layers)
        if first < 0:
            return None
        last = self._model.n_layers - 1
        by_point.pop(f"blocks.{last}.hook_resid_pre", None)
        return Resume(
            base=self._run,
            layer=first,
            position=min(self._position(node) for node in nodes),
            narrow=all(
                layer is not None and layer < last for layer in [*by_point.values(), *self._read_layers]
            ),
        )


@torch.no_grad()
def _replacements(
    model: GradientModel, base: Tensor, nodes: Sequence[Node], how: Replacement, sources: Tensor | None
) -> dict[str, Tensor]:
    """Hook point -> (N, T, width), or (1, width) for one vector at every position. Checks the other inputs."""
    names = sorted({node.hook_point for node in nodes})
    if how == "zero":
        width = {name: model.table.resolve(name).width for name in names}
        return {name: torch.zeros(1, width[name], device=base.device) for name in names}
    if sources is None:
        raise InvalidArgument(
            f"A {how} patch needs another input to take activations from.",
            reason=reasons.FIELD_REQUIRED,
            field="others",
            remedy="Give the clean or corrupt input, or ablate with zeros.",
        )
    if how != "mean" and sources.shape[1] != base.shape[1]:
        raise InvalidArgument(
            f"The inputs have {base.shape[1]} and {sources.shape[1]} tokens; patches are position by position.",
            reason=reasons.VALUE_OUT_OF_RANGE,
            field="others",
            value=sources.shape[1],
            remedy="Use inputs of equal length, or a mean ablation.",
        )
    readings = model.forward(sources, read=names).readings if names else {}
    if how == "mean":
        return {name: x.mean((0, 1))[None] for name, x in readings.items()}
    return readings if how == "resample" else {name: x[:1] for name, x in readings.items()}

"""From examples to labelled activations: read in bulk through the engine, pooled as they come, copies found.

1. Rows are counted first: what they would take is refused before anything runs where it is over the budget.
2. Readings that take the same positions (or, to be pooled to the last, end at the same kind of place) go through the
   engine in one extraction, which batches them; each is pooled when it arrives, so that only rows are kept.
3. Copies of an example (same tokens, same positions), the sides of a pair, and the rows of one example share a group.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass

import numpy as np
import torch

from glasshouse.server.engines.engine import Engine
from glasshouse.server.probes.examples import (
    BoolRows,
    FloatRows,
    IntRows,
    LabelledActivations,
    PairedActivations,
)
from glasshouse.server.probes.pooling import Pooling, pool
from glasshouse.server.probes.saved import SplitSummary
from glasshouse.server.probes.splitting import Split, find_duplicates, split, split_as_given
from glasshouse.server.types.errors import InvalidArgument, ResourceExhausted
from glasshouse.server.types.generation import ExtractionRequest
from glasshouse.server.types.hook_points import HookPoint
from glasshouse.server.types.selectors import NamedPositions, Selector
from glasshouse.wire import reasons

from .examples import Example, Labelling, Pair, Reading, held_out
from .manager import Progress


@dataclass(frozen=True, kw_only=True, eq=False)
class GatheredExamples:
    """Labelled rows with their split. `pairs` where they came in pairs: rows i and i + M of `labelled` are pair i."""

    labelled: LabelledActivations
    sides: Split
    summary: SplitSummary
    notes: tuple[str, ...]
    pairs: bool = False

    def at(self, hook_point: str) -> LabelledActivations | PairedActivations:
        """The same examples at one hook point."""
        rows = self.labelled.activations[hook_point]
        if self.pairs:
            half = len(rows) // 2
            return PairedActivations(
                negative={hook_point: rows[:half]},
                positive={hook_point: rows[half:]},
                label_names=(self.labelled.label_names[0], self.labelled.label_names[1]),
            )
        return LabelledActivations(
            activations={hook_point: rows},
            labels=self.labelled.labels,
            label_names=self.labelled.label_names,
            task=self.labelled.task,
            groups=self.labelled.groups,
        )


@dataclass(frozen=True, kw_only=True)
class GatherOptions:
    """`max_bytes`: of the rows at all hook points together, float32."""

    pooling: Pooling
    held_out_share: float
    seed: int
    max_bytes: int


async def gather_examples(
    engine: Engine,
    examples: Sequence[Example],
    labelling: Labelling,
    hook_points: Sequence[HookPoint],
    options: GatherOptions,
    progress: Progress,
) -> GatheredExamples:
    """Reads labelled examples.

    Raises:
        InvalidArgument: what `LabelledActivations.check` and `split` refuse.
        ResourceExhausted: more bytes of rows than the budget.
    """
    readings = [example.reading for example in examples]
    n_rows = [1 if options.pooling is not Pooling.TOKEN else len(item.positions) for item in readings]
    owners = np.repeat(np.arange(len(readings)), n_rows)
    copies = find_duplicates(readings, [example.labels for example in examples])
    # What is wrong with the labels is said before anything is read.
    LabelledActivations(
        activations={point.name: np.zeros((len(owners), 1), np.float32) for point in hook_points},
        labels=labelling.labels[owners],
        label_names=labelling.names,
        task=labelling.task,
    ).check()
    rows = await _read(engine, readings, n_rows, hook_points, options, progress)
    labelled = LabelledActivations(
        activations=rows,
        labels=labelling.labels[owners],
        label_names=labelling.names,
        task=labelling.task,
        groups=copies.groups[owners],
    )
    given = held_out(examples)
    sides = _split(labelled, None if given is None else given[owners], options)
    summary = SplitSummary(
        n_train=len(sides.train),
        n_held_out=len(sides.held_out),
        n_duplicates=copies.n_copies,
        n_left_out=sides.n_left_out,
        n_conflicting=len(copies.conflicting),
    )
    return GatheredExamples(labelled=labelled, sides=sides, summary=summary, notes=_notes(summary))


async def gather_pairs(
    engine: Engine,
    pairs: Sequence[Pair],
    hook_points: Sequence[HookPoint],
    options: GatherOptions,
    progress: Progress,
    names: tuple[str, str] = ("negative", "positive"),
) -> GatheredExamples:
    """Reads pairs; raises as `gather_examples`. Pairs that share an input share a group."""
    if options.pooling is Pooling.TOKEN:
        raise InvalidArgument(
            "the tokens of two inputs do not pair up",
            reason=reasons.FIELD_CONFLICT,
            field="pooling",
            value=options.pooling.value,
            remedy="pool pairs to the last position, the mean or the maximum",
        )
    readings = [pair.negative for pair in pairs] + [pair.positive for pair in pairs]
    labels = np.repeat(np.array([0, 1], dtype=np.int64), len(pairs))
    LabelledActivations(
        activations={point.name: np.zeros((len(readings), 1), np.float32) for point in hook_points},
        labels=labels,
        label_names=names,
    ).check("pairs")
    rows = await _read(engine, readings, [1] * len(readings), hook_points, options, progress)
    copies = find_duplicates(readings, labels.tolist())
    groups = np.tile(_joined(copies.groups, len(pairs)), 2)
    labelled = LabelledActivations(activations=rows, labels=labels, label_names=names, groups=groups)
    given = held_out(pairs)
    sides = _split(labelled, None if given is None else np.tile(given, 2), options)
    summary = SplitSummary(
        n_train=len(sides.train),
        n_held_out=len(sides.held_out),
        n_duplicates=copies.n_copies,
        n_left_out=sides.n_left_out,
        n_conflicting=len(copies.conflicting),
    )
    return GatheredExamples(
        labelled=labelled, sides=sides, summary=summary, notes=_notes(summary), pairs=True
    )


async def _read(
    engine: Engine,
    readings: Sequence[Reading],
    n_rows: Sequence[int],
    hook_points: Sequence[HookPoint],
    options: GatherOptions,
    progress: Progress,
) -> dict[str, FloatRows]:
    """Hook point -> rows (sum of n_rows, width) float32, in the order of `readings`."""
    total = sum(n_rows)
    n_bytes = 4 * total * sum(point.width for point in hook_points)
    if n_bytes > options.max_bytes:
        raise ResourceExhausted(
            f"{total:,} rows at {len(hook_points)} hook points take {n_bytes:,} bytes, "
            f"a request may take {options.max_bytes:,}",
            reason=reasons.MEMORY_BUDGET,
            field="hook_points",
            value=n_bytes,
            remedy="read fewer hook points or examples, or pool them; the operator sets limits.max_readout_bytes",
        )
    progress.phase, progress.done, progress.total = "reading", 0, len(readings)
    rows: dict[str, FloatRows] = {}
    for point in hook_points:
        rows[point.name] = np.empty((total, point.width), np.float32)
    starts = np.concatenate([[0], np.cumsum(n_rows)])
    names = tuple(point.name for point in hook_points)
    for selector, members in _batches(readings, options.pooling).items():
        request = ExtractionRequest(
            inputs=tuple(readings[member].tokens for member in members),
            hook_points=names,
            positions=selector,
        )
        async with aclosing(engine.extract(request)) as results:
            async for done in results:
                member = members[done.index]
                wanted = np.isin(done.positions, readings[member].positions)
                for name, array in zip(names, done.activations, strict=True):
                    pooled = pool(torch.from_numpy(np.asarray(array)[wanted]), options.pooling)
                    rows[name][starts[member] : starts[member + 1]] = pooled.numpy()
                progress.done += 1
    return rows


def _batches(readings: Sequence[Reading], pooling: Pooling) -> dict[Selector, list[int]]:
    """Readings by the selector they are read with: the fewest extractions that move no more than is needed."""
    found: dict[Selector, list[int]] = defaultdict(list)
    for index, item in enumerate(readings):
        n_tokens, last = len(item.tokens), item.positions[-1]
        if pooling is Pooling.LAST and last == n_tokens - 1:
            found[Selector(named=NamedPositions.LAST)].append(index)
        elif pooling is Pooling.LAST:
            found[Selector(at=(last,))].append(index)
        elif 2 * len(item.positions) >= n_tokens:
            found[Selector(named=NamedPositions.ALL)].append(index)
        else:
            found[Selector(at=item.positions)].append(index)
    return dict(found)


def _split(labelled: LabelledActivations, given: BoolRows | None, options: GatherOptions) -> Split:
    if given is not None:
        return split_as_given(labelled, given)
    return split(labelled, held_out_share=options.held_out_share, seed=options.seed)


def _joined(numbers: IntRows, n_pairs: int) -> IntRows:
    """Groups of pairs, int64 (n_pairs,): pairs that share an input, whichever side, are one."""
    parent = list(range(int(numbers.max()) + 1 if len(numbers) else 0))

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    for pair in range(n_pairs):
        parent[root(int(numbers[pair]))] = root(int(numbers[pair + n_pairs]))
    return np.array([root(int(numbers[pair])) for pair in range(n_pairs)], dtype=np.int64)


def _notes(summary: SplitSummary) -> tuple[str, ...]:
    notes = []
    if summary.n_duplicates:
        notes.append(
            f"{summary.n_duplicates} examples are copies of others; copies stay on one side of the split."
        )
    if summary.n_conflicting:
        notes.append(
            f"{summary.n_conflicting} examples occur under different labels: nothing can tell them apart."
        )
    return tuple(notes)

"""Labelled activations: what every direction and probe is made from, checked once, here.

Legend: N examples, W width of a hook point, K classes or labels.

An example is one row: a token's activation, or a text's after pooling (see `pooling`). Rows that must not be torn
apart between training and held-out examples (the two sides of a pair, copies of one text, tokens of one text) share
a group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np

from glasshouse.server.types.errors import InvalidArgument
from glasshouse.wire import reasons

FloatRows = np.ndarray[tuple[int, ...], np.dtype[Any]]
IntRows = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
BoolRows = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]

# Two to learn from and two to be judged on.
MIN_EXAMPLES_PER_CLASS = 4


class Task(Enum):
    """What labels mean: (N,) of two classes, (N,) of K classes, or (N, K) of independent yes and no."""

    BINARY = "binary"
    MULTI_CLASS = "multi_class"
    MULTI_LABEL = "multi_label"


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledActivations:
    """Examples with their labels at one or more hook points.

    `activations`: hook point name -> (N, W), any float dtype, the same N examples everywhere. `labels`: int64 (N,) in
    0..K-1, or (N, K) of 0 and 1 for `Task.MULTI_LABEL`. `label_names`: K names, in a binary task (negative, positive).
    `groups`: int64 (N,) or None for each row by itself.
    """

    activations: Mapping[str, FloatRows]
    labels: IntRows
    label_names: tuple[str, ...]
    task: Task = Task.BINARY
    groups: IntRows | None = field(default=None)

    @property
    def n_examples(self) -> int:
        """N."""
        return int(self.labels.shape[0])

    @property
    def columns(self) -> IntRows:
        """(N, C) of 0 and 1, what each score column should say: C = 1 in a binary task, else K."""
        if self.task is Task.BINARY:
            return self.labels[:, None]
        if self.task is Task.MULTI_LABEL:
            return self.labels
        one_hot: IntRows = (self.labels[:, None] == np.arange(len(self.label_names))).astype(np.int64)
        return one_hot

    def rows(self, *hook_points: str) -> FloatRows:
        """(N, sum of widths) float64: the activations of `hook_points` side by side, in that order."""
        parts = [np.asarray(self.activations[name], dtype=np.float64) for name in hook_points]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def take(self, index: IntRows) -> LabelledActivations:
        """The examples at `index`, int64 (n,)."""
        return LabelledActivations(
            activations={name: rows[index] for name, rows in self.activations.items()},
            labels=self.labels[index],
            label_names=self.label_names,
            task=self.task,
            groups=None if self.groups is None else self.groups[index],
        )

    def check(self, field: str = "examples") -> LabelledActivations:
        """Returns itself where all is well.

        Raises:
            InvalidArgument: no hook point, numbers of rows that differ, values that are not finite, labels that are not
                labels, one class only, or fewer than `MIN_EXAMPLES_PER_CLASS` examples of a class.
        """
        if not self.activations:
            raise InvalidArgument(
                "no hook point was read",
                reason=reasons.FIELD_REQUIRED,
                field=f"{field}.activations",
                remedy="name at least one hook point",
            )
        for name, rows in self.activations.items():
            check_rows(rows, f"{field}.activations[{name}]", n_rows=self.n_examples)
        if self.groups is not None and self.groups.shape != (self.n_examples,):
            raise InvalidArgument(
                f"groups has shape {self.groups.shape} for {self.n_examples} examples",
                reason=reasons.WRONG_WIDTH,
                field=f"{field}.groups",
                value=self.groups.shape,
                remedy=f"give shape ({self.n_examples},)",
            )
        self._check_labels(f"{field}.labels")
        return self

    def _check_labels(self, field: str) -> None:
        n_names = len(self.label_names)
        wanted = (self.n_examples, n_names) if self.task is Task.MULTI_LABEL else (self.n_examples,)
        if self.labels.shape != wanted or not np.issubdtype(self.labels.dtype, np.integer):
            raise InvalidArgument(
                f"labels are {self.labels.dtype} of shape {self.labels.shape}, expected integers of shape {wanted}",
                reason=reasons.VALUE_MALFORMED,
                field=field,
                value=self.labels.shape,
                remedy="give one class index an example, or a row of 0 and 1 for several labels",
            )
        fits = {Task.BINARY: n_names == 2, Task.MULTI_CLASS: n_names > 2, Task.MULTI_LABEL: n_names > 0}
        if len(set(self.label_names)) != n_names or not fits[self.task]:
            raise InvalidArgument(
                f"{n_names} label names ({', '.join(self.label_names[:5])}) do not make a {self.task.value} task",
                reason=reasons.VALUE_MALFORMED,
                field=f"{field}_names",
                value=n_names,
                remedy="a binary task has two names, negative first, several classes three or more; each once",
            )
        top = 1 if self.task is Task.MULTI_LABEL else n_names - 1
        wrong = (self.labels < 0) | (self.labels > top)
        if wrong.any():
            at = np.argwhere(wrong)[0].tolist()
            raise InvalidArgument(
                f"label {at} is {self.labels[tuple(at)]}, not in 0 to {top}",
                reason=reasons.VALUE_OUT_OF_RANGE,
                field=field,
                value=self.labels[tuple(at)],
                remedy=f"use labels from 0 to {top}",
            )
        if self.task is Task.MULTI_LABEL:
            for column, name in enumerate(self.label_names):
                counts = np.bincount(self.labels[:, column], minlength=2)
                _check_counts({f"without {name!r}": int(counts[0]), f"with {name!r}": int(counts[1])}, field)
        else:
            counts = np.bincount(self.labels, minlength=n_names)
            _check_counts({f"of {name!r}": int(n) for name, n in zip(self.label_names, counts)}, field)


def _check_counts(counts: Mapping[str, int], field: str) -> None:
    present = [what for what, n in counts.items() if n]
    if len(present) < 2:
        raise InvalidArgument(
            f"one class only: every example is {present[0]}" if present else "there are no examples",
            reason=reasons.ONE_CLASS_ONLY if present else reasons.EMPTY_INPUT,
            field=field,
            value=", ".join(f"{n} {what}" for what, n in counts.items()),
            remedy="add examples of the other class",
        )
    for what, n in counts.items():
        if n < MIN_EXAMPLES_PER_CLASS:
            raise InvalidArgument(
                f"{n} examples {what}, at least {MIN_EXAMPLES_PER_CLASS} are needed",
                reason=reasons.TOO_FEW_EXAMPLES,
                field=field,
                value=n,
                remedy=f"add {MIN_EXAMPLES_PER_CLASS - n} or more examples {what}",
            )


def check_rows(
    rows: FloatRows, field: str, *, n_rows: int | None = None, width: int | None = None
) -> FloatRows:
    """`rows` where it is (N, W) and finite.

    Raises:
        InvalidArgument: another rank, another N than `n_rows` or W than `width` (where given), NaN or infinite values.
    """
    wanted = f"({'n' if n_rows is None else n_rows}, {'width' if width is None else width})"
    shape = rows.shape
    if (
        len(shape) != 2
        or shape[1] == 0
        or (n_rows is not None and shape[0] != n_rows)
        or (width is not None and shape[1] != width)
    ):
        raise InvalidArgument(
            f"activations have shape {shape}, expected {wanted}",
            reason=reasons.WRONG_WIDTH,
            field=field,
            value=shape,
            remedy=f"give shape {wanted}: one row an example",
        )
    bad = ~np.isfinite(np.asarray(rows, dtype=np.float64))
    if bad.any():
        at = np.argwhere(bad)[0].tolist()
        raise InvalidArgument(
            f"the activation at [{at[0]}, {at[1]}] is {rows[tuple(at)]}",
            reason=reasons.VALUE_NOT_FINITE,
            field=field,
            value=rows[tuple(at)],
            remedy="leave out the examples whose activations are not finite",
        )
    return rows


@dataclass(frozen=True, kw_only=True, eq=False)
class PairedActivations:
    """Pairs that differ in the concept alone: `positive` and `negative` (M, W) a hook point, row i of one against row i
    of the other.
    """

    positive: Mapping[str, FloatRows]
    negative: Mapping[str, FloatRows]
    label_names: tuple[str, str] = ("negative", "positive")

    def check(self, field: str = "pairs") -> PairedActivations:
        """Returns itself where all is well; raises `InvalidArgument` as `LabelledActivations.check` does."""
        if set(self.positive) != set(self.negative):
            odd = sorted(set(self.positive) ^ set(self.negative))[0]
            raise InvalidArgument(
                f"{odd} was read on one side of the pairs only",
                reason=reasons.FIELD_CONFLICT,
                field=field,
                value=odd,
                remedy="read the same hook points on both sides",
            )
        for name, rows in self.positive.items():
            check_rows(rows, f"{field}.positive[{name}]")
            check_rows(
                self.negative[name], f"{field}.negative[{name}]", n_rows=rows.shape[0], width=rows.shape[1]
            )
        self.labelled().check(field)
        return self

    def labelled(self) -> LabelledActivations:
        """The 2M rows as examples: the negative sides first, then the positive; a pair is a group."""
        n_pairs = next((rows.shape[0] for rows in self.positive.values()), 0)
        return LabelledActivations(
            activations={
                name: np.concatenate([self.negative[name], rows]) for name, rows in self.positive.items()
            },
            labels=np.repeat(np.array([0, 1], dtype=np.int64), n_pairs),
            label_names=self.label_names,
            groups=np.tile(np.arange(n_pairs, dtype=np.int64), 2),
        )

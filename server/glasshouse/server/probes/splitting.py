"""Which examples are learnt from and which are held out: stratified, by groups, the same for the same seed.

1. Rows of one group (a pair, copies of one text) stay together: none is ever on both sides.
2. Groups are dealt out class by class, so that every class is on both sides in about its own share. A group's class
   is the labels of its rows together, so that pairs form a class of their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from glasshouse.server.probes.examples import BoolRows, IntRows, LabelledActivations, Task
from glasshouse.server.types.errors import InvalidArgument
from glasshouse.wire import reasons


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """Row numbers, int64, ascending: `train` (n,) and `held_out` (m,). `n_left_out`: rows that a caller wanted held out
    and that are on neither side, because their group is learnt from.
    """

    train: IntRows
    held_out: IntRows
    n_left_out: int = 0


def split(examples: LabelledActivations, *, held_out_share: float = 0.25, seed: int = 0) -> Split:
    """Holds about `held_out_share` of the groups of each class out, at least one and never all.

    Raises:
        InvalidArgument: a share that is not inside (0, 1), or so few groups that a class would be missing on one side.
    """
    if not 0.0 < held_out_share < 1.0:
        raise InvalidArgument(
            f"held_out_share {held_out_share} is not between 0 and 1",
            reason=reasons.VALUE_OUT_OF_RANGE,
            field="held_out_share",
            value=held_out_share,
            remedy="a quarter is usual",
        )
    groups = np.arange(examples.n_examples) if examples.groups is None else examples.groups
    rng = np.random.default_rng(seed)
    by_kind: dict[Hashable, list[int]] = {}
    for group, kind in _kinds(examples, groups).items():
        by_kind.setdefault(kind, []).append(group)
    chosen: list[int] = []
    for kind in sorted(by_kind, key=repr):
        members = np.array(sorted(by_kind[kind]))
        if len(members) == 1:
            continue
        n_out = min(max(round(held_out_share * len(members)), 1), len(members) - 1)
        chosen.extend(rng.permutation(members)[:n_out].tolist())
    out = np.isin(groups, np.array(chosen, dtype=np.int64))
    found = Split(train=np.flatnonzero(~out), held_out=np.flatnonzero(out))
    for side, rows in (("training", found.train), ("held-out", found.held_out)):
        _both_classes(examples, rows, side)
    return found


def split_as_given(examples: LabelledActivations, held_out: BoolRows) -> Split:
    """The caller's own split: bool (N,), true where a row is held out. Rows of a group (copies of a text) that is also
    learnt from would flatter the figures: they are left out, and counted.

    Raises:
        InvalidArgument: another shape, or a class missing on one side.
    """
    if held_out.shape != (examples.n_examples,):
        raise InvalidArgument(
            f"held_out has shape {held_out.shape} for {examples.n_examples} examples",
            reason=reasons.WRONG_WIDTH,
            field="held_out",
            value=held_out.shape,
            remedy=f"give shape ({examples.n_examples},)",
        )
    kept = held_out.copy()
    if examples.groups is not None:
        kept &= ~np.isin(examples.groups, examples.groups[~held_out])
    found = Split(
        train=np.flatnonzero(~held_out),
        held_out=np.flatnonzero(kept),
        n_left_out=int((held_out & ~kept).sum()),
    )
    for side, rows in (("training", found.train), ("held-out", found.held_out)):
        _both_classes(examples, rows, side)
    return found


def _kinds(examples: LabelledActivations, groups: IntRows) -> dict[int, Hashable]:
    labels = examples.labels if examples.labels.ndim == 2 else examples.labels[:, None]
    kinds: dict[int, set[tuple[int, ...]]] = {}
    for group, label in zip(groups.tolist(), labels.tolist()):
        kinds.setdefault(group, set()).add(tuple(label))
    return {group: tuple(sorted(found)) for group, found in kinds.items()}


def _both_classes(examples: LabelledActivations, rows: IntRows, side: str) -> None:
    columns = examples.columns[rows]
    for column in range(columns.shape[1]):
        if len(rows) and 0 < columns[:, column].sum() < len(rows):
            continue
        name = examples.label_names[1 if examples.task is Task.BINARY else column]
        raise InvalidArgument(
            f"the {len(rows)} {side} examples hold one side of {name!r} only",
            reason=reasons.TOO_FEW_EXAMPLES,
            field="examples",
            value=name,
            remedy="add examples, in more groups, or change held_out_share",
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Duplicates:
    """Copies among keys: `groups` int64 (N,), the same number for the same key; `n_copies` rows beyond the first of
    their key; `conflicting` keys that carry different labels.
    """

    groups: IntRows
    n_copies: int
    conflicting: tuple[Hashable, ...]


def find_duplicates(keys: Sequence[Hashable], labels: Sequence[Hashable]) -> Duplicates:
    """Copies among the examples' `keys` (their texts, or token ids), to be told of and kept on one side of a split."""
    numbers: dict[Hashable, int] = {}
    groups = np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)
    kinds = Counter(key for key, _ in set(zip(keys, labels)))
    return Duplicates(
        groups=groups,
        n_copies=len(keys) - len(numbers),
        conflicting=tuple(key for key, n in kinds.items() if n > 1),
    )

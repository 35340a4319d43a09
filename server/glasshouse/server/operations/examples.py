"""Examples as requests bring them: tokens with labels, and pairs; and what their labels mean together."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from glasshouse.server.probes.examples import BoolRows, IntRows, Task
from glasshouse.server.types.errors import InvalidArgument
from glasshouse.server.types.models import ModelInfo
from glasshouse.server.types.selectors import Selector, resolve
from glasshouse.wire import reasons

# Pairs of names of which the second is the positive one, whoever uses them.
_KNOWN_PAIRS = frozenset({("0", "1"), ("false", "true"), ("no", "yes"), ("negative", "positive")})


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What is read of one input: `positions` (ascending, at least one) of `tokens`."""

    tokens: tuple[int, ...]
    positions: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Example:
    """An input with its labels: one, or in a multi-label task those that hold."""

    reading: Reading
    labels: tuple[str, ...]
    held_out: bool = False


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two inputs that differ in the concept alone."""

    positive: Reading
    negative: Reading
    held_out: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Labelling:
    """Labels as numbers: `labels` int64 (n_examples,), or (n_examples, K) of 0 and 1 for several labels."""

    task: Task
    names: tuple[str, ...]
    labels: IntRows


def reading(tokens: Sequence[int], selector: Selector, info: ModelInfo, field: str) -> Reading:
    """The positions that `selector` takes of `tokens`.

    Raises:
        InvalidArgument: it takes none, or some that the input does not have.
    """
    resolved = resolve(
        selector,
        prompt=tokens,
        n_fed=len(tokens),
        bos_token_id=info.bos_token_id,
        special_token_ids=info.special_token_ids,
        field=f"{field}.positions",
    )
    positions = tuple(resolved.within(0, tokens))
    if not positions:
        raise InvalidArgument(
            f"no position of {field} is selected",
            reason=reasons.EMPTY_INPUT,
            field=f"{field}.positions",
            value=f"0 of {len(tokens)} positions",
            remedy="select at least one position of every example",
        )
    return Reading(tokens=tuple(tokens), positions=positions)


def labelling(
    examples: Sequence[Example],
    *,
    task: Task | None = None,
    names: Sequence[str] = (),
    positive: str = "",
    must_say_positive: bool = False,
) -> Labelling:
    """What the examples' labels mean. `task` None is told from them; `names` empty are those that occur. In a binary task
    the names come out negative first; `must_say_positive` refuses to guess which is which.

    Raises:
        InvalidArgument: a label that is none of the names, several where one is wanted, a positive that is no name.
    """
    known = _names(examples, names)
    if task is None:
        several = any(len(example.labels) != 1 for example in examples)
        task = Task.MULTI_LABEL if several else Task.BINARY if len(known) <= 2 else Task.MULTI_CLASS
    if task is not Task.MULTI_LABEL:
        _one_each(examples)
    if task is Task.BINARY:
        known = _binary(known, positive, explicit=bool(names), must_say_positive=must_say_positive)
    elif positive:
        raise _conflict(f"there is a positive label in a binary task alone, this is {task.value}", positive)
    index = {name: number for number, name in enumerate(known)}
    if task is Task.MULTI_LABEL:
        table = np.zeros((len(examples), len(known)), dtype=np.int64)
        for row, example in enumerate(examples):
            table[row, [index[label] for label in example.labels]] = 1
        return Labelling(task=task, names=known, labels=table)
    labels = np.array([index[example.labels[0]] for example in examples], dtype=np.int64)
    return Labelling(task=task, names=known, labels=labels)


def held_out(items: Sequence[Example] | Sequence[Pair]) -> BoolRows | None:
    """Which items the caller holds out; None where the split is left to us."""
    chosen = np.array([item.held_out for item in items], dtype=bool)
    return chosen if chosen.any() else None


def data_hash(items: Sequence[Example] | Sequence[Pair]) -> str:
    """SHA-256, in hex, over the examples in their order: tokens, positions, labels, which are held out."""
    found = hashlib.sha256()
    for item in items:
        sides = (item.reading,) if isinstance(item, Example) else (item.positive, item.negative)
        labels = sorted(item.labels) if isinstance(item, Example) else None
        parts = [[side.tokens, side.positions] for side in sides]
        found.update(json.dumps([parts, labels, item.held_out]).encode() + b"\n")
    return found.hexdigest()


def _names(examples: Sequence[Example], names: Sequence[str]) -> tuple[str, ...]:
    for index, example in enumerate(examples):
        for at, label in enumerate(example.labels):
            field = f"examples[{index}].labels[{at}]"
            if not label.strip() or len(label) > 100:
                raise _no_label(label, field, "labels have 1 to 100 characters")
            if names and label not in names:
                closest = difflib.get_close_matches(label, names, n=1)
                hint = f"; did you mean {closest[0]!r}?" if closest else ""
                raise _no_label(
                    label, field, f"it is not one of {', '.join(map(repr, list(names)[:8]))}{hint}"
                )
        if len(set(example.labels)) != len(example.labels):
            raise _no_label(
                ", ".join(example.labels), f"examples[{index}].labels", "each label is given once"
            )
    found = sorted({label for example in examples for label in example.labels})
    if names:
        return tuple(names)
    lowered = tuple(name.lower() for name in found)
    return tuple(reversed(found)) if tuple(reversed(lowered)) in _KNOWN_PAIRS else tuple(found)


def _one_each(examples: Sequence[Example]) -> None:
    for index, example in enumerate(examples):
        if len(example.labels) != 1:
            raise InvalidArgument(
                f"examples[{index}] has {len(example.labels)} labels, this task takes one each",
                reason=reasons.FIELD_CONFLICT,
                field=f"examples[{index}].labels",
                value=len(example.labels),
                remedy="give one label each, or train a multi-label probe",
            )


def _binary(
    names: tuple[str, ...], positive: str, *, explicit: bool, must_say_positive: bool
) -> tuple[str, ...]:
    if len(names) != 2:
        # One class only, or three: the examples' own check says which.
        return names if len(names) > 2 else (*names, *(["(none)"] * (2 - len(names))))[:2]
    if positive:
        if positive not in names:
            raise _conflict(f"{positive!r} is not one of the labels {names[0]!r} and {names[1]!r}", positive)
        return (next(name for name in names if name != positive), positive)
    known = (names[0].lower(), names[1].lower()) in _KNOWN_PAIRS
    if must_say_positive and not explicit and not known:
        raise InvalidArgument(
            f"the labels are {names[0]!r} and {names[1]!r}: say which is the concept",
            reason=reasons.FIELD_REQUIRED,
            field="positive_label",
            remedy=f"set positive_label to {names[0]!r} or {names[1]!r}",
        )
    return names


def _no_label(label: str, field: str, why: str) -> InvalidArgument:
    return InvalidArgument(
        f"{field}: {label[:100]!r} is no label: {why}",
        reason=reasons.VALUE_OUT_OF_RANGE,
        field=field,
        value=label,
        remedy="correct the label, or name it among `labels`",
    )


def _conflict(message: str, value: str) -> InvalidArgument:
    return InvalidArgument(
        message,
        reason=reasons.FIELD_CONFLICT,
        field="positive_label",
        value=value,
        remedy="name one of the two labels, or leave it out",
    )

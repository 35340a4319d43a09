"""What a concept is shown by: labelled examples and pairs, in the forms that are handy to write."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from glasshouse.client import builders
from glasshouse.client.exceptions import InvalidArgumentError
from glasshouse.client.inputs import InputLike, as_input
from glasshouse.client.positions import PositionsLike, as_positions
from glasshouse.client.scalars import text
from glasshouse.v1 import examples_pb2
from glasshouse.wire import reasons


@dataclass(frozen=True)
class Example:
    """An input and its label, or in a multi-label task those that hold. `positions`: read of this one in place of the
    request's; `held_out`: judge by it, do not learn from it."""

    input: InputLike
    label: str | Sequence[str]
    positions: PositionsLike | None = None
    held_out: bool = False


@dataclass(frozen=True)
class Pair:
    """Two inputs that differ in the concept alone."""

    positive: InputLike
    negative: InputLike
    held_out: bool = False


ExamplesLike: TypeAlias = (
    "Mapping[str, Sequence[InputLike]] | Sequence[Example | tuple[InputLike, str | Sequence[str]]]"
)
"""``{label: [inputs]}``, or a list of Example or ``(input, label)``."""
PairsLike: TypeAlias = "Sequence[Pair | tuple[InputLike, InputLike]]"
"""A list of Pair or ``(positive, negative)``."""


def example_messages(values: ExamplesLike) -> Iterator[examples_pb2.LabelledExample]:
    """Labelled examples as messages. Raises InvalidArgumentError, naming the one that is wrong."""
    for index, example in enumerate(_examples(values)):
        field = f"examples[{index}]"
        yield examples_pb2.LabelledExample(
            input=builders.model_input(as_input(example.input, f"{field}.input"), f"{field}.input"),
            labels=_labels(example.label, f"{field}.labels"),
            positions=builders.selector(as_positions(example.positions), f"{field}.positions"),
            held_out=example.held_out,
        )


def pair_messages(values: PairsLike) -> Iterator[examples_pb2.ExamplePair]:
    """Pairs as messages."""
    for index, value in enumerate(values):
        field = f"pairs[{index}]"
        pair = value if isinstance(value, Pair) else Pair(*_two(value, field, "(positive, negative)"))
        sides = {
            side: builders.model_input(as_input(given, f"{field}.{side}"), f"{field}.{side}")
            for side, given in (("positive", pair.positive), ("negative", pair.negative))
        }
        yield examples_pb2.ExamplePair(**sides, held_out=pair.held_out)


def _examples(values: ExamplesLike) -> Iterator[Example]:
    if isinstance(values, Mapping):
        for label, inputs in values.items():
            if isinstance(inputs, str):
                raise _not_examples(inputs, f"examples[{label!r}]", "a list of inputs under each label")
            yield from (Example(given, label) for given in inputs)
        return
    listed: Any = values
    if isinstance(listed, str) or not isinstance(listed, Sequence):
        raise _not_examples(values, "examples", "a list of (input, label), or {label: [inputs]}")
    for index, value in enumerate(listed):
        if isinstance(value, Example):
            yield value
        else:
            yield Example(*_two(value, f"examples[{index}]", "(input, label)"))


def _two(value: Any, field: str, form: str) -> tuple[Any, Any]:
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
        raise _not_examples(value, field, form)
    return value[0], value[1]


def _labels(label: str | Sequence[str], field: str) -> list[str]:
    listed = [label] if isinstance(label, str) else list(label)
    return [text(each, f"{field}[{index}]") for index, each in enumerate(listed)]


def _not_examples(value: object, field: str, form: str) -> InvalidArgumentError:
    shown = repr(value)
    return InvalidArgumentError(
        f"{shown if len(shown) <= 80 else shown[:77] + '...'} is not {form}",
        field=field,
        reason=reasons.VALUE_MALFORMED,
        remedy=f"Pass {form}",
    )

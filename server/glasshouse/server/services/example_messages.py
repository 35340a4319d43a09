"""Examples as they stream in: tokenized message by message, so that only their tokens are kept."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from glasshouse.server.operations.examples import Example, Pair, Reading, reading
from glasshouse.server.types.limits import Limits
from glasshouse.server.types.selectors import NamedPositions, Selector
from glasshouse.v1 import examples_pb2 as pb
from glasshouse.v1 import inputs_pb2

from . import fields
from .catalogue import ServedModel
from .inputs import InputReader
from .selectors import selector


class ExampleReader:
    """Gathers the examples and pairs of one request, within the server's limits. `positions`: the request's."""

    def __init__(self, model: ServedModel, limits: Limits, positions: Selector) -> None:
        self._info = model.engine.info
        self._limits = limits
        self._inputs = InputReader(model, limits)
        self._positions = positions
        self._n_tokens = 0
        self.examples: list[Example] = []
        self.pairs: list[Pair] = []

    async def add(self, examples: Sequence[pb.LabelledExample], pairs: Sequence[pb.ExamplePair]) -> None:
        """The next of them; errors name them by their place among all."""
        total = len(self.examples) + len(examples) + 2 * (len(self.pairs) + len(pairs))
        field = "examples" if examples else "pairs"
        fields.count(total, field, self._limits.max_inputs, "max_inputs", "inputs")
        await asyncio.to_thread(self._add, examples, pairs)

    def _add(self, examples: Sequence[pb.LabelledExample], pairs: Sequence[pb.ExamplePair]) -> None:
        for message in examples:
            field = f"examples[{len(self.examples)}]"
            positions = self._positions
            if message.HasField("positions"):
                positions = read_positions(message.positions, True, f"{field}.positions", self._limits)
            self.examples.append(
                Example(
                    reading=self._reading(message.input, message.HasField("input"), positions, field),
                    labels=tuple(message.labels),
                    held_out=message.held_out,
                )
            )
        for pair in pairs:
            field = f"pairs[{len(self.pairs)}]"
            sides = [
                self._reading(
                    getattr(pair, side), pair.HasField(side), self._positions, field, f"{field}.{side}"
                )
                for side in ("positive", "negative")
            ]
            self.pairs.append(Pair(positive=sides[0], negative=sides[1], held_out=pair.held_out))

    def _reading(
        self, message: inputs_pb2.Input, present: bool, positions: Selector, field: str, path: str = ""
    ) -> Reading:
        path = path or f"{field}.input"
        tokens = self._inputs.prompt_now(message, present, path)
        self._n_tokens += len(tokens)
        limit = self._limits.max_input_tokens_total
        fields.count(self._n_tokens, path, limit, "max_input_tokens_total", "tokens in all")
        return reading(tokens, positions, self._info, field)


def read_positions(
    message: inputs_pb2.PositionSelector, present: bool, field: str, limits: Limits
) -> Selector:
    """The selector of something that generates nothing."""
    positions = selector(message, present, field, limits)
    if positions.named is NamedPositions.GENERATED:
        raise fields.out_of_range(
            f"{field}.named", "generated", "all, prompt or last: nothing is generated here"
        )
    return positions

"""A generation of an engine, called in process and read to its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from glasshouse.server.engines.engine import Engine
from glasshouse.server.engines.watching import RequestWatch
from glasshouse.server.types.generation import (
    Finished,
    GenerationRequest,
    NewToken,
    Prefilled,
    Sampling,
)


@dataclass
class Answer:
    """A generation, whole."""

    prefilled: Prefilled | None = None
    tokens: list[NewToken] = field(default_factory=list)
    finished: Finished | None = None

    @property
    def ids(self) -> list[int]:
        return [token.token_id for token in self.tokens]

    @property
    def logprobs(self) -> list[float]:
        return [token.logprob for token in self.tokens]

    @property
    def text(self) -> str:
        tail = self.finished.trailing_text if self.finished else ""
        return "".join(token.text for token in self.tokens) + tail


async def answer(
    engine: Engine, prompt: Sequence[int], *, watch: RequestWatch | None = None, **rest: Any
) -> Answer:
    """Generates, greedily unless told otherwise."""
    rest.setdefault("sampling", Sampling(temperature=0.0))
    answer = Answer()
    async for batch in engine.generate(GenerationRequest(prompt=tuple(prompt), **rest), watch):
        for event in batch:
            match event:
                case Prefilled():
                    answer.prefilled = event
                case NewToken():
                    answer.tokens.append(event)
                case Finished():
                    answer.finished = event
    return answer

"""32 streams at a time: through the server and the client, and of the engine called in process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from glasshouse.client import AsyncModel, Intervention, add_vector
from glasshouse.server.engines.engine import Engine
from glasshouse.server.types import interventions as types
from glasshouse.server.types.generation import GenerationRequest, NewToken, Sampling

from . import workload


@dataclass(frozen=True)
class Stream:
    """A request: greedy, `n_tokens` long whatever the model says, each vector added after its own block."""

    prompt: Sequence[int]
    n_tokens: int = workload.N_TOKENS
    vectors: Sequence[tuple[str, object]] = ()


async def served(model: AsyncModel, stream: Stream) -> int:
    """The tokens that came through gRPC and the client, each looked at as it came."""
    edits: list[Intervention] = [add_vector(name, vector) for name, vector in stream.vectors]
    n_tokens = 0
    async with model.generate(
        list(stream.prompt), max_tokens=stream.n_tokens, temperature=0.0, ignore_eos=True, interventions=edits
    ) as tokens:
        async for _ in tokens:
            n_tokens += 1
    return n_tokens


async def in_process(engine: Engine, stream: Stream, count: Callable[[int], None] = lambda n: None) -> int:
    """The tokens that the engine gave; `count` is told of them as they come."""
    request = GenerationRequest(
        prompt=tuple(stream.prompt),
        max_tokens=stream.n_tokens,
        sampling=Sampling(temperature=0.0),
        ignore_eos=True,
        interventions=tuple(
            types.Intervention(hook_point=name, edit=types.AddVector(vector=vector))  # type: ignore[arg-type]
            for name, vector in stream.vectors
        ),
    )
    n_tokens = 0
    async for batch in engine.generate(request):
        n_new = sum(isinstance(event, NewToken) for event in batch)
        count(n_new)
        n_tokens += n_new
    return n_tokens


async def one_after_another(model: AsyncModel, streams: Sequence[Stream]) -> list[int]:
    """Each begins when the last has ended."""
    return [await served(model, stream) for stream in streams]


async def together(model: AsyncModel, streams: Sequence[Stream]) -> list[int]:
    """All at once, through the server."""
    return await asyncio.gather(*(served(model, stream) for stream in streams))


async def together_in_process(engine: Engine, streams: Sequence[Stream]) -> list[int]:
    """All at once, without a server."""
    return await asyncio.gather(*(in_process(engine, stream) for stream in streams))

"""Forward-only work over many inputs: a window of them computed at a time, the next only while the reader keeps up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

from glasshouse.server.types.generation import ExtractedInput

# Inputs, and their tokens, that are in the engine at once: enough to fill its steps.
WINDOW_INPUTS = 32
WINDOW_TOKENS = 8192


async def windowed(
    lengths: Sequence[int], compute: Callable[[int], Awaitable[ExtractedInput]]
) -> AsyncGenerator[ExtractedInput, None]:
    """`compute(index)` of every input, longest first, each given out as it is done. Leaving early cancels the rest."""
    waiting = sorted(range(len(lengths)), key=lambda index: lengths[index])
    running: dict[asyncio.Future[ExtractedInput], int] = {}
    try:
        while waiting or running:
            n_tokens = sum(lengths[index] for index in running.values())
            while waiting and (
                not running
                or (len(running) < WINDOW_INPUTS and n_tokens + lengths[waiting[-1]] <= WINDOW_TOKENS)
            ):
                index = waiting.pop()
                n_tokens += lengths[index]
                running[asyncio.ensure_future(compute(index))] = index
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for future in done:
                # It counts until its reader comes back for more: by then it has sent it on.
                yield await future
                del running[future]
    finally:
        for future in running:
            future.cancel()
        await asyncio.gather(*running, return_exceptions=True)

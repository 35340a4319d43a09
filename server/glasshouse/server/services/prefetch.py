"""Working ahead: the next items are made while the last one is being used."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import TypeVar, cast

Item = TypeVar("Item")


class _End:
    """The source has no more; or it failed, with `error`."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


async def ahead(source: AsyncIterator[Item], depth: int) -> AsyncGenerator[Item, None]:
    """The items of `source` in order, at most `depth` of them made before they are asked for.

    Closing this closes the source.
    """
    queue: asyncio.Queue[Item | _End] = asyncio.Queue(maxsize=depth)

    async def fetch() -> None:
        error: BaseException | None = None
        try:
            async with aclosing(cast("AsyncGenerator[Item, None]", source)) as items:
                async for item in items:
                    await queue.put(item)
        except Exception as caught:
            error = caught
        await queue.put(_End(error))

    task = asyncio.create_task(fetch())
    try:
        while True:
            item = await queue.get()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

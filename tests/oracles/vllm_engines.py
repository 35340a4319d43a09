"""vLLM engines for tests, one alive at a time."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import threading
import warnings
from collections.abc import AsyncGenerator, Coroutine
from dataclasses import replace
from typing import Any, TypeVar

import pytest

from glasshouse import fable
from glasshouse.server.engines.engine import Engine
from glasshouse.server.types.configuration import EngineSettings, VllmSettings
from glasshouse.server.types.limits import Limits

T = TypeVar("T")
REQUIRED = "GLASSHOUSE_REQUIRE_VLLM"

_PLAIN = VllmSettings(block_size=32, join_timeout_s=20.0)

CONFIGURATIONS: dict[str, VllmSettings] = {
    "eager": replace(_PLAIN, enforce_eager=True),
    # Drafts are fed, and most of them rejected.
    "speculative": replace(
        _PLAIN,
        enforce_eager=True,
        speculative={
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_max": 3,
            "prompt_lookup_min": 1,
        },
    ),
    "two-ranks": replace(_PLAIN, enforce_eager=True, tensor_parallel_size=2),
    # Compiled; prompts fed in pieces, and too few blocks for what runs, so that requests are preempted.
    "compiled": replace(_PLAIN, max_num_batched_tokens=32, num_blocks=20),
}

BOTH = ["transformers", "vllm-eager"]
EVERY_ENGINE = ["transformers", *(f"vllm-{name}" for name in CONFIGURATIONS)]


class VllmPool:
    """Starts engines by the name of their configuration; one that is asked for after another replaces it.

    An engine outlives the event loop of a test, so it has a loop of its own, on a thread of its own.
    """

    def __init__(self) -> None:
        self._name = ""
        self._engine: Engine | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm-engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> VllmPool:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def engine(self, name: str) -> Elsewhere:
        """The running engine of a configuration."""
        require()
        if self._engine is None or self._name != name:
            self._stop()
            self._engine = self._run(started(CONFIGURATIONS[name]))
            self._name = name
        return Elsewhere(self._engine, self._loop)

    def _stop(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            self._run(engine.stop())

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


class Elsewhere:
    """An engine on another event loop, called from this one."""

    def __init__(self, engine: Engine, loop: asyncio.AbstractEventLoop) -> None:
        self.inner, self._loop = engine, loop

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    async def _there(self, work: Coroutine[Any, Any, T]) -> T:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    async def _each(self, items: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
        async def following() -> list[T]:
            try:
                return [await anext(items)]
            except StopAsyncIteration:
                return []

        try:
            while found := await self._there(following()):
                yield found[0]
        finally:

            async def close() -> None:
                await items.aclose()

            await self._there(close())

    def generate(self, *arguments: Any) -> Any:
        """As the engine's."""
        return self._each(self.inner.generate(*arguments))

    def extract(self, *arguments: Any) -> Any:
        """As the engine's."""
        return self._each(self.inner.extract(*arguments))

    async def score(self, *arguments: Any) -> Any:
        """As the engine's."""
        return await self._there(self.inner.score(*arguments))

    async def load_dictionary(self, *arguments: Any) -> Any:
        """As the engine's."""
        return await self._there(self.inner.load_dictionary(*arguments))


def require() -> None:
    """Skips the test, or the module that calls it, where vLLM is not installed; fails it where it must be."""
    if importlib.util.find_spec("vllm"):
        return
    if os.environ.get(REQUIRED):
        pytest.fail(f"vLLM is not installed, and {REQUIRED} says that it must be")
    pytest.skip("vLLM is not installed", allow_module_level=True)


async def started(vllm: VllmSettings, **rest: Any) -> Engine:
    """An engine of fable in float32, started."""
    rest = {"limits": Limits(max_running=32, max_queued=64), "threads": 1} | rest
    settings = EngineSettings(model=str(fable.model_path()), name="fable", dtype="float32", vllm=vllm, **rest)
    with warnings.catch_warnings():
        # vLLM's own, on import.
        warnings.simplefilter("ignore")
        from glasshouse.server.engines.vllm.engine import create

        engine = create(settings)
        await engine.start()
    return engine

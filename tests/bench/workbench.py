"""What bars are measured on, made when first asked for: the server as a process, the engine and the Hugging Face
model in this one, all with the same number of torch threads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import ExitStack
from functools import cached_property
from types import TracebackType
from typing import Any, Self, TypeVar

import torch

from glasshouse import fable
from glasshouse.client import AsyncClient, AsyncModel
from glasshouse.server.engines.transformers.engine import TransformersEngine
from glasshouse.server.models.loaded import LoadedModel
from glasshouse.server.models.loading import load_model
from glasshouse.server.types.limits import Limits
from glasshouse.tour.server_process import ServerProcess

T = TypeVar("T")
LIMITS = Limits(max_running=64)
REPEATS = 5


class Workbench:
    """`repeats`: turns of each comparison; None for 5, or for what a bar says of itself. `long`: also what takes minutes.

    A context manager: leaving it stops what was started.
    """

    def __init__(self, *, threads: int, repeats: int | None = None, long: bool = False) -> None:
        self.threads, self.long = threads, long
        self.asked_repeats, self.repeats = repeats, repeats or REPEATS
        self._stack = ExitStack()
        self._runner = asyncio.Runner()

    def __enter__(self) -> Self:
        torch.set_num_threads(self.threads)
        self._stack.enter_context(self._runner)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs to the end on the one event loop of this process."""
        return self._runner.run(work)

    @cached_property
    def server(self) -> ServerProcess:
        """`glasshouse serve` on fable, on loopback."""
        started = ServerProcess(
            "--listen", "127.0.0.1:0", "--registry", "memory", "--threads", str(self.threads)
        )
        return self._stack.enter_context(started)

    @cached_property
    def served_model(self) -> AsyncModel:
        """fable through the client."""
        client = AsyncClient(self.server.target, timeout=600.0)
        self._stack.callback(lambda: self.run(client.close()))
        return self.run(client.model())

    @cached_property
    def loaded(self) -> LoadedModel:
        """fable loaded as the server loads it."""
        return load_model(fable.model_path(), dtype="auto", device="cpu", name="fable")

    @cached_property
    def engine(self) -> TransformersEngine:
        """The engine in this process."""
        engine = TransformersEngine(self.loaded, limits=LIMITS, threads=self.threads)
        self.run(engine.start())
        self._stack.callback(lambda: self.run(engine.stop()))
        return engine

    @cached_property
    def plain_model(self) -> Any:
        """Hugging Face's own model, as `from_pretrained` makes it, in the dtype that is served."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(fable.model_path(), dtype=self.loaded.dtype).eval()

"""The engines on fable, and the oracle they are compared with (`tests/oracles`).

`engine` is an engine by name, "transformers" where nothing else is asked for. A suite for every engine says so:
`pytest.mark.parametrize("engine", BOTH, indirect=True)`, or `EVERY_ENGINE` for every way that vLLM is configured.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import torch

from glasshouse import fable
from glasshouse.server.engines.transformers.engine import TransformersEngine
from glasshouse.server.models.loading import load_model
from glasshouse.server.types.limits import Limits

from ...oracles import answers
from ...oracles.plain_hooks import Oracle
from ...oracles.vllm_engines import CONFIGURATIONS, VllmPool


@pytest.fixture(scope="session")
def fable_model() -> Any:
    torch.set_num_threads(2)
    return load_model(fable.model_path(), dtype="float32", device="cpu", name="fable")


@pytest.fixture(scope="session")
def vllm_pool() -> Iterator[VllmPool]:
    with VllmPool() as pool:
        yield pool


@pytest.fixture
async def engine(request: pytest.FixtureRequest, fable_model: Any, vllm_pool: VllmPool) -> AsyncIterator[Any]:
    kind, _, configuration = getattr(request, "param", "transformers").partition("-")
    if kind == "vllm":
        shared = vllm_pool.engine(configuration)
        yield shared
        # Whatever a test did, nothing of it is left.
        assert (shared.status().running, shared.status().queued) == (0, 0)
        assert shared.status().healthy
        return
    engine = TransformersEngine(fable_model, limits=Limits(max_running=32, max_queued=64))
    await engine.start()
    yield engine
    await engine.stop()
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in fable_model.model.modules()
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """vLLM's configurations one after the other: each is started once."""
    order = {f"vllm-{name}": place for place, name in enumerate(CONFIGURATIONS, start=1)}
    items.sort(key=lambda item: order.get(_engine_of(item), 0))


def _engine_of(item: pytest.Item) -> str:
    callspec = getattr(item, "callspec", None)
    return "" if callspec is None else str(callspec.params.get("engine", ""))


@pytest.fixture
def answer() -> Callable[..., Any]:
    return answers.answer


@pytest.fixture(scope="session")
def oracle() -> Oracle:
    return Oracle()

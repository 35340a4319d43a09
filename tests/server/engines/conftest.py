"""The engine on fable, and the oracle it is compared with (`tests/oracles`)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import torch

from glasshouse import fable
from glasshouse.server.engines.transformers.engine import TransformersEngine
from glasshouse.server.models.loading import load_model
from glasshouse.server.types.limits import Limits

from ...oracles import answers
from ...oracles.plain_hooks import Oracle


@pytest.fixture(scope="session")
def fable_model() -> Any:
    torch.set_num_threads(2)
    return load_model(fable.model_path(), dtype="float32", device="cpu", name="fable")


@pytest.fixture
async def engine(fable_model: Any) -> AsyncIterator[TransformersEngine]:
    engine = TransformersEngine(fable_model, limits=Limits(max_running=32, max_queued=64))
    await engine.start()
    yield engine
    await engine.stop()
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in fable_model.model.modules()
    )


@pytest.fixture
def answer() -> Callable[..., Any]:
    return answers.answer


@pytest.fixture(scope="session")
def oracle() -> Oracle:
    return Oracle()

"""Tiny random models of every family behind a `GradientModel`, and prompts of equal length."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.server.hooks.conftest import ARCHITECTURES, build_model
from torch import Tensor

from glasshouse.server.attribution.gradient_model import GradientModel
from glasshouse.server.models.loaded import LoadedModel
from glasshouse.server.models.loading import wrap_model

N_TOKENS = 7


def load(arch: str, edit: Callable[[Any], None] | None = None) -> LoadedModel:
    torch.set_num_threads(1)
    model = build_model(arch)
    if edit is not None:
        with torch.no_grad():
            edit(model)
    tokenizer = SimpleNamespace(bos_token_id=1, eos_token_id=2, all_special_ids=[1, 2])
    return wrap_model(model, tokenizer, name=arch)


@pytest.fixture(params=sorted(ARCHITECTURES))
def model(request: pytest.FixtureRequest) -> GradientModel:
    """Every family."""
    return GradientModel(load(str(request.param)))


@pytest.fixture(params=["llama", "gemma2", "gpt2", "gpt_neox", "olmo2"])
def various(request: pytest.FixtureRequest) -> GradientModel:
    """One family of each kind of block: pre-norm, sandwich and capped, learned positions, parallel, post-norm."""
    return GradientModel(load(str(request.param)))


@pytest.fixture
def clean() -> Tensor:
    return torch.randint(3, 61, (1, N_TOKENS), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def corrupt() -> Tensor:
    return torch.randint(3, 61, (1, N_TOKENS), generator=torch.Generator().manual_seed(4))

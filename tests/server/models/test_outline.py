"""A model outlined without its weights says of itself what the loaded one says, and its head answers the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from glasshouse.server.hooks.table import HookTable
from glasshouse.server.models.head import materialise_head, token_contributions
from glasshouse.server.models.loading import load_model, outline_model
from glasshouse.server.types.errors import FailedPrecondition

MakeFolder = Callable[..., Path]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 2},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 30.0},
    "gemma3_text": {"head_dim": 8},
    "gpt2": {"n_positions": 64},
    "gpt_neox": {},
    "olmo2": {},
    "phi3": {"pad_token_id": 0},
}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_same_facts_and_the_same_head(make_folder: MakeFolder, model_type: str) -> None:
    folder = make_folder(model_type, **FAMILIES[model_type])
    loaded, outlined = load_model(folder), outline_model(folder)
    for field in fields(loaded):
        if field.name not in {"model", "tokenizer", "attention"}:
            assert getattr(outlined, field.name) == getattr(loaded, field.name), field.name
    assert HookTable(outlined).points == HookTable(loaded).points
    assert outlined.tokenizer.encode("once upon a time") == loaded.tokenizer.encode("once upon a time")
    assert all(parameter.is_meta for parameter in outlined.model.parameters())

    directions = torch.randn(3, loaded.d_model, generator=torch.Generator().manual_seed(1))
    materialise_head(outlined)
    expected = token_contributions(loaded, directions)
    assert expected.shape == (3, loaded.vocab_size)
    assert expected.abs().max() > 0
    torch.testing.assert_close(token_contributions(outlined, directions), expected)


def test_a_gpu_keeps_the_checkpoints_dtype(make_folder: MakeFolder) -> None:
    folder = make_folder("llama", dtype=torch.float16)
    assert outline_model(folder, device="cuda").dtype == torch.float16
    assert outline_model(folder, device="cuda").device == torch.device("cuda")
    assert outline_model(folder, dtype="bfloat16").dtype == torch.bfloat16


def test_a_checkpoint_without_the_tensor(make_folder: MakeFolder) -> None:
    outlined = outline_model(make_folder("llama"))
    other = make_folder("gpt2", n_positions=64)
    (other.parent / "tiny-llama" / "model.safetensors").write_bytes(
        (other / "model.safetensors").read_bytes()
    )
    with pytest.raises(FailedPrecondition, match=r"has no tensor model\.norm\.weight"):
        materialise_head(outlined)

"""A model with a direction planted in its residual stream, and texts that show it.

Some of the vocabulary comes in pairs of tokens: the embedding of the one is that of the other plus `STRENGTH` times the
direction. The blocks are random and weak, so that the stream carries the direction to its end.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from glasshouse import fable
from glasshouse.server.models.loading import wrap_model
from glasshouse.server.operations.examples import Example, Reading

WIDTH, N_LAYERS, STRENGTH = 64, 3, 8.0
FIRST, N_PAIRS = 100, 200


def direction() -> np.ndarray:
    """(WIDTH,) of length 1."""
    drawn = np.random.default_rng(7).standard_normal(WIDTH)
    return np.asarray(drawn / np.linalg.norm(drawn))


def load() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=WIDTH, intermediate_size=128, num_hidden_layers=N_LAYERS,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        table = torch.randn(4096, WIDTH, generator=torch.Generator().manual_seed(1))
        low, high = slice(FIRST, FIRST + N_PAIRS), slice(FIRST + N_PAIRS, FIRST + 2 * N_PAIRS)
        table[high] = table[low] + STRENGTH * torch.from_numpy(direction()).float()
        model.model.embed_tokens.weight.copy_(table)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.5)
            layer.mlp.down_proj.weight.mul_(0.5)
    return wrap_model(model, AutoTokenizer.from_pretrained(fable.model_path()), name="planted")


def examples(n: int = 400, seed: int = 2, *, shuffled: bool = False) -> tuple[Example, ...]:
    """Texts whose last token shows the direction or does not; `shuffled` says so of others."""
    rng = np.random.default_rng(seed)
    shows = np.arange(n) % 2 == 1
    said = rng.permutation(shows) if shuffled else shows
    found = []
    for index in range(n):
        last = FIRST + int(rng.integers(N_PAIRS)) + (N_PAIRS if shows[index] else 0)
        tokens = (0, *rng.integers(500, 4096, size=6).tolist(), last)
        label = "yes" if said[index] else "no"
        found.append(Example(reading=Reading(tokens=tokens, positions=(len(tokens) - 1,)), labels=(label,)))
    return tuple(found)

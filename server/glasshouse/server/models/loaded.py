"""A model in memory, ready to serve: weights, tokenizer, family, and the facts requests are held against."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from glasshouse.server.models.attention import AttentionSwitch
from glasshouse.server.models.families.spec import FamilySpec
from glasshouse.server.models.tokenizer import TextCodec


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedModel:
    """What `load_model` returns. The module is in eval mode and its parameters take no gradient.

    `source` is the folder or hub id it came from. `d_mlp` is the width of ``mlp.hook_post``, `vocab_size` the
    number of logits (padded rows included). `eos_token_ids` end a generation, `special_token_ids` are those
    that position selectors mean by "not special".
    """

    name: str
    source: str
    model: nn.Module
    tokenizer: TextCodec
    family: FamilySpec
    attention: AttentionSwitch
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    vocab_size: int
    context_length: int
    dtype: torch.dtype
    device: torch.device
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    special_token_ids: frozenset[int]

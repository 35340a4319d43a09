"""Facts of a served model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What a caller may want to know of a model before using it. `revision`: which weights, as `models.revision` names
    them; empty where that is not known.
    """

    name: str
    family: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    vocab_size: int
    context_length: int
    dtype: str
    device: str
    engine: str
    has_chat_template: bool
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    special_token_ids: frozenset[int]
    capabilities: tuple[str, ...]
    # Logits are tanh(x / c) c of what `unembed` reads, where the model caps them.
    final_logit_softcap: float | None = None
    revision: str = ""

"""A hook point: one named place in a model's forward pass that can be read and often written.

Names are TransformerLens'; the path in the Hugging Face module tree stands beside each. A bare path is the
module's output; a suffix after a colon says what else it is:

- ``model.layers.5`` is what leaves the block, ``model.layers.5:input`` what enters it;
- ``model.layers.5.input_layernorm`` is the norm's output with its gain,
  ``model.layers.5.input_layernorm:normalized`` the same before the gain;
- ``transformer.h.5.attn.c_attn:q`` is one part of a fused projection;
- ``model.layers.5.self_attn:pattern`` is computed inside attention and leaves no module of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

HookPointKind = Literal["residual", "flat", "heads", "attention"]
"""The shape at one position.

- ``residual``: (width,), width == d_model, a place on the residual stream or a contribution added to it.
- ``flat``: (width,), any other vector: MLP neurons, normalised streams, logits.
- ``heads``: (width,), width == n_heads * d_head, head-major.
- ``attention``: maps (n_heads, n_query, n_key) of a whole sequence; width 0.
"""


@dataclass(frozen=True, kw_only=True)
class HookPoint:
    """One place of one model. `n_heads` and `d_head` are 0 where the point has no heads.

    `layer` is None outside the blocks. For key and value points `n_heads` counts key-value heads, unrepeated.
    """

    name: str
    module_path: str
    kind: HookPointKind
    layer: int | None
    width: int
    n_heads: int
    d_head: int
    readable: bool
    writable: bool
    note: str = ""

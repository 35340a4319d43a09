"""The baseline of the average token: what integrated gradients start from unless told otherwise.

1. Every token's embedding, as it enters the stream, is averaged over the vocabulary, once a model.
2. At `hook_embed` that mean is the baseline, at every position. At any other hook point it is the activation there of
   an input made of such tokens, so that the baseline means the same wherever it is taken.

Zero, the baseline of pictures, is no input of a language model: a norm divides by the size of what it reads, so that a
model turns as fast as you like near zero and what is integrated there is the norm. The average token has a size that
norms are used to and says nothing of the prompt but its length.

Shapes: T positions, D width of the hook point.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glasshouse.server.attribution.editing import setting
from glasshouse.server.attribution.gradient_model import GradientModel

EMBED = "hook_embed"


@torch.no_grad()
def average_input(model: GradientModel, tokens_BT: Tensor, hook_point: str) -> Tensor:
    """(T, D): the activation at `hook_point` of as many average tokens."""
    mean = model.mean_embedding.expand(1, tokens_BT.shape[1], -1)
    run = model.forward(tokens_BT[:1], read=[hook_point], edits={EMBED: [setting(mean)]})
    return run.readings[hook_point][0]

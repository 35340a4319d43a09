"""The logit lens: the residual stream read as a next-token distribution (nostalgebraist 2020).

unembed(final_norm(s)), with the model's own final norm and gain, and its final soft cap where it has one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glasshouse.server.types.readouts import TopTokens


def top_tokens(logits_NV: Tensor, top_k: int) -> list[TopTokens]:
    """The `top_k` likeliest tokens of each row with their natural log-probabilities, descending."""
    logprobs = torch.log_softmax(logits_NV.float(), dim=-1)
    values, ids = logprobs.topk(min(top_k, logprobs.shape[-1]), dim=-1)
    host_ids, host_values = ids.to(torch.int32).cpu().numpy(), values.cpu().numpy()
    return [TopTokens(host_ids[row], host_values[row]) for row in range(host_ids.shape[0])]

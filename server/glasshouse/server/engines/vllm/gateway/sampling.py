"""A request as vLLM's sampling parameters, and its log-probabilities as ours.

- Ends are token ids: the model's own are handed over as stop tokens, and `ignore_eos` is always on, so that what ends
  a generation is decided in one place (`engines.transcript`).
- Log-probabilities are of the logits as they are, before temperature and filters: vLLM's `raw_logprobs`.
- A seed makes a request's tokens independent of its company. vLLM's random stream is not that of the transformers engine:
  the same seed gives other tokens there.
- One sequence a request. Several are several requests, each with its own seed and receipt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from glasshouse.server.types.generation import GenerationRequest
from glasshouse.server.types.readouts import TopTokens

_SEED_BITS = 2**63 - 1


def generation_params(
    request: GenerationRequest, ends: Sequence[int], plan: Mapping[str, bytes], *, recompute_prompt: bool
) -> Any:
    """`SamplingParams` of a generation; `plan` goes to the workers, `recompute_prompt` keeps it off the prefix cache."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    sampling = request.sampling
    greedy = sampling.temperature == 0.0
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=1.0 if greedy else sampling.top_p,
        top_k=0 if greedy else sampling.top_k,
        # Two's complement without its sign: vLLM takes -1 for no seed.
        seed=None if greedy else sampling.seed & _SEED_BITS,
        max_tokens=request.max_tokens,
        stop_token_ids=list(ends),
        ignore_eos=True,
        logprobs=request.top_logprobs,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args=dict(plan) or None,
        skip_reading_prefix_cache=recompute_prompt,
        skip_clone=True,
    )


def forward_params(
    plan: Mapping[str, bytes], *, prompt_logprobs: int | None = None, recompute_prompt: bool
) -> Any:
    """`SamplingParams` of forward-only work: the prompt is fed, and one token thrown away."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    return SamplingParams(
        temperature=0.0,
        max_tokens=1,
        ignore_eos=True,
        prompt_logprobs=prompt_logprobs,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args=dict(plan) or None,
        skip_reading_prefix_cache=recompute_prompt,
        skip_clone=True,
    )


def top_tokens(entry: Mapping[int, Any], top_k: int) -> TopTokens:
    """The `top_k` likeliest of one position's log-probabilities, which hold the chosen token too."""
    ranked = sorted((item.rank, token, item.logprob) for token, item in entry.items() if item.rank <= top_k)
    return TopTokens(
        np.array([token for _, token, _ in ranked], dtype=np.int32),
        np.array([logprob for _, _, logprob in ranked], dtype=np.float32),
    )

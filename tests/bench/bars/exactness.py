"""A batch of 16 requests under 16 treatments against Hugging Face with forward hooks, one at a time, in float32."""

from __future__ import annotations

import asyncio

import numpy as np

from glasshouse import fable
from glasshouse.server.engines.transformers.engine import TransformersEngine
from glasshouse.server.models.loading import load_model
from glasshouse.server.types.readouts import ReadActivations

from ...oracles.answers import Answer, answer
from ...oracles.plain_hooks import Oracle
from ...oracles.treatments import N_TOKENS, PROMPTS, READ, hooked, treatments
from ..harness import Report
from ..workbench import LIMITS, Workbench

BAR_LOGPROB = 1e-4
BAR_CAPTURE = 1e-5


def run(bench: Workbench, report: Report) -> None:
    """exact_tokens, exact_logprobs, exact_captures"""
    loaded = load_model(fable.model_path(), dtype="float32", device="cpu", name="fable")
    parts = treatments(loaded.d_model, loaded.d_mlp)
    prompts = [loaded.tokenizer.encode(PROMPTS[i % len(PROMPTS)]) for i in range(len(parts))]

    async def batch() -> list[Answer]:
        engine = TransformersEngine(loaded, limits=LIMITS, threads=bench.threads)
        await engine.start()
        try:
            return await asyncio.gather(
                *(
                    answer(
                        engine,
                        prompt,
                        max_tokens=N_TOKENS,
                        ignore_eos=True,
                        interventions=tuple(part.ours for part in treatment),
                        readouts=(ReadActivations(hook_point=READ),),
                    )
                    for prompt, treatment in zip(prompts, parts, strict=True)
                )
            )
        finally:
            await engine.stop()

    oracle = Oracle()
    n_equal, logprob_difference, capture_error = 0, 0.0, 0.0
    for got, prompt, treatment in zip(bench.run(batch()), prompts, parts, strict=True):
        ids, logprobs, captures = oracle.greedy(prompt, N_TOKENS, hooked(treatment, len(prompt)), [READ])
        n_equal += got.ids == ids
        logprob_difference = max(logprob_difference, float(np.abs(np.subtract(got.logprobs, logprobs)).max()))
        capture_error = max(capture_error, _relative_error(got, captures[READ].numpy()))
    baseline = "Hugging Face with forward hooks, one at a time"
    report("exact_tokens", n_equal, f"of {len(parts)}", baseline, f"= {len(parts)}", n_equal == len(parts))
    report(
        "exact_logprobs",
        logprob_difference,
        "nats",
        baseline,
        f"<= {BAR_LOGPROB:g}",
        logprob_difference <= BAR_LOGPROB,
    )
    report(
        "exact_captures",
        capture_error,
        "relative",
        baseline,
        f"<= {BAR_CAPTURE:g}",
        capture_error <= BAR_CAPTURE,
    )


def _relative_error(got: Answer, reference: np.ndarray) -> float:
    """Of the activations at every position fed, prompt and generated."""
    assert got.prefilled is not None
    rows = [token.readouts[0] for token in got.tokens[1:]]
    ours = np.concatenate([got.prefilled.readouts[0].values, np.stack(rows)])
    return float(np.abs(ours - reference).max() / np.abs(reference).max())

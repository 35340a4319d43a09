"""What a probe makes of inputs: activations at its hook points, pooled as it was trained, scored."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import numpy as np
import torch

from glasshouse.server.probes.pooling import Pooling, RunningPool, pool
from glasshouse.server.probes.served import ServedProbe
from glasshouse.server.types.errors import InvalidArgument
from glasshouse.server.types.generation import ExtractionRequest
from glasshouse.server.types.interventions import Intervention
from glasshouse.server.types.readouts import Array
from glasshouse.server.types.selectors import Selector
from glasshouse.wire import reasons

from .engine import Engine


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoredInput:
    """Scores float32 (n_rows, n_columns) of one input; row i belongs to `positions[i]`, of a pooled input the last that
    went into it.
    """

    index: int
    positions: tuple[int, ...]
    scores: Array


async def score_inputs(
    engine: Engine,
    probe: ServedProbe,
    inputs: Sequence[tuple[int, ...]],
    positions: Selector,
    interventions: tuple[Intervention, ...] = (),
    *,
    every_position: bool = False,
    request_id: str = "",
) -> AsyncGenerator[ScoredInput, None]:
    """Each input as it is done, in any order. `every_position`: a row at every selected position, over what came up to
    it, as a generation reads it; a token-pooled probe has no other form.

    Raises:
        InvalidArgument: an input of which no position is selected, or what extraction refuses.
    """
    request = ExtractionRequest(
        inputs=tuple(inputs),
        hook_points=probe.facts.hook_points,
        positions=positions,
        interventions=interventions,
        request_id=request_id,
    )
    every = every_position or probe.facts.pooling is Pooling.TOKEN
    async with aclosing(engine.extract(request)) as results:
        async for done in results:
            if not done.positions:
                raise InvalidArgument(
                    f"no position of inputs[{done.index}] is selected",
                    reason=reasons.EMPTY_INPUT,
                    field="positions",
                    value=f"0 positions of inputs[{done.index}]",
                    remedy="select at least one position of every input",
                )
            scores = await asyncio.to_thread(_score, probe, done.activations, every)
            yield ScoredInput(
                index=done.index,
                positions=done.positions if every else done.positions[-1:],
                scores=scores,
            )


@torch.inference_mode()
def _score(probe: ServedProbe, activations: Sequence[Array], every: bool) -> Array:
    parts = {}
    for name, array in zip(probe.facts.hook_points, activations, strict=True):
        x_TD = torch.from_numpy(np.asarray(array))
        parts[name] = RunningPool(probe.facts.pooling).add(x_TD) if every else pool(x_TD, probe.facts.pooling)
    scores: Array = probe.score(probe.join(parts)).float().numpy()
    return scores

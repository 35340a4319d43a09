"""The distribution that drift is measured against: a monitor's own scores of texts that someone calls typical.

The texts are watched as requests are, by the same roster of one, so that what is compared later is compared with itself.
A watch on generated positions looks at all positions of the texts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace

import numpy as np

from glasshouse.server.engines.engine import Engine
from glasshouse.server.engines.watching import RequestWatch, Roster, Watch
from glasshouse.server.probes.aggregation import Aggregation, Rule
from glasshouse.server.probes.drift import DEFAULT_BINS, ScoreHistogram
from glasshouse.server.types.conditions import MonitorAction
from glasshouse.server.types.errors import ServingError
from glasshouse.server.types.generation import GenerationRequest, Sampling

# Texts in the engine's queue at once: live requests are not to wait for a calibration.
_AT_ONCE = 4


async def calibrate(
    watch: Watch, engine: Engine, inputs: Sequence[tuple[int, ...]], *, field: str
) -> ScoreHistogram:
    """The histogram of the watch's scores over `inputs` (token ids).

    Raises:
        InvalidArgument: fewer scores than the histogram has bins, or an input that does not fit the context.
    """
    never = Rule(aggregation=Aggregation.MAX, on_above=float(np.finfo(np.float64).max))
    plain = replace(
        watch,
        rule=never,
        on_prompt=True,
        action=MonitorAction.OBSERVE,
        interventions=(),
        wants_text=False,
    )
    roster = Roster([plain], lambda sightings: None, max_logged=1 << 62)
    places = asyncio.Semaphore(_AT_ONCE)

    async def score(tokens: tuple[int, ...]) -> None:
        request = GenerationRequest(prompt=tokens, max_tokens=1, sampling=Sampling(temperature=0.0))
        async with (
            places,
            aclosing(engine.generate(request, RequestWatch(roster, np.ones(1, bool)))) as batches,
        ):
            async for _ in batches:
                pass

    await asyncio.gather(*(score(tokens) for tokens in inputs))
    parts = roster.log.drain()
    scores = np.concatenate([scores[use] for scores, use in parts]) if parts else np.zeros(0)
    try:
        return ScoreHistogram.of(scores[np.isfinite(scores)], n_bins=DEFAULT_BINS)
    except ServingError as error:
        error.field = field
        raise

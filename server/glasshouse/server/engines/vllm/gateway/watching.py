"""Monitors over a request that vLLM runs: activations at the points they read are asked for as readouts of our own, and
scored here once their positions are known to stay.

A generation ends at the position that crossed, as on the transformers engine: no token is handed out before its position
has been looked at. Steering by a monitor would have to change edits within a step, which workers do not do: it is refused
when the monitor is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from glasshouse.server.engines.watching import RequestWatch, WatchedPass
from glasshouse.server.hooks.table import HookTable
from glasshouse.server.readouts.prepared import PreparedReadout
from glasshouse.server.types.conditions import Abort, MonitorFlag
from glasshouse.server.types.readouts import PromptReadout, ReadoutValue
from glasshouse.server.types.selectors import ResolvedPositions
from glasshouse.server.types.spans import Span

# Readout indices below those of a request's own conditions.
_FIRST_INDEX = -1_000_000


class WatchedRequest:
    """What watches one request of this engine."""

    def __init__(self, watch: RequestWatch, prompt: Sequence[int], n_fed: int, table: HookTable) -> None:
        self._watch, self._prompt = watch, prompt
        roster = watch.roster
        self._on_prompt = bool((watch.watched_M & roster.on_prompt_M).any())
        start = 0 if self._on_prompt else len(prompt)
        positions = ResolvedPositions(ranges=((start, n_fed),), n_prompt=len(prompt))
        self._names = {_FIRST_INDEX - place: name for place, name in enumerate(roster.columns.points)}
        self.readouts = tuple(
            PreparedReadout(index=index, points=(table.resolve(name),), positions=positions)
            for index, name in self._names.items()
        )

    @property
    def abort(self) -> Abort | None:
        """What ends the generation."""
        return self._watch.abort

    @property
    def flags(self) -> tuple[MonitorFlag, ...]:
        """What was flagged."""
        return tuple(self._watch.flags)

    def over_prompt(self, readouts: Sequence[PromptReadout]) -> None:
        """The prompt has been read."""
        self._watch.begin(self._prompt)
        if not self._on_prompt:
            return
        found = {part.readout: part.values for part in readouts if part.readout in self._names}
        watched = WatchedPass([self._watch], one_token=False)
        watched.begin()
        for index, name in self._names.items():
            values = found[index]
            assert isinstance(values, np.ndarray), "a watch reads activations"
            watched.at(name, torch.from_numpy(values)[None], may_change=False)
        watched.conclude_prompts([Span(0, self._prompt)])

    def at(self, position: int, token_id: int, values: Mapping[int, ReadoutValue]) -> None:
        """A position beyond the prompt has been read: `token_id` was fed there."""
        if self._watch.wants_text:
            self._watch.generated.append(token_id)
        watched = WatchedPass([self._watch], one_token=True)
        watched.begin()
        for index, name in self._names.items():
            value = values[index]
            assert isinstance(value, np.ndarray), "a watch reads activations"
            # The frame that it lies in cannot be written.
            watched.at(name, torch.from_numpy(value.copy())[None, None], may_change=False)
        watched.conclude_step([position], [token_id])

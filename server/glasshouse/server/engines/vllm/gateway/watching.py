"""Monitors over a request that vLLM runs: activations at the points they read are asked for as readouts of our own, and
scored here once their positions are known to stay.

A generation ends at the position that crossed, as on the transformers engine: no token is handed out before its position
has been looked at. Monitors that steer have been scored by the worker, which had to know before its next pass (see
`contract.watches`); its scores take the place of ours, and the rules are stepped over them as over any others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from glasshouse.server.engines.watching import RequestWatch, WatchedPass, prepare_steering
from glasshouse.server.hooks.table import HookTable
from glasshouse.server.interventions.edits import PreparedIntervention
from glasshouse.server.readouts.prepared import PreparedReadout
from glasshouse.server.types.conditions import Abort, MonitorFlag
from glasshouse.server.types.errors import FailedPrecondition
from glasshouse.server.types.interventions import Intervention
from glasshouse.server.types.readouts import Array, PromptReadout, ReadoutValue
from glasshouse.server.types.selectors import ResolvedPositions
from glasshouse.server.types.spans import Span
from glasshouse.wire import reasons

from ..contract import SCORES, Steering
from ..contract.watches import Ranges

# Readout indices below those of a request's own conditions.
_FIRST_INDEX = -1_000_000

Make = Callable[[Sequence[Intervention]], tuple[PreparedIntervention, ...]]


def check_steering(*, speculating: bool, n_stages: int, field: str) -> None:
    """Raises `FailedPrecondition` where what a monitor sees comes too late to steer what is fed next."""
    if speculating:
        why, setting = (
            "under speculation the next positions are fed before it has scored the last",
            "vllm.speculative",
        )
        remedy = "serve without vllm.speculative"
    elif n_stages > 1:
        why, setting = "pipeline stages do not know what another has scored", "vllm.pipeline_parallel_size"
        remedy = "serve with vllm.pipeline_parallel_size = 1; tensor_parallel_size may be more"
    else:
        return
    raise FailedPrecondition(
        f"a monitor cannot steer with {setting} set: {why}",
        reason=reasons.CAPABILITY_MISSING,
        field=field,
        value="steer",
        remedy=f"{remedy}, or put a condition on an intervention of the request",
    )


class WatchedRequest:
    """What watches one request of this engine."""

    def __init__(
        self, watch: RequestWatch, prompt: Sequence[int], n_fed: int, table: HookTable, make: Make
    ) -> None:
        """`make`: makes the edits of a watch ready for this request."""
        self._watch, self._prompt = watch, prompt
        prepare_steering(watch, make)
        roster = watch.roster
        self._on_prompt = bool((watch.watched_M & roster.on_prompt_M).any())
        start = 0 if self._on_prompt else len(prompt)
        positions = ResolvedPositions(ranges=((start, n_fed),), n_prompt=len(prompt))
        self._steers = watch.needs_edits
        names = roster.columns.points
        if self._steers and watch.watched_M.sum() == len(self._steers):
            # The workers score all that counts.
            names = ()
        self._names = {_FIRST_INDEX - place: name for place, name in enumerate(names)}
        self.readouts = tuple(
            PreparedReadout(index=index, points=(table.resolve(name),), positions=positions)
            for index, name in self._names.items()
        )
        self.steering: Steering | None = None
        if self._steers:
            watches = tuple(roster.watches[index] for index in self._steers)
            self.steering = Steering(
                watches=watches,
                edits=tuple(watch.steers[index] for index in self._steers),
                n_prompt=len(prompt),
            )
            points = dict.fromkeys(point.name for one in watches for point in one.source.points)
            scored = tuple(table.resolve(name) for name in points)
            self.readouts += (PreparedReadout(index=SCORES, points=scored, positions=positions),)
        # Of the positions beyond the prompt, one after the other.
        self._step: WatchedPass | None = None
        # Positions that have been looked at: where the roster fails, none from then on.
        self.n_seen = 0

    @property
    def steered(self) -> dict[int, Ranges]:
        """Where each watch of `steering` has had its edits in force, by its index there."""
        return {place: self._watch.ranges.get(index, ()) for place, index in enumerate(self._steers)}

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
        if self._on_prompt:
            self._see_prompt(readouts)
        if not self._watch.roster.broken:
            self.n_seen = len(self._prompt)

    def _see_prompt(self, readouts: Sequence[PromptReadout]) -> None:
        found = {part.readout: part.values for part in readouts if part.readout <= _FIRST_INDEX}
        watched = WatchedPass([self._watch], one_token=False)
        watched.begin()
        for index, name in self._names.items():
            values = found[index]
            assert isinstance(values, np.ndarray), "a watch reads activations"
            watched.at(name, torch.from_numpy(values)[None], may_change=False)
        if self._steers:
            watched.give(self._steers, _array(found[SCORES]))
        watched.conclude_prompts([Span(0, self._prompt)])

    def at(self, position: int, token_id: int, values: Mapping[int, ReadoutValue]) -> None:
        """A position beyond the prompt has been read: `token_id` was fed there."""
        if self._watch.wants_text:
            self._watch.generated.append(token_id)
        if self._step is None:
            self._step = WatchedPass([self._watch], one_token=True)
        watched = self._step
        watched.begin()
        for index, name in self._names.items():
            value = values[index]
            assert isinstance(value, np.ndarray), "a watch reads activations"
            # The frame that it lies in cannot be written.
            watched.at(name, torch.from_numpy(value.copy())[None, None], may_change=False)
        if self._steers:
            watched.give(self._steers, _array(values[SCORES])[None])
        watched.conclude_step([position], [token_id])
        if not self._watch.roster.broken:
            self.n_seen = position + 1


def _array(values: object) -> Array:
    assert isinstance(values, np.ndarray), "scores of watches are an array"
    return values

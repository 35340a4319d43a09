"""What looks at a generation beside its caller: its own conditions for ending early, and monitors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from glasshouse.server.engines.aborting import NOTHING, AbortCondition, AbortConditions
from glasshouse.server.readouts.prepared import PreparedReadout
from glasshouse.server.types.conditions import Abort, MonitorFlag
from glasshouse.server.types.readouts import PromptReadout, ReadoutValue

from ..contract import Steering
from ..contract.watches import Ranges
from .watching import WatchedRequest


class Looking:
    """One request's. Their readouts have negative indices, so that no caller sees them."""

    def __init__(self, abort_when: Sequence[AbortCondition], watched: WatchedRequest | None) -> None:
        self._conditions = AbortConditions(abort_when)
        self._watched = watched
        self.readouts: tuple[PreparedReadout, ...] = self._conditions.readouts
        if watched is not None:
            self.readouts += watched.readouts
        self.looks = bool(self.readouts)
        # What monitors may steer by.
        self.steering: Steering | None = None if watched is None else watched.steering

    @property
    def flags(self) -> tuple[MonitorFlag, ...]:
        """What monitors flagged."""
        return () if self._watched is None else self._watched.flags

    @property
    def n_seen(self) -> int:
        """The positions that monitors have looked at."""
        return 0 if self._watched is None else self._watched.n_seen

    @property
    def steered(self) -> Mapping[int, Ranges]:
        """Where each watch of `steering` has had its edits in force."""
        return {} if self._watched is None else self._watched.steered

    def over_prompt(self, readouts: Sequence[PromptReadout]) -> Abort | None:
        """Sees the prompt; what ends the generation."""
        if self._watched is not None:
            self._watched.over_prompt(readouts)
            if self._watched.abort is not None:
                return self._watched.abort
        return self._conditions.over_prompt(readouts)

    def at(self, position: int, token_id: int, values: Mapping[int, ReadoutValue]) -> Abort | None:
        """Sees a position beyond the prompt; what ends the generation."""
        if self._watched is not None:
            self._watched.at(position, token_id, values)
            if self._watched.abort is not None:
                return self._watched.abort
        return self._conditions.at(position, values)

    def without(self, values: Mapping[int, ReadoutValue]) -> Mapping[int, ReadoutValue]:
        """What the caller asked for."""
        if not self.looks:
            return values
        return {index: value for index, value in values.items() if index >= 0} or NOTHING

    def without_prompt(self, readouts: Sequence[PromptReadout]) -> tuple[PromptReadout, ...]:
        """What the caller asked for."""
        return tuple(readout for readout in readouts if readout.readout >= 0)

"""What passes ran of the hooked requests, kept until there is something else to say or a request ends.

Nobody reads the account before its request's receipt, and a message a step costs the engine's thread more than a step's
edits do. A batch of decoding rows that goes on under one plan is one entry, however many steps it takes.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from glasshouse.server.engines.vllm.contract.messages import Ran

from .planning import StepPlan

# Passes that are kept at most.
MOST_STEPS = 64


class Account:
    """The passes since the last report, on the engine's thread."""

    def __init__(self) -> None:
        self._entries: list[Ran] = []
        self._n_steps = 0
        # The plan that the last entry is of, and its age then.
        self._last: tuple[StepPlan, int] | None = None

    @property
    def full(self) -> bool:
        """Whether it is time to report."""
        return self._n_steps >= MOST_STEPS

    def book(self, plan: StepPlan) -> None:
        """A pass has run under `plan`."""
        self._n_steps += 1
        last, self._last = self._last, (plan, plan.age)
        if last is not None and last[0] is plan and last[1] == plan.age - 1:
            self._entries[-1] = replace(self._entries[-1], steps=self._entries[-1].steps + 1)
            return
        self._entries.append(
            Ran(
                tags=plan.tags,
                starts=plan.starts + np.int32(plan.age) if plan.age else plan.starts,
                counts=plan.counts,
                applied=plan.applied,
            )
        )

    def take(self) -> tuple[Ran, ...]:
        """What has been booked; nothing of it is kept."""
        entries, self._entries = tuple(self._entries), []
        self._n_steps, self._last = 0, None
        return entries

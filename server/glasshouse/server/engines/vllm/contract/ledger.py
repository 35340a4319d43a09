"""The receipt's arithmetic: which positions ran under a request's edits, and how often edits were applied there.

The worker counts applications by the rows its kernels took; the gateway knows the clauses. Both counts must agree,
run by run of positions, or the request is reported as not applied. Positions that run twice (preemption, rejected
drafts) count once; those taken from the prefix cache ran before, under the same edits, for the cache is salted with them.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from .clauses import Clause
from .plan import EditPlan
from .watches import Ranges, within


@dataclass
class Ledger:
    """One request's account on one reporter. `edits`: those of the request that write at sites of this reporter. `runs`:
    (first position, positions, applications).
    """

    edits: Sequence[EditPlan]
    runs: list[tuple[int, int, int]] = field(default_factory=list)
    # The first position that has not run yet.
    frontier: int = 0

    def ran(self, start: int, count: int, applied: int) -> None:
        """Books `count` positions from `start` at which edits were applied `applied` times in all."""
        self.runs.append((start, count, applied))
        self.frontier = max(self.frontier, start + count)

    def steered(self, in_force: Mapping[int, Ranges], n_known: int) -> None:
        """Says where each watch's edits were due, by index of the watch, as far as position `n_known`: what the worker ran
        beyond came of scores that nobody has looked at here, for the request had ended.
        """
        if any(edit.watch >= 0 for edit in self.edits):
            self.edits = [
                edit
                if edit.watch < 0
                else replace(edit, clause=within(edit.clause, in_force.get(edit.watch, ())))
                for edit in self.edits
            ]
            self.runs = [run for run in self.runs if run[0] + run[1] <= n_known]

    def first_mismatch(self, token_ids: Sequence[int]) -> tuple[int, int, int, int] | None:
        """(start, count, applied, expected) of the first run whose count is not what the clauses say; None: all agree.

        `token_ids`: prompt and generated tokens. Where a clause excludes tokens, runs beyond them (rejected drafts)
        are skipped.
        """
        by_token = any(edit.clause.excluded_token_ids for edit in self.edits)
        for start, count, applied in self.runs:
            if by_token:
                # Under speculation a run may have fed drafts that were rejected: its tokens are no longer known. (Where
                # tokens count, every pass is booked by itself.)
                if count > 1 and start + count > self.edits[0].clause.n_prompt:
                    continue
                if start + count > len(token_ids):
                    continue
            expected = sum(covered(edit.clause, start, start + count, token_ids) for edit in self.edits)
            if expected != applied:
                return start, count, applied, expected
        return None

    def applied(self, n_fed: int, token_ids: Sequence[int]) -> dict[int, int]:
        """Positions below `n_fed` (those fed in the end) at which each edit was applied, by edit index."""
        return {edit.index: covered(edit.clause, 0, n_fed, token_ids) for edit in self.edits}

    def complete(self, n_fed: int) -> bool:
        """Whether every position below `n_fed` has been reported (those from the prefix cache lie before the first run)."""
        return self.frontier >= n_fed


def covered(clause: Clause, start: int, stop: int, token_ids: Sequence[int]) -> int:
    """Positions of [start, stop) that a clause selects."""
    total = 0
    first = bisect.bisect_right(clause.ranges, start, key=lambda bounds: bounds[1])
    excluded = frozenset(clause.excluded_token_ids)
    for low, high in clause.ranges[first:]:
        if low >= stop:
            break
        low, high = max(low, start), min(high, stop)
        total += high - low
        if excluded:
            total -= sum(
                token_ids[p] in excluded for p in range(max(low, clause.n_prompt), min(high, len(token_ids)))
            )
    return total

"""How a figure is measured and reported.

1. A bar is a ratio of two things measured in the same run. They are measured in turns, and each turn gives one
   ratio, so that whatever else the machine does weighs on both alike; the figure is the median of the ratios.
2. One line a figure: `NAME VALUE UNIT (baseline ..., bar ...)`. All of them go to `.bench/results.json`.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

RESULTS = Path(__file__).parents[2] / ".bench" / "results.json"


class Report(Protocol):
    """Called once a figure. `bar` says what it is held against, "none" where it only informs."""

    def __call__(self, name: str, value: float, unit: str, baseline: str, bar: str, holds: bool) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One line of the results."""

    name: str
    value: float
    unit: str
    baseline: str
    bar: str
    holds: bool

    def __str__(self) -> str:
        return f"{self.name} {self.value:.3g} {self.unit} (baseline {self.baseline}, bar {self.bar})"


class Results:
    """Prints each figure as it comes and keeps all of them."""

    def __init__(self) -> None:
        self.figures: list[Figure] = []

    def report(self, name: str, value: float, unit: str, baseline: str, bar: str, holds: bool) -> None:
        """Takes a figure; a `Report`."""
        figure = Figure(
            name=name, value=float(value), unit=unit, baseline=baseline, bar=bar, holds=bool(holds)
        )
        self.figures.append(figure)
        print(figure, flush=True)

    def write(self, path: Path = RESULTS) -> None:
        """Writes the list of figures."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([asdict(figure) for figure in self.figures], indent=1) + "\n")

    @property
    def missed(self) -> list[Figure]:
        """The figures below their bar."""
        return [figure for figure in self.figures if not figure.holds]


@dataclass(frozen=True)
class Turns:
    """What two things measured in turns came to: the median of each, and of the ratios of each turn."""

    ours: float
    baseline: float
    ratio: float


def in_turns(
    ours: Callable[[], float], baseline: Callable[[], float], repeats: int, *, warm_up: bool = True
) -> Turns:
    """Measures both `repeats` times, the order changing from turn to turn; once more before, uncounted."""
    if warm_up:
        baseline(), ours()
    pairs = []
    for turn in range(repeats):
        if turn % 2:
            theirs, mine = baseline(), ours()
        else:
            mine, theirs = ours(), baseline()
        pairs.append((mine, theirs))
    return Turns(
        ours=statistics.median(mine for mine, _ in pairs),
        baseline=statistics.median(theirs for _, theirs in pairs),
        ratio=statistics.median(mine / theirs for mine, theirs in pairs),
    )


async def rate(work: Awaitable[Sequence[int]]) -> float:
    """Items a second: `work` answers with how many each of its parts made."""
    begun = time.perf_counter()
    done = await work
    return sum(done) / (time.perf_counter() - begun)

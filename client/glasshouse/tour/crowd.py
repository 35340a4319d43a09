"""Eight streams at once, each steered by its own amount: drawn as they grow on a terminal."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from rich.live import Live
from rich.padding import Padding

from glasshouse.client import GenerationResult
from glasshouse.tour.guide import Guide, TourError, expect
from glasshouse.tour.mood import Direction

PROMPT = "One day, a boy named Tom went to the park. In the end,"
COEFFICIENTS = (-4.0, -3.0, -2.0, -1.0, 1.0, 2.0, 3.0, 4.0)
MAX_TOKENS = 24
DRAWS_PER_SECOND = 12


@dataclass
class Row:
    """One of the streams."""

    coefficient: float
    text: str = ""
    result: GenerationResult | None = None
    error: Exception | None = None


def stream_together(guide: Guide, direction: Direction) -> None:
    """All begin at once and run in one batch, each under its own edit."""
    screen = guide.screen
    screen.stage("Eight streams at once, in one batch, each steered by its own amount")
    rows = [Row(coefficient) for coefficient in COEFFICIENTS]

    begun = time.perf_counter()
    threads = [threading.Thread(target=_follow, args=(guide, direction, row)) for row in rows]
    for thread in threads:
        thread.start()
    if screen.live:
        with Live(console=screen.console, refresh_per_second=DRAWS_PER_SECOND) as live:
            while any(thread.is_alive() for thread in threads):
                live.update(_table(guide, rows))
                time.sleep(1 / DRAWS_PER_SECOND)
            live.update(_table(guide, rows))
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - begun
    if not screen.live:
        screen.put(_table(guide, rows))
        screen.gap()
    n_tokens = 0
    for row in rows:
        if row.error is not None:
            raise TourError(f"the stream of {row.coefficient:+g} failed: {row.error}")
        assert row.result is not None
        n_tokens += len(row.result.token_ids)
        expect(len(row.result.receipt) == 1, "one receipt a stream")
    expect(len({row.text for row in rows}) > 1, "streams steered differently to say different things")
    screen.note(f"{n_tokens} tokens in {seconds:.2f} s, {n_tokens / seconds:.0f} tokens/s together.")


def _follow(guide: Guide, direction: Direction, row: Row) -> None:
    try:
        with guide.model.generate(
            PROMPT, max_tokens=MAX_TOKENS, temperature=0.0, interventions=direction.added(row.coefficient)
        ) as stream:
            for token in stream:
                row.text += token.text
            row.result = stream.result()
            row.text = stream.text
    except Exception as error:
        row.error = error


def _table(guide: Guide, rows: list[Row]) -> Padding:
    return guide.screen.made_table(
        ["direction x", "edited positions", PROMPT + " ..."],
        [(f"{row.coefficient:+g}", _applied(row), row.text.strip().replace("\n", " ")) for row in rows],
        right=[0, 1],
    )


def _applied(row: Row) -> str:
    return str(row.result.receipt[0].positions_applied) if row.result and row.result.receipt else ""

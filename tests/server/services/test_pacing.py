"""The pauses of a stream, played on a clock of its own: tokens come at given times, and pauses last as long as they say."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest

from glasshouse.server.services.pacing import Pace, Tempo
from glasshouse.server.types.configuration import StreamSettings

BEGUN_S = 100.0137


def played(
    times_s: Sequence[float], open_streams: int = 32, *, tempo: Tempo | None = None, **settings: float
) -> list[tuple[float, int]]:
    """When messages go out, and with how many tokens, where tokens come at `times_s`."""
    pace = Pace(StreamSettings(**settings), tempo or Tempo(), len(times_s))
    sent, now, messages = 0, 0.0, []
    while sent < len(times_s):
        now = max(now, times_s[sent])
        n_new = sum(time_s <= now for time_s in times_s) - sent
        sent += n_new
        messages.append((now, n_new))
        now += pace.pause_s(n_new, open_streams, now)
    return messages


def steady(n_tokens: int, step_s: float) -> list[float]:
    return [BEGUN_S + index * step_s for index in range(n_tokens)]


@pytest.mark.parametrize("n_tokens", [2, 5, 8, 21, 64, 65, 83, 200])
@pytest.mark.parametrize("step_s", [0.0004, 0.003, 0.011, 0.2])
@pytest.mark.parametrize("open_streams", [1, 8, 32, 500])
def test_the_last_token_goes_out_as_it_comes(n_tokens: int, step_s: float, open_streams: int) -> None:
    times_s = steady(n_tokens, step_s)
    messages = played(times_s, open_streams)
    assert sum(n for _, n in messages) == n_tokens
    assert messages[-1][0] == pytest.approx(times_s[-1], abs=1e-9)


@pytest.mark.parametrize("faster", [1.0, 1.1])
def test_nor_is_it_late_where_tokens_come_faster_towards_the_end(faster: float) -> None:
    times_s = steady(50, 0.003)
    times_s += [times_s[-1] + index * 0.003 / faster for index in range(1, 15)]
    assert played(times_s)[-1][0] == pytest.approx(times_s[-1], abs=1e-9)


def test_busy_streams_send_a_message_a_tick() -> None:
    messages = played(steady(400, 0.003))
    between = [later - now for (now, _), (later, _) in pairwise(messages[3:-5])]
    assert between and between == pytest.approx([0.06] * len(between), abs=1e-6)
    assert len(messages) <= 3 + 400 * 0.003 / 0.06 + 5


def test_streams_that_began_at_different_times_wake_together() -> None:
    ticks = [
        {round(at % 0.06, 6) % 0.06 for at, _ in played([time + shift for time in steady(200, 0.003)])[3:-5]}
        for shift in (0.0, 0.0171)
    ]
    assert ticks[0] == ticks[1] and len(ticks[0]) == 1


def test_few_streams_wait_less() -> None:
    busy, quiet = (len(played(steady(200, 0.003), streams)) for streams in (32, 4))
    assert busy < quiet < 200


@pytest.mark.parametrize("settings", [{"gather_ms_per_stream": 0.0}, {"max_gather_ms": 0.0}])
def test_without_gathering_every_token_goes_out_as_it_comes(settings: dict[str, float]) -> None:
    times_s = steady(50, 0.003)
    assert played(times_s, **settings) == [(time_s, 1) for time_s in times_s]


def test_the_first_token_is_not_held_and_the_second_only_once_the_tempo_is_known() -> None:
    tempo, times_s = Tempo(), steady(64, 0.003)
    first = played(times_s, tempo=tempo)
    assert first[:2] == [(time_s, 1) for time_s in times_s[:2]]
    assert tempo.token_s is not None
    next_one = played(times_s, tempo=tempo)
    assert next_one[0] == (times_s[0], 1) and next_one[1][1] > 1
    assert next_one[-1][0] == pytest.approx(times_s[-1], abs=1e-9)
    assert len(next_one) < len(first)


def test_a_stream_that_is_over_soon_is_not_held_to_a_tick() -> None:
    tempo = Tempo()
    played(steady(64, 0.003), tempo=tempo)
    times_s = steady(3, 0.003)
    assert played(times_s, tempo=tempo)[-1][0] == pytest.approx(times_s[-1], abs=1e-9)

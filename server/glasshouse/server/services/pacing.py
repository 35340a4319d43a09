"""When a stream's next message goes out: seldom where many streams are open, yet its last tokens as they come.

1. A message costs the server a fixed amount of work, so many streams send fewer, fuller ones: at most one a tick. Ticks are
   common to all streams, so that the loop wakes once for all of them.
2. A stream that will end before its next tick waits for most of the time to that end, as foreseen from what its last
   tokens took, then for most of what is left, and so on: no stream ends late because it was waiting.
"""

from __future__ import annotations

from glasshouse.server.types.configuration import StreamSettings

# How much of the time to the end is waited for: the tokens to come may take that much less than those before.
_SHARE = 0.9
# A tick that is no further off, in ticks, is the one that has just come.
_NOW = 0.01


class Tempo:
    """What a token takes: in the stream that was last asked. New streams begin with it. One for all streams of a model."""

    def __init__(self) -> None:
        self.token_s: float | None = None


class Pace:
    """The pauses of one stream of at most `max_tokens` tokens."""

    def __init__(self, settings: StreamSettings, tempo: Tempo, max_tokens: int) -> None:
        self._per_stream_s = settings.gather_ms_per_stream / 1000
        self._most_s = settings.max_gather_ms / 1000
        self._tempo = tempo
        self._left = max_tokens
        self._last: float | None = None

    def pause_s(self, n_new: int, open_streams: int, now: float) -> float:
        """Seconds to wait, 0 for not at all, when `n_new` tokens, at least one, have been sent at `now`."""
        last, self._last = self._last, now
        self._left -= n_new
        tick_s = min(self._per_stream_s * open_streams, self._most_s)
        if tick_s <= 0:
            return 0.0
        if last is None:
            # The time to the first token says nothing of the time that the others take.
            token_s = self._tempo.token_s
            if token_s is None:
                return 0.0
        else:
            # Only so much is certain: one more token may have begun.
            token_s = self._tempo.token_s = (now - last) / (n_new + 1)
        # Nor is it certain that the next token is not almost here.
        most_s = _SHARE * token_s * (self._left - 1)
        to_tick_s = tick_s - now % tick_s
        if to_tick_s < tick_s * _NOW:
            to_tick_s += tick_s
        if most_s >= to_tick_s:
            return to_tick_s
        return most_s if most_s > token_s else 0.0

"""The server's bounds, every one of them a setting (`[limits]` in the configuration file)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request, and all of them together, may take. Over a bound is a precise refusal, never a wait."""

    # One request.
    max_tokens: int = 4096
    max_prompt_tokens: int = 131_072
    max_text_bytes: int = 1 << 20
    max_inputs: int = 4096
    max_input_tokens_total: int = 1 << 20
    max_positions: int = 65_536
    max_hook_points: int = 512
    max_interventions: int = 64
    max_readouts: int = 64
    max_readout_bytes: int = 1 << 30
    max_top_logprobs: int = 100
    max_message_bytes: int = 4 << 20
    # All together.
    max_running: int = 64
    max_queued: int = 256
    # Keys and values of all running generations together, padded to the longest.
    max_cache_bytes: int = 4 << 30
    # Weights of all dictionaries together, as they lie on disk.
    max_dictionary_bytes: int = 64 << 30
    max_concurrent_requests: int = 512
    # Time.
    default_deadline_s: float = 600.0
    max_deadline_s: float = 3600.0
    # A stream whose reader is behind by this many events is ended.
    max_buffered_events: int = 4096
    max_buffered_bytes: int = 64 << 20

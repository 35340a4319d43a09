"""What a generation is asked for besides its prompt: sampling, stops, sizes; protobuf to types."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from glasshouse.server.types.generation import Sampling
from glasshouse.server.types.limits import Limits
from glasshouse.v1 import generation_pb2 as pb

from . import fields

MAX_TEMPERATURE = 100.0
MAX_TOP_K = 2**31 - 1
MAX_TOP_LOGPROBS = 100
MAX_STOPS = 16
MAX_STOP_BYTES = 256
MAX_STOP_TOKENS = 64


def sampling(message: pb.SamplingParameters) -> Sampling:
    """How tokens are chosen. A random seed where none is given."""
    temperature = message.temperature if message.HasField("temperature") else 1.0
    top_p = message.top_p if message.HasField("top_p") else 1.0
    fields.finite(temperature, "sampling.temperature")
    fields.finite(top_p, "sampling.top_p")
    if not 0 <= temperature <= MAX_TEMPERATURE:
        raise fields.out_of_range("sampling.temperature", temperature, f"from 0 to {MAX_TEMPERATURE:g}")
    if not 0 < top_p <= 1:
        raise fields.out_of_range("sampling.top_p", top_p, "above 0 and at most 1")
    top_k = fields.whole(message.top_k, "sampling.top_k", 0, MAX_TOP_K)
    seed = message.seed if message.HasField("seed") else secrets.randbits(63)
    return Sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)


def max_tokens(value: int) -> int:
    """How many tokens to generate; whether the context and the server allow them is for later."""
    if value == 0:
        raise fields.required("max_tokens", "how many tokens to generate", "give max_tokens, at least 1")
    if value < 0:
        raise fields.out_of_range("max_tokens", value, "at least 1")
    return value


def stops(messages: Sequence[str]) -> tuple[str, ...]:
    """The stop strings."""
    if len(messages) > MAX_STOPS:
        raise fields.out_of_range("stop", f"a list of {len(messages)}", f"at most {MAX_STOPS} strings")
    for index, text in enumerate(messages):
        field = f"stop[{index}]"
        if not text:
            raise fields.required(
                field, "an empty string would stop at once", "leave it out, or write the string"
            )
        size = len(text.encode())
        if size > MAX_STOP_BYTES:
            raise fields.out_of_range(field, f"a string of {size} bytes", f"at most {MAX_STOP_BYTES} bytes")
    return tuple(messages)


def stop_tokens(ids: Sequence[int]) -> tuple[int, ...]:
    """The stop tokens; whether the vocabulary has them is for later."""
    if len(ids) > MAX_STOP_TOKENS:
        raise fields.out_of_range(
            "stop_token_ids", f"a list of {len(ids)}", f"at most {MAX_STOP_TOKENS} tokens"
        )
    return tuple(ids)


def top_logprobs(value: int, field: str, limits: Limits) -> int:
    """How many alternatives to report with each token."""
    fields.whole(value, field, 0, MAX_TOP_LOGPROBS)
    fields.count(value, field, limits.max_top_logprobs, "max_top_logprobs", "alternatives")
    return value

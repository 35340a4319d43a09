"""Score's answer is one message: how large it would be is known before anything runs, and what would fit is said.

The input's own part is counted exactly. What alternatives take depends on which tokens they are; each is counted as the
vocabulary's mean token, which is longer than what models find likely. Should they be longer still, the answer is
measured and refused in the same words.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from glasshouse.server.types.errors import ResourceExhausted
from glasshouse.server.types.generation import ScoreResult
from glasshouse.v1 import generation_pb2 as pb
from glasshouse.wire import reasons

from .interventions import receipts
from .readouts import fill_top_tokens
from .tensors import fill
from .token_strings import TokenStrings

# Of a token or an alternative, beside its id and its string: its log-probability, and its string's tag and length.
_LOGPROB_BYTES, _STRING_BYTES = 4, 2
# Of a position with alternatives: the tags and lengths of their fields.
_POSITION_BYTES = 12
# Of an intervention's receipt, at most.
_RECEIPT_BYTES = 512
_OVERHEAD_BYTES = 256
# The least that an entry takes, and how many times that it may take before anybody looks.
_LEAST_BYTES, _TIMES = 7, 8


def may_be_large(n_tokens: int, top_k: int, most: int) -> bool:
    """Whether `check_size` has anything to say; without looking at a string."""
    return n_tokens * (top_k + 1) * _LEAST_BYTES * _TIMES > most


def check_size(
    tokens: Sequence[int], top_k: int, n_edits: int, strings: TokenStrings, vocab_size: int, most: int
) -> None:
    """Refuses a score whose answer would not fit `most` bytes. Raises `ResourceExhausted`."""
    digits = _varint_bytes(vocab_size)
    beside = digits + _LOGPROB_BYTES + _STRING_BYTES
    own = sum(len(string.encode()) + beside for string in strings.of(tokens))
    fixed = own + n_edits * _RECEIPT_BYTES + _OVERHEAD_BYTES + (_POSITION_BYTES * len(tokens) if top_k else 0)
    each = beside + strings.mean_bytes(vocab_size) if top_k else 0.0
    if fixed + len(tokens) * top_k * each > most:
        raise _too_large(len(tokens), top_k, fixed, each, most)


def check_answer(response: pb.ScoreResponse, top_k: int, most: int) -> None:
    """Refuses an answer that turned out larger than a message holds. Raises `ResourceExhausted`."""
    size = response.ByteSize()
    if size > most:
        n_tokens = len(response.token_ids)
        top = sum(positions.ByteSize() for positions in response.top)
        raise _too_large(n_tokens, top_k, size - top, top / max(n_tokens * top_k, 1), most)


def score_message(tokens: Sequence[int], result: ScoreResult, strings: TokenStrings) -> pb.ScoreResponse:
    """The answer."""
    response = pb.ScoreResponse(token_ids=tokens, receipt=receipts(result.receipt), tokens=strings.of(tokens))
    fill(response.logprobs, result.logprobs.astype(np.float32, copy=False))
    if result.top:
        response.top.add()
        for top in result.top:
            fill_top_tokens(response.top.add(), top, strings)
    return response


def _too_large(n_tokens: int, top_k: int, fixed: float, each: float, most: int) -> ResourceExhausted:
    size = round(fixed + n_tokens * top_k * each)
    fits = max(int((most - fixed) / (n_tokens * each)), 0) if top_k else 0
    n_fit = int(n_tokens * most / size)
    if not top_k:
        what, remedy = f"a score of {n_tokens} tokens", f"score at most about {n_fit} tokens at a time"
    else:
        what = f"top_k {top_k} at {n_tokens} positions"
        remedy = f"score at most about {n_fit} tokens at a time"
        if fits:
            remedy = f"ask for a top_k of at most {fits}, or {remedy}"
    return ResourceExhausted(
        f"{what} would take about {size} bytes, a message holds {most}",
        reason=reasons.MESSAGE_TOO_LARGE,
        field="top_k" if top_k else "input",
        value=top_k or n_tokens,
        remedy=remedy,
        metadata={"limit": str(most), "tokens": str(n_tokens), "top_k_that_fits": str(fits)},
    )


def _varint_bytes(number: int) -> int:
    return max(1, -(-number.bit_length() // 7))

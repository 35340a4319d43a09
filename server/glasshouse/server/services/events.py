"""Events of a generation as messages: the hot path. Messages stay near 1 MiB, far under gRPC's 4 MiB.

Tokens are written straight into the message that is sent, never copied from message to message.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from glasshouse.server.types.errors import ResourceExhausted
from glasshouse.server.types.generation import Finished, FinishReason, NewToken
from glasshouse.server.types.readouts import FeatureRows, ProbeScoreRows, PromptReadout, TopTokens
from glasshouse.v1 import generation_pb2 as pb
from glasshouse.v1 import readouts_pb2
from glasshouse.wire import reasons
from glasshouse.wire.tensors import CHUNK_BYTES, chunks

from .conditions import abort_message, flag_messages
from .interventions import receipts
from .readouts import ENTRY_BYTES, SCORE_BYTES, fill_top_tokens, fill_values
from .token_strings import TokenStrings

# An entry of top tokens on the wire, its string included: about this much, and rarely more.
_TOP_ENTRY_WIRE_BYTES = 24
# An entry of features on the wire, and a position's place in the index: no more than this.
_FEATURE_ENTRY_WIRE_BYTES = 9
_INDEX_WIRE_BYTES = 5
# What a message's own fields may take beside tensors.
_OVERHEAD_BYTES = 64 << 10

_REASONS = {
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.STOP_TOKEN: pb.FINISH_REASON_STOP_TOKEN,
    FinishReason.STOP_STRING: pb.FINISH_REASON_STOP_STRING,
    FinishReason.ABORTED: pb.FINISH_REASON_ABORTED,
}


class TokenMessages:
    """Packs the new tokens of one batch into as few messages as their size allows."""

    def __init__(self, strings: TokenStrings, max_message_bytes: int) -> None:
        self._strings = strings
        self._max_bytes = max_message_bytes - _OVERHEAD_BYTES

    def pack(self, tokens: Sequence[NewToken]) -> Iterator[tuple[pb.GenerateResponse, int, int]]:
        """Messages, each with its number of tokens and its bytes of readouts."""
        response = pb.GenerateResponse()
        add = response.tokens.tokens.add
        n_tokens = n_bytes = 0
        for token in tokens:
            message = add(
                position=token.position, token_id=token.token_id, text=token.text, logprob=token.logprob
            )
            n_tokens += 1
            size = 0
            if token.readouts:
                size = fill_values(message, token.readouts, self._strings)
                if size > self._max_bytes:
                    raise self._too_large(size)
                n_bytes += size
            if token.top_logprobs is not None:
                fill_top_tokens(message.top_logprobs, token.top_logprobs, self._strings)
                size += len(token.top_logprobs.token_ids) * _TOP_ENTRY_WIRE_BYTES
            if n_bytes and n_bytes + size > CHUNK_BYTES:
                yield response, n_tokens, n_bytes
                response = pb.GenerateResponse()
                add = response.tokens.tokens.add
                n_tokens = n_bytes = 0
        if n_tokens:
            yield response, n_tokens, n_bytes

    def _too_large(self, size: int) -> ResourceExhausted:
        return ResourceExhausted(
            f"the readouts of one token take {size} bytes, a message holds {self._max_bytes}",
            reason=reasons.MESSAGE_TOO_LARGE,
            field="readouts",
            value=size,
            remedy="ask for fewer readouts, a 16-bit dtype, or read the sequence with ExtractActivations",
            metadata={"limit": str(self._max_bytes)},
        )


def prompt_messages(
    prompt: Sequence[int], readouts: Sequence[PromptReadout], strings: TokenStrings
) -> Iterator[tuple[pb.GenerateResponse, int]]:
    """The prompt's events, each with its bytes of readouts: the first has the ids, others more readouts."""
    response = pb.GenerateResponse()
    response.prompt.token_ids.extend(prompt)
    held = 0
    n_bytes = 0
    for piece, wire_bytes, value_bytes in _pieces(readouts, strings):
        if held and held + wire_bytes > CHUNK_BYTES:
            yield response, n_bytes
            response = pb.GenerateResponse()
            held = n_bytes = 0
        response.prompt.readouts.append(piece)
        held += wire_bytes
        n_bytes += value_bytes
    yield response, n_bytes


def finished_message(event: Finished, seed: int) -> pb.GenerateResponse:
    """The last event."""
    usage = event.usage
    return pb.GenerateResponse(
        finished=pb.FinishedEvent(
            finish_reason=_REASONS[event.reason],
            stop_string=event.stop_string,
            trailing_text=event.trailing_text,
            usage=pb.Usage(
                prompt_tokens=usage.prompt_tokens,
                generated_tokens=usage.generated_tokens,
                queue_seconds=usage.queue_s,
                time_to_first_token_seconds=usage.time_to_first_token_s,
                total_seconds=usage.total_s,
            ),
            receipt=receipts(event.receipt),
            seed=seed,
            abort=None if event.abort is None else abort_message(event.abort),
            flags=flag_messages(event.flags),
        )
    )


def _pieces(
    readouts: Sequence[PromptReadout], strings: TokenStrings
) -> Iterator[tuple[readouts_pb2.PromptReadout, int, int]]:
    """Every readout in pieces of about 1 MiB, each with its size on the wire and the bytes of its values."""
    for readout in readouts:
        if isinstance(readout.values, tuple):
            yield from _lens_pieces(readout, readout.values, strings)
            continue
        if isinstance(readout.values, FeatureRows):
            yield from _feature_pieces(readout, readout.values)
            continue
        if isinstance(readout.values, ProbeScoreRows):
            yield from _probe_pieces(readout, readout.values)
            continue
        positions: Sequence[int] = readout.positions
        for chunk in chunks(readout.values):
            piece = readouts_pb2.PromptReadout(
                readout=readout.readout, positions=positions, activations=chunk
            )
            size = len(chunk.data)
            yield piece, size + 4 * len(positions), size
            positions = ()


def _lens_pieces(
    readout: PromptReadout, values: tuple[TopTokens, ...], strings: TokenStrings
) -> Iterator[tuple[readouts_pb2.PromptReadout, int, int]]:
    piece = readouts_pb2.PromptReadout(readout=readout.readout, positions=readout.positions)
    piece.logit_lens.SetInParent()
    n_entries = 0
    for top in values:
        if n_entries * _TOP_ENTRY_WIRE_BYTES > CHUNK_BYTES:
            yield piece, n_entries * _TOP_ENTRY_WIRE_BYTES, n_entries * ENTRY_BYTES
            piece = readouts_pb2.PromptReadout(readout=readout.readout)
            n_entries = 0
        fill_top_tokens(piece.logit_lens.positions.add(), top, strings)
        n_entries += len(top.token_ids)
    yield piece, n_entries * _TOP_ENTRY_WIRE_BYTES, n_entries * ENTRY_BYTES


def _feature_pieces(
    readout: PromptReadout, rows: FeatureRows
) -> Iterator[tuple[readouts_pb2.PromptReadout, int, int]]:
    """Runs of positions, each with an index of its own that starts at 0."""
    n_positions = len(readout.positions)
    positions: Sequence[int] = readout.positions
    # Bytes on the wire up to each position.
    sizes = rows.indptr * _FEATURE_ENTRY_WIRE_BYTES + np.arange(n_positions + 1) * _INDEX_WIRE_BYTES
    start = 0
    while True:
        stop = int(np.searchsorted(sizes, sizes[start] + CHUNK_BYTES, side="right")) - 1
        stop = min(max(stop, start + 1), n_positions)
        low, high = int(rows.indptr[start]), int(rows.indptr[stop])
        piece = readouts_pb2.PromptReadout(readout=readout.readout, positions=positions)
        piece.features.indptr.extend((rows.indptr[start : stop + 1] - low).tolist())
        piece.features.feature_ids.extend(rows.ids[low:high].tolist())
        piece.features.activations.extend(rows.activations[low:high].tolist())
        yield piece, int(sizes[stop] - sizes[start]) + 4 * len(positions), ENTRY_BYTES * (high - low)
        positions = ()
        start = stop
        if start >= n_positions:
            return


def _probe_pieces(
    readout: PromptReadout, rows: ProbeScoreRows
) -> Iterator[tuple[readouts_pb2.PromptReadout, int, int]]:
    """Runs of positions; the first names the columns."""
    n_positions, n_columns = rows.scores.shape
    positions: Sequence[int] = readout.positions
    labels, probe = rows.labels, rows.probe
    at_a_time = max(1, CHUNK_BYTES // (SCORE_BYTES * n_columns))
    for start in range(0, max(n_positions, 1), at_a_time):
        piece = readouts_pb2.PromptReadout(readout=readout.readout, positions=positions)
        scores = rows.scores[start : start + at_a_time]
        piece.probe.labels.extend(labels)
        piece.probe.probe = probe
        piece.probe.scores.extend(scores.reshape(-1).tolist())
        size = SCORE_BYTES * scores.size
        yield piece, size + 4 * len(positions), size
        positions, labels, probe = (), (), ""

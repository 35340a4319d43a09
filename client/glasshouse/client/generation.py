"""A generation as its events come, without transport: what both streams feed and both show.

1. The first event carries the prompt; further prompt events only complete its readouts.
2. Tokens wait in `pending` until the stream's user takes them.
3. `finished` closes it. A stream that ends without it broke off.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence, Sized

import numpy as np

from glasshouse.client import parsers
from glasshouse.client.arrays import Array
from glasshouse.client.exceptions import GlasshouseError
from glasshouse.client.features import FeatureActivations, FeatureRows, rows_of
from glasshouse.client.probe_readings import ProbeReadings
from glasshouse.client.readouts import Readout
from glasshouse.client.results import (
    Abort,
    GeneratedToken,
    GenerationResult,
    InterventionReceipt,
    LensReadout,
    MonitorFlag,
    PromptReadouts,
    TopTokens,
    Usage,
)
from glasshouse.v1.generation_pb2 import FinishedEvent, GenerateResponse, PromptEvent
from glasshouse.v1.readouts_pb2 import PromptReadout
from glasshouse.wire.tensors import TensorAssembler


class GenerationState:
    """Everything known of one generation so far."""

    def __init__(self, readouts: Sequence[Readout] = ()) -> None:
        self.names = [readout.name for readout in readouts]
        self.pending: deque[GeneratedToken] = deque()
        self.prompt: list[int] | None = None
        self.token_ids: list[int] = []
        self.finished: FinishedEvent | None = None
        self._texts: list[str] = []
        self._prompt_readouts = _PromptReadoutAssembler(self.names)
        self._prompt_over = False

    def feed(self, event: GenerateResponse) -> None:
        """Takes in one event. Raises GlasshouseError where the events do not follow the protocol."""
        if event.HasField("tokens"):
            self._open("tokens")
            self._prompt_over = True
            for message in event.tokens.tokens:
                token = parsers.generated_token(message, self.names, self._prompt_readouts.labels)
                self.token_ids.append(token.token_id)
                if token.text:
                    self._texts.append(token.text)
                self.pending.append(token)
        elif event.HasField("prompt"):
            self._feed_prompt(event.prompt)
        elif event.HasField("finished"):
            self._open("finished")
            self._prompt_over = True
            self.finished = event.finished
            if event.finished.trailing_text:
                self._texts.append(event.finished.trailing_text)

    def end(self) -> None:
        """The stream is over. Raises GlasshouseError where it broke off."""
        if self.finished is None:
            raise GlasshouseError("the stream ended without its last event", code="DATA_LOSS")

    @property
    def prompt_complete(self) -> bool:
        """Whether the prompt and all its readouts are here."""
        return self.prompt is not None and (self._prompt_over or self._prompt_readouts.complete)

    @property
    def text(self) -> str:
        """The text so far."""
        if len(self._texts) > 1:
            self._texts = ["".join(self._texts)]
        return self._texts[0] if self._texts else ""

    def prompt_readouts(self) -> PromptReadouts:
        """What the readouts saw over the prompt; once `prompt_complete`."""
        return self._prompt_readouts.result()

    def result(self, tokens: list[GeneratedToken]) -> GenerationResult:
        """The finished generation."""
        assert self.finished is not None and self.prompt is not None
        return GenerationResult(
            text=self.text,
            token_ids=self.token_ids,
            tokens=tokens,
            finish_reason=parsers.FINISH_REASONS.get(self.finished.finish_reason, "unknown"),
            stop_string=self.finished.stop_string,
            usage=parsers.usage(self.finished.usage),
            receipt=parsers.receipt(self.finished.receipt),
            seed=self.finished.seed,
            prompt=self.prompt,
            prompt_readouts=self.prompt_readouts(),
            abort=parsers.abort(self.finished),
            flags=parsers.flags(self.finished.flags),
        )

    def _open(self, event: str) -> None:
        if self.prompt is None or self.finished is not None:
            where = "before the prompt's" if self.prompt is None else "after the last"
            raise GlasshouseError(f"the server sent a {event} event {where} event", code="INTERNAL")

    def _feed_prompt(self, event: PromptEvent) -> None:
        if self.prompt is None:
            self.prompt = list(event.token_ids)
        elif self._prompt_over:
            raise GlasshouseError("the server sent a prompt event after the first token", code="INTERNAL")
        for piece in event.readouts:
            self._prompt_readouts.feed(piece)


class GenerationView:
    """What a stream shows of its generation: shared by the sync and the async stream, and no transport in it.

    After the end: `finish_reason` ("length", "stop_token", "stop_string", "aborted"), `stop_string`, `abort`, `flags`,
    `usage`, `receipt` and `seed`. Before it they are None, or empty.
    """

    def __init__(self, state: GenerationState) -> None:
        self._state = state

    @property
    def text(self) -> str:
        """The text received so far."""
        return self._state.text

    @property
    def token_ids(self) -> list[int]:
        """The new tokens' ids received so far."""
        return list(self._state.token_ids)

    @property
    def finished(self) -> bool:
        """Whether the last event has come."""
        return self._state.finished is not None

    @property
    def finish_reason(self) -> str | None:
        """Why it ended."""
        end = self._state.finished
        return None if end is None else parsers.FINISH_REASONS.get(end.finish_reason, "unknown")

    @property
    def stop_string(self) -> str:
        """The stop string that was found."""
        end = self._state.finished
        return "" if end is None else end.stop_string

    @property
    def abort(self) -> Abort | None:
        """What ended it before its time."""
        end = self._state.finished
        return None if end is None else parsers.abort(end)

    @property
    def flags(self) -> list[MonitorFlag]:
        """The monitors that passed their threshold."""
        end = self._state.finished
        return [] if end is None else parsers.flags(end.flags)

    @property
    def usage(self) -> Usage | None:
        """What it took."""
        end = self._state.finished
        return None if end is None else parsers.usage(end.usage)

    @property
    def receipt(self) -> list[InterventionReceipt]:
        """What was done, one entry an intervention."""
        end = self._state.finished
        return [] if end is None else parsers.receipt(end.receipt)

    @property
    def seed(self) -> int | None:
        """The seed that was used."""
        end = self._state.finished
        return None if end is None else end.seed


class _PromptReadoutAssembler:
    """Puts the pieces of the prompt's readouts together; readouts of one name merge by position."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._positions: dict[int, list[int]] = {}
        self._tensors: dict[int, TensorAssembler] = {}
        self._lenses: dict[int, list[TopTokens]] = {}
        self._features: dict[int, list[FeatureActivations]] = {}
        self._scores: dict[int, list[float]] = {}
        self._probes: dict[int, str] = {}
        # The columns of each readout of a probe.
        self.labels: dict[int, tuple[str, ...]] = {}
        self._result: PromptReadouts | None = None

    @property
    def complete(self) -> bool:
        """Whether every readout of the request is here, whole."""
        rows: dict[int, Sized] = {**self._lenses, **self._features}
        n_here = sum(tensor.complete for tensor in self._tensors.values()) + sum(
            len(here) == len(self._positions[readout]) for readout, here in rows.items()
        )
        n_here += sum(
            len(here) == len(self._positions[readout]) * len(self.labels[readout])
            for readout, here in self._scores.items()
        )
        return n_here == len(self._names)

    def feed(self, piece: PromptReadout) -> None:
        """Takes in one piece."""
        readout = piece.readout
        if not 0 <= readout < len(self._names):
            raise GlasshouseError(
                f"the server sent readout {readout}, which was not asked for", code="INTERNAL"
            )
        positions = self._positions.setdefault(readout, [])
        positions.extend(piece.positions)
        if piece.HasField("activations"):
            self._tensors.setdefault(readout, TensorAssembler()).add(piece.activations)
        elif piece.HasField("logit_lens"):
            top = [parsers.top_tokens(entry) for entry in piece.logit_lens.positions]
            self._lenses.setdefault(readout, []).extend(top)
        elif piece.HasField("features"):
            self._features.setdefault(readout, []).extend(parsers.feature_rows(piece.features))
        elif piece.HasField("probe"):
            if readout not in self.labels:
                self.labels[readout] = tuple(piece.probe.labels)
                self._probes[readout] = piece.probe.probe
            self._scores.setdefault(readout, []).extend(piece.probe.scores)

    def result(self) -> PromptReadouts:
        """All of it, by name."""
        if self._result is None:
            arrays: dict[str, Array] = {}
            positions: dict[str, list[int]] = {}
            lenses: dict[str, LensReadout] = {}
            for readout, tensor in sorted(self._tensors.items()):
                name, here, array = self._names[readout], self._positions[readout], tensor.result()
                if name in arrays:
                    here, array = _merged(positions[name], arrays[name], here, array)
                positions[name], arrays[name] = here, array
            for readout, top in sorted(self._lenses.items()):
                name = self._names[readout]
                by_position = dict(zip(self._positions[readout], top, strict=True))
                if name in lenses:
                    by_position |= dict(zip(lenses[name].positions, lenses[name].top, strict=True))
                lenses[name] = LensReadout(sorted(by_position), [by_position[p] for p in sorted(by_position)])
            features: dict[str, FeatureRows] = {}
            for readout, seen in sorted(self._features.items()):
                name = self._names[readout]
                rows = rows_of(dict(zip(self._positions[readout], seen, strict=True)))
                features[name] = features[name].joined(rows) if name in features else rows
            self._result = PromptReadouts(arrays, positions, lenses, features, self._readings())
        return self._result

    def _readings(self) -> dict[str, ProbeReadings]:
        found: dict[str, ProbeReadings] = {}
        for readout, scores in sorted(self._scores.items()):
            name, labels = self._names[readout], self.labels[readout]
            rows = np.array(scores, dtype=np.float32).reshape(-1, len(labels))
            here = ProbeReadings(self._probes[readout], labels, self._positions[readout], rows)
            found[name] = found[name].joined(here) if name in found else here
        return found


def _merged(
    positions: list[int], array: Array, more_positions: list[int], more: Array
) -> tuple[list[int], Array]:
    """Two readouts of one hook point as one, ascending: (n_pos, width) or (n_heads, n_pos, n_prompt)."""
    merged, first = np.unique(np.array(positions + more_positions, dtype=np.int64), return_index=True)
    axis = array.ndim - 2
    return merged.tolist(), np.take(np.concatenate([array, more], axis=axis), first, axis=axis)

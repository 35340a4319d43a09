"""Forward-only work: extraction and scoring. Inputs of one request are fed in padded passes, longest first.

A request's inputs are only computed while its reader keeps up: results not yet read are bounded by bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch

from glasshouse.server.engines.preparation import receipt
from glasshouse.server.readouts.collect import PromptCollector
from glasshouse.server.types.generation import ExtractedInput, ScoreResult
from glasshouse.server.types.readouts import TopTokens

from .feed import FedPass, Model, Prompt, PromptFeed
from .passes import UNEMBED, logits_at
from .stream import EventStream

# Logits are made for at most this many elements (cells x vocabulary) at a time.
_LOGIT_ELEMENTS = 1 << 25

R = TypeVar("R")


@dataclass(frozen=True, eq=False, kw_only=True)
class BulkInput:
    """One input of a forward-only request."""

    index: int
    prompt: Prompt


class Scorer:
    """Log-probabilities of one sequence, gathered pass by pass."""

    def __init__(self, tokens: Sequence[int], top_k: int) -> None:
        self._tokens, self._top_k = tokens, top_k
        self.logprobs = np.full(len(tokens), math.nan, dtype=np.float32)
        self.top: list[TopTokens] = []

    def look(self, model: Model, fed: FedPass, row: int) -> None:
        """Scores the tokens that the cells of this pass predict."""
        span = fed.spans[row]
        last = min(span.stop, len(self._tokens) - 1)
        cells = [(row, position - span.start) for position in range(span.start, last)]
        chunk = max(1, _LOGIT_ELEMENTS // model.loaded.vocab_size)
        if UNEMBED in fed.planned.edits.actions:
            # Edited logits are made in one piece, the last position's included, so that each edit runs once at each.
            cells = [(row, column) for column in range(len(span.token_ids))]
            chunk = len(cells)
        for begin in range(0, len(cells), chunk):
            piece = cells[begin : begin + chunk]
            logprobs = torch.log_softmax(logits_at(model.loaded, fed.planned, fed.hidden_BTD, piece), dim=-1)
            positions = [span.start + column + 1 for _, column in piece]
            if positions[-1] == len(self._tokens):
                positions.pop()
                logprobs = logprobs[:-1]
            targets = torch.tensor([self._tokens[p] for p in positions], device=logprobs.device)
            chosen = logprobs.gather(-1, targets[:, None])[:, 0]
            self.logprobs[positions] = chosen.cpu().numpy()
            if self._top_k:
                values, ids = logprobs.topk(self._top_k, dim=-1)
                host_ids, host_values = ids.to(torch.int32).cpu().numpy(), values.cpu().numpy()
                self.top.extend(TopTokens(i, v) for i, v in zip(host_ids, host_values, strict=True))


class BulkJob(Generic[R]):
    """A forward-only request in progress."""

    def __init__(self, model: Model, inputs: Sequence[BulkInput], stream: EventStream[R]) -> None:
        self._model = model
        # Longest first: rows of a pass are alike in length, and the largest pass comes first.
        self._waiting = sorted(inputs, key=lambda item: len(item.prompt.tokens))
        self.stream = stream
        self._feed: PromptFeed | None = None
        self._fed_inputs: list[BulkInput] = []

    def ready(self, max_backlog_bytes: int) -> bool:
        """Whether its reader has kept up."""
        return self.stream.backlog_bytes <= max_backlog_bytes

    def step(self, budget_tokens: int, piece_tokens: int) -> None:
        """Runs one pass of at most about `budget_tokens` (padded)."""
        if self._feed is None:
            self._fed_inputs = self._next_inputs(min(budget_tokens, piece_tokens))
            self._feed = PromptFeed(
                self._model,
                [item.prompt for item in self._fed_inputs],
                keep=False,
                piece_tokens=piece_tokens,
            )
        self._feed.advance(lambda fed: self.look(fed, self._fed_inputs))
        if self._feed.done:
            for item, collector in zip(self._fed_inputs, self._feed.collectors, strict=True):
                self.emit(item, collector)
            self._feed = None
            if not self._waiting:
                self.stream.end()

    def _next_inputs(self, budget_tokens: int) -> list[BulkInput]:
        taken = [self._waiting.pop()]
        width = len(taken[0].prompt.tokens)
        while self._waiting and (len(taken) + 1) * width <= budget_tokens:
            taken.append(self._waiting.pop())
        return taken

    def look(self, fed: FedPass, inputs: Sequence[BulkInput]) -> None:
        """Sees the hidden states of each pass. Overridden where they are needed."""
        if fed.planned.logit_cells():
            logits_at(self._model.loaded, fed.planned, fed.hidden_BTD, [])

    def emit(self, item: BulkInput, collector: PromptCollector) -> None:
        """Puts the result of a finished input."""
        raise AssertionError("a kind of forward-only work says what it emits")


class ExtractionJob(BulkJob[ExtractedInput]):
    """Activations of many inputs."""

    def emit(self, item: BulkInput, collector: PromptCollector) -> None:
        """Puts an `ExtractedInput`."""
        readouts = collector.finish()
        activations = tuple(readout.values for readout in readouts if isinstance(readout.values, np.ndarray))
        positions = readouts[0].positions if readouts else ()
        self.stream.put(
            ExtractedInput(
                index=item.index,
                positions=positions,
                activations=activations,
                receipt=receipt(item.prompt.edits),
            ),
            sum(array.nbytes for array in activations),
        )


class ScoreJob(BulkJob[ScoreResult]):
    """Teacher-forced log-probabilities of one input."""

    def __init__(self, model: Model, item: BulkInput, top_k: int, stream: EventStream[ScoreResult]) -> None:
        super().__init__(model, [item], stream)
        self._scorer = Scorer(item.prompt.tokens, top_k)

    def look(self, fed: FedPass, inputs: Sequence[BulkInput]) -> None:
        """Scores the pass."""
        self._scorer.look(self._model, fed, 0)

    def emit(self, item: BulkInput, collector: PromptCollector) -> None:
        """Puts the `ScoreResult`."""
        self.stream.put(
            ScoreResult(
                logprobs=self._scorer.logprobs,
                top=tuple(self._scorer.top),
                receipt=receipt(item.prompt.edits),
            )
        )


AnyJob = ExtractionJob | ScoreJob

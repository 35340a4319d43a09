"""The rows that decode together: one token each a step, joining and leaving between steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glasshouse.server.engines.watching import watched_pass
from glasshouse.server.readouts.collect import collect_step
from glasshouse.server.types.readouts import ReadoutValue, TopTokens
from glasshouse.server.types.spans import Span

from .cache import BatchCache, PromptCache
from .feed import Model
from .passes import PlannedPass, logits_at, run
from .row import GenerationRow
from .sampler import choose


@dataclass(frozen=True, eq=False, kw_only=True)
class Chosen:
    """The next token of each row, with its log-probability (NaN where the row's logits are not finite)."""

    tokens_B: Tensor
    tokens: list[int]
    logprobs: list[float]
    tops: list[TopTokens | None]

    def of(self, row: int) -> tuple[int, float, TopTokens | None]:
        """Token id, log-probability and alternatives of one row."""
        return self.tokens[row], self.logprobs[row], self.tops[row]


def next_tokens(rows: Sequence[GenerationRow], logits_BV: Tensor) -> Chosen:
    """Chooses each row's next token from its logits (float32)."""
    normaliser_B = logits_BV.logsumexp(dim=-1)
    finite_B = normaliser_B.isfinite()
    if not bool(finite_B.all()):
        # Edits can drive a row to infinity. Its log-probability then says so; its neighbours go on.
        logits_BV = torch.where(finite_B[:, None], logits_BV, 0.0)
    tokens_B = choose(logits_BV, [row.sampler for row in rows])
    logprobs_B = logits_BV.gather(-1, tokens_B[:, None])[:, 0] - normaliser_B
    tops: list[TopTokens | None] = [None] * len(rows)
    most = max(row.request.top_logprobs for row in rows)
    if most:
        values, ids = (logits_BV - normaliser_B[:, None]).topk(most, dim=-1)
        host_ids, host_values = ids.to(torch.int32).cpu().numpy(), values.cpu().numpy()
        for index, row in enumerate(rows):
            wanted = row.request.top_logprobs
            if wanted:
                tops[index] = TopTokens(host_ids[index, :wanted], host_values[index, :wanted])
    return Chosen(tokens_B=tokens_B, tokens=tokens_B.tolist(), logprobs=logprobs_B.tolist(), tops=tops)


class DecodingBatch:
    """Rows in the order of their cache rows."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.rows: list[GenerationRow] = []
        self._cache = BatchCache(model.cache_shape)
        self._next_ids_B = torch.zeros(0, dtype=torch.long, device=model.loaded.device)
        self._planned: PlannedPass | None = None
        self._steps_left: int | None = None

    def join(self, row: GenerationRow, prompts: PromptCache, prompt_row: int) -> None:
        """Takes in a row whose prompt has been fed and whose first token is chosen."""
        self._cache.join(prompts.keys, prompts.values, prompt_row, row.n_prompt)
        self.rows.append(row)
        self._changed()

    def drop(self, gone: Sequence[GenerationRow]) -> None:
        """Lets rows go."""
        if not gone:
            return
        places = [index for index, row in enumerate(self.rows) if row in gone]
        for source, target in self._cache.leave(places):
            self.rows[target] = self.rows[source]
        del self.rows[self._cache.n_rows :]
        if not self.rows:
            self._cache.shrink()
        self._changed()

    def _changed(self) -> None:
        self._next_ids_B = torch.tensor(
            [row.last_token for row in self.rows], dtype=torch.long, device=self._model.loaded.device
        )
        self._forget_plan()

    def _forget_plan(self) -> None:
        if self._planned is not None:
            self._planned.close()
            self._planned = None

    def _plan(self) -> PlannedPass:
        """The plan of the last step where it still holds, else a new one."""
        if self._planned is not None:
            if self._steps_left is None or self._steps_left > 0:
                if self._steps_left is not None:
                    self._steps_left -= 1
                self._planned.captures.advance()
                return self._planned
            self._forget_plan()
        spans = [
            Span(length, (row.last_token,))
            for row, length in zip(self.rows, self._cache.lengths, strict=True)
        ]
        self._planned = PlannedPass(
            self._model.table,
            spans,
            [row.edits for row in self.rows],
            [row.readouts for row in self.rows],
            n_columns=1,
            watched=watched_pass([row.watch for row in self.rows], one_token=True),
        )
        self._steps_left = self._planned.valid_steps
        return self._planned

    def step(self) -> None:
        """Feeds each row's last token and chooses its next; rows that end are dropped."""
        self._cache.begin_step()
        planned = self._plan()
        loaded = self._model.loaded
        hidden_B1D = run(loaded, planned, self._next_ids_B[:, None], self._cache.positions_B1, self._cache)
        logits_BV = logits_at(loaded, planned, hidden_B1D, [(row, 0) for row in range(len(self.rows))])
        self._cache.end_step()
        if planned.watched is not None:
            positions = [length - 1 for length in self._cache.lengths]
            if planned.watched.conclude_step(positions, [row.last_token for row in self.rows]):
                self._steps_left = 0
        chosen = next_tokens(self.rows, logits_BV)
        self._next_ids_B = chosen.tokens_B
        read: Mapping[int, Mapping[int, ReadoutValue]] = {}
        if planned.captures.sites:
            read = collect_step(planned.captures, self._model.lens, self._cache.lengths)
            planned.captures.release()
        nothing: Mapping[int, ReadoutValue] = {}
        gone = [
            row
            for index, row in enumerate(self.rows)
            if not row.push(*chosen.of(index), read.get(index, nothing))
        ]
        self.drop(gone)

    def fail(self, error: BaseException) -> None:
        """Ends every row with `error`."""
        for row in self.rows:
            row.stream.fail(error)
        self.drop(list(self.rows))

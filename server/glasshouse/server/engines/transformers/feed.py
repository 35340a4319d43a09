"""Prompts fed to the model: several whole ones in a padded pass, or one long one in pieces.

Generation and forward-only work share this: both feed tokens under edits, collect what is read, and look at the hidden
states of each pass (to sample, or to score).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glasshouse.server.engines.watching import RequestWatch, watched_pass
from glasshouse.server.hooks.table import HookTable
from glasshouse.server.interventions.edits import PreparedIntervention
from glasshouse.server.models.loaded import LoadedModel
from glasshouse.server.readouts.collect import PromptCollector, Together
from glasshouse.server.readouts.prepared import PreparedReadout
from glasshouse.server.types.spans import Span

from .cache import CacheShape, PromptCache
from .passes import PlannedPass, run


@dataclass(frozen=True, eq=False, kw_only=True)
class Prompt:
    """One prompt to feed, and what is done and read on the way."""

    tokens: Sequence[int]
    edits: Sequence[PreparedIntervention]
    readouts: Sequence[PreparedReadout]
    watch: RequestWatch | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class FedPass:
    """One pass that was fed: row b holds `spans[b]`; `hidden_BTD` is after the final norm, padded on the right."""

    planned: PlannedPass
    spans: Sequence[Span]
    hidden_BTD: Tensor


class Model:
    """A loaded model with its hook table: what every pass needs."""

    def __init__(self, loaded: LoadedModel, table: HookTable) -> None:
        self.loaded, self.table = loaded, table
        self.cache_shape = CacheShape(n_layers=loaded.n_layers, device=loaded.device)

    def lens(self, resid_ND: Tensor) -> Tensor:
        """The residual stream (N, d_model) as soft-capped logits (N, vocab)."""
        family, module = self.loaded.family, self.loaded.model
        return family.unembed(module, family.final_norm(module, resid_ND.to(self.loaded.dtype)))[1]


class PromptFeed:
    """Feeds `prompts` until `done`. With `keep` their keys and values are in `cache` afterwards."""

    def __init__(self, model: Model, prompts: Sequence[Prompt], *, keep: bool, piece_tokens: int) -> None:
        self._model = model
        self._prompts = prompts
        self._piece_tokens = piece_tokens
        self._fed = 0
        self._longest = max(len(prompt.tokens) for prompt in prompts)
        assert len(prompts) == 1 or self._longest <= piece_tokens, "only a lone prompt is fed in pieces"
        one_pass = self._longest <= piece_tokens
        self.cache = PromptCache(model.cache_shape) if keep or not one_pass else None
        self.collectors = [
            PromptCollector(readouts=prompt.readouts, n_prompt=len(prompt.tokens)) for prompt in prompts
        ]

    @property
    def done(self) -> bool:
        """Whether every prompt has been fed to its end."""
        return self._fed >= self._longest

    def advance(self, look: Callable[[FedPass], None]) -> None:
        """Runs the next pass and shows it to `look` before its captures are collected."""
        loaded = self._model.loaded
        stop = min(self._fed + self._piece_tokens, self._longest)
        spans = [Span(self._fed, prompt.tokens[self._fed : stop]) for prompt in self._prompts]
        width = stop - self._fed
        ids = torch.zeros((len(spans), width), dtype=torch.long)
        for row, span in enumerate(spans):
            ids[row, : len(span.token_ids)] = torch.tensor(span.token_ids, dtype=torch.long)
        positions = torch.arange(self._fed, stop, device=loaded.device).expand(len(spans), width)
        if self.cache is not None:
            self.cache.begin_pass(width)
        planned = PlannedPass(
            self._model.table,
            spans,
            [prompt.edits for prompt in self._prompts],
            [prompt.readouts for prompt in self._prompts],
            n_columns=width,
            watched=watched_pass([prompt.watch for prompt in self._prompts]),
        )
        try:
            hidden = run(loaded, planned, ids.to(loaded.device), positions, self.cache)
            if planned.watched is not None:
                planned.watched.conclude_prompts(spans)
            look(FedPass(planned=planned, spans=spans, hidden_BTD=hidden))
            together = Together.of(planned.captures)
            for row, collector in enumerate(self.collectors):
                collector.add(planned.captures, row, spans[row].stop, self._model.lens, together)
        finally:
            planned.close()
        self._fed = stop

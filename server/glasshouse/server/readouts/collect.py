"""Captures made into what a caller receives: host arrays and top tokens, per row of the pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from glasshouse.server.types.readouts import (
    Array,
    FeatureRows,
    ProbeScoreRows,
    ProbeScores,
    PromptReadout,
    ReadoutValue,
    TopTokens,
)

from .capture import CapturePlan, to_host
from .features import FeatureTable, concatenate, encode_captures, encode_step
from .lens import top_tokens
from .prepared import PreparedReadout
from .probes import StepScoring, no_rows, score_captures

# Feature rows of no position: indptr, ids, activations.
NO_ROWS = (np.zeros(1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32))

# The residual stream (N, d_model) as logits (N, vocab).
Lens = Callable[[Tensor], Tensor]


def collect_step(plan: CapturePlan, lens: Lens, stops: Sequence[int]) -> dict[int, dict[int, ReadoutValue]]:
    """Values of a pass of one token a row: row -> readout index -> value. `stops[row]`: keys the row attends to."""
    found: dict[int, dict[int, ReadoutValue]] = {}
    for site in plan.sites.values():
        hosts: dict[str, Array] = {}
        for share in () if site.point.kind == "attention" else site.plain:
            readout = share.readout
            host = hosts.get(readout.dtype)
            if host is None:
                assert site.tensor is not None
                host = hosts[readout.dtype] = to_host(site.tensor, readout.dtype)
            value = host[share.row, 0] if site.rows_N is None else host[share.offset]
            found.setdefault(share.row, {})[readout.index] = value
        if site.point.kind == "attention":
            for share in site.shares:
                maps = site.values(share)[:, 0, : stops[share.row]]
                found.setdefault(share.row, {})[share.readout.index] = to_host(maps, share.readout.dtype)
        for top_k, shares in site.lenses.items():
            rows = torch.cat([site.values(share) for share in shares])
            for share, tokens in zip(shares, top_tokens(lens(rows), top_k), strict=True):
                found.setdefault(share.row, {})[share.readout.index] = tokens
    if plan.reads_features:
        for row, index, features in encode_step(plan):
            found.setdefault(row, {})[index] = features
    if plan.scoring is None:
        plan.scoring = StepScoring(plan)
    plan.scoring.score(found)
    return found


@dataclass(frozen=True, eq=False)
class Together:
    """What a pass over prompts computes for all its rows at once, by (row of the batch, readout index)."""

    features: Mapping[tuple[int, int], FeatureTable]
    scores: Mapping[tuple[int, int], Array]

    @classmethod
    def of(cls, plan: CapturePlan) -> Together:
        """Of a pass that has run. Once a pass: running pools go on from here."""
        return cls(encode_captures(plan), score_captures(plan))


@dataclass(eq=False, kw_only=True)
class PromptCollector:
    """Readouts of one prompt, which may be fed in several passes. `n_prompt` tokens in all."""

    readouts: Sequence[PreparedReadout]
    n_prompt: int
    _positions: dict[int, list[int]] = field(default_factory=dict)
    _pieces: dict[int, list[Array]] = field(default_factory=dict)
    _tokens: dict[int, list[TopTokens]] = field(default_factory=dict)
    _features: dict[int, list[FeatureTable]] = field(default_factory=dict)
    _scores: dict[int, list[Array]] = field(default_factory=dict)

    def finish(self) -> tuple[PromptReadout, ...]:
        """Every readout, also those that covered no position of the prompt (with none)."""
        return tuple(self._whole(readout) for readout in self.readouts)

    def add(
        self,
        plan: CapturePlan,
        row: int,
        stop: int,
        lens: Lens,
        together: Together,
    ) -> None:
        """Takes what `plan` captured for `row`, which attends to `stop` keys after this pass."""
        for site, share in plan:
            if share.row != row or share.source:
                continue
            index, readout = share.readout.index, share.readout
            self._positions.setdefault(index, []).extend(share.positions)
            if readout.dictionary is not None:
                self._features.setdefault(index, []).append(together.features[row, index])
                continue
            if readout.reading is not None:
                self._scores.setdefault(index, []).append(together.scores[row, index])
                continue
            values = site.values(share)
            if readout.lens_top_k:
                self._tokens.setdefault(index, []).extend(top_tokens(lens(values), readout.lens_top_k))
            elif site.point.kind == "attention":
                host = to_host(values[:, :, :stop], readout.dtype)
                missing = self.n_prompt - host.shape[2]
                if missing > 0:
                    host = np.pad(host, ((0, 0), (0, 0), (0, missing)))
                self._pieces.setdefault(index, []).append(host)
            else:
                self._pieces.setdefault(index, []).append(to_host(values, readout.dtype))

    def last(self) -> dict[int, ReadoutValue]:
        """What was read at the prompt's last position, by readout index: the first new token carries it."""
        found: dict[int, ReadoutValue] = {}
        for readout in self.readouts:
            positions = self._positions.get(readout.index)
            if not positions or positions[-1] != self.n_prompt - 1:
                continue
            if readout.dictionary is not None:
                table = self._features[readout.index][-1]
                found[readout.index] = table.at(len(table.ids) - 1)
            elif readout.reading is not None:
                found[readout.index] = ProbeScores(self._scores[readout.index][-1][-1])
            elif readout.lens_top_k:
                found[readout.index] = self._tokens[readout.index][-1]
            else:
                piece = self._pieces[readout.index][-1]
                found[readout.index] = piece[:, -1] if readout.point.kind == "attention" else piece[-1]
        return found

    def _whole(self, readout: PreparedReadout) -> PromptReadout:
        positions = tuple(self._positions.get(readout.index, ()))
        values: Array | tuple[TopTokens, ...] | FeatureRows | ProbeScoreRows
        if readout.dictionary is not None:
            tables = self._features.get(readout.index)
            values = concatenate(tables).rows() if tables else FeatureRows(*NO_ROWS)
        elif readout.reading is not None:
            labels = readout.reading.probe.facts.columns
            scores = self._scores.get(readout.index) or [no_rows(len(labels))]
            values = ProbeScoreRows(readout.reading.name, labels, np.concatenate(scores))
        elif readout.lens_top_k:
            values = tuple(self._tokens.get(readout.index, ()))
        else:
            pieces = self._pieces.get(readout.index)
            attention = readout.point.kind == "attention"
            if pieces is None:
                shape = (readout.point.n_heads, 0, self.n_prompt) if attention else (0, readout.point.width)
                values = to_host(torch.zeros(shape), readout.dtype)
            elif len(pieces) == 1:
                values = pieces[0]
            else:
                values = np.concatenate(pieces, axis=1 if attention else 0)
        return PromptReadout(readout=readout.index, positions=positions, values=values)

"""Many scores of live activations in few products: what monitors read, whatever the number of monitors.

Legend: B rows of a pass, T columns of it, M scored columns, W the width of a hook point, D what one scorer reads.

1. Columns are grouped once: affine probes that read the same hook points become one product (`ProbeBank`), features of
   one dictionary one encode; a probe of another shape is a group of its own.
2. At the last of its hook points in a pass a group scores every cell of the rows it is asked for, on the device, after
   the edits there.
3. A decoding step has few rows, and many small products cost more than a large one: there all affine probes of all
   hook points wait for the end of the pass and are scored in one.
4. After the pass all scores go to the host together, (rows, T, M).

A probe that pools over positions (mean, max) needs to know which positions count, and what came before: its activations
are kept to the end of the pass and pooled row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glasshouse.server.dictionaries.dictionary import Dictionary, stacked
from glasshouse.server.probes.pooling import Pooling, RunningPool
from glasshouse.server.probes.served import ProbeBank, ServedProbe
from glasshouse.server.types.conditions import ProbeOutput
from glasshouse.server.types.hook_points import HookPoint

Floats = np.ndarray[Any, np.dtype[Any]]
Masks = np.ndarray[Any, np.dtype[np.bool_]]

# Activations (N, W) at each of a group's hook points -> scores (N, its columns).
Scorer = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class ProbeColumnSource:
    """One column of a probe that is on the model's device, in float32."""

    points: tuple[HookPoint, ...]
    probe: ServedProbe
    column: int
    output: ProbeOutput = ProbeOutput.SCORE

    @property
    def pools(self) -> bool:
        """Whether a row is made of several positions."""
        return self.probe.facts.pooling in (Pooling.MEAN, Pooling.MAX)


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureColumnSource:
    """One feature of a dictionary, by its activation."""

    points: tuple[HookPoint, ...]
    dictionary: Dictionary
    feature: int


ColumnSource = ProbeColumnSource | FeatureColumnSource


@dataclass(frozen=True, kw_only=True, eq=False)
class _Group:
    """Columns that are scored together; `names`: their hook points, `score`: see `Scorer`."""

    names: tuple[str, ...]
    columns: tuple[int, ...]
    score: Scorer


class ScoreColumns:
    """M columns, grouped. Made once, used by every pass; its pools belong to the requests."""

    def __init__(self, sources: Sequence[ColumnSource]) -> None:
        self.n_columns = len(sources)
        self._groups: list[_Group] = []
        self.pooled: dict[int, ProbeColumnSource] = {}
        banks: dict[tuple[str, ...], list[tuple[int, ProbeColumnSource]]] = {}
        encodes: dict[int, list[tuple[int, FeatureColumnSource]]] = {}
        for index, source in enumerate(sources):
            match source:
                case FeatureColumnSource():
                    encodes.setdefault(id(source.dictionary), []).append((index, source))
                case ProbeColumnSource() if source.pools:
                    self.pooled[index] = source
                case ProbeColumnSource() if source.probe.is_affine and source.output is ProbeOutput.SCORE:
                    banks.setdefault(source.probe.facts.hook_points, []).append((index, source))
                case ProbeColumnSource():
                    self._add((index,), source.points, _lone(source))
        joint: dict[int, ProbeColumnSource] = {}
        joined: set[int] = set()
        for probes in banks.values():
            members = [probe for _, probe in probes]
            if all(ProbeBank.of([member.probe]).folded[0] for member in members):
                joint.update(probes)
                joined.add(len(self._groups))
            self._add(tuple(index for index, _ in probes), probes[0][1].points, _bank(members))
        self.joint = _Joint.of(dict(sorted(joint.items())))
        for features in encodes.values():
            first = features[0][1]
            ids = torch.tensor([source.feature for _, source in features])
            self._add(tuple(index for index, _ in features), first.points, _encode(first.dictionary, ids))
        self.points: tuple[str, ...] = tuple(
            dict.fromkeys(point.name for source in sources for point in source.points)
        )
        self.at = self._by_point(range(len(self._groups)))
        # What is left to a decoding step's hook points beside the joint product.
        self.at_step = self._by_point([index for index in range(len(self._groups)) if index not in joined])

    def _by_point(self, groups: Iterable[int]) -> dict[str, tuple[_Group, ...]]:
        chosen = [self._groups[index] for index in groups]
        return {name: tuple(group for group in chosen if name in group.names) for name in self.points}

    def _add(self, columns: tuple[int, ...], points: Sequence[HookPoint], score: Scorer) -> None:
        self._groups.append(_Group(names=tuple(point.name for point in points), columns=columns, score=score))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Joint:
    """Columns whose score is sigma of an affine map, as one product: x is the activations at `points` side by side, (N, sum
    of widths); a column's weights are zero where it does not read.
    """

    points: tuple[str, ...]
    columns: tuple[int, ...]
    weights: Tensor
    biases: Tensor

    @classmethod
    def of(cls, sources: Mapping[int, ProbeColumnSource]) -> _Joint | None:
        """Of columns by index; None of none."""
        if not sources:
            return None
        widths = {point.name: point.width for source in sources.values() for point in source.points}
        starts = dict(zip(widths, accumulate(widths.values(), initial=0), strict=False))
        columns, biases = [], []
        for source in sources.values():
            part = ProbeBank.of([source.probe])
            column = part.weights.new_zeros(sum(widths.values()))
            read = torch.split(part.weights[:, source.column], list(source.probe.facts.widths))
            for point, weights in zip(source.points, read, strict=True):
                column[starts[point.name] : starts[point.name] + point.width] = weights
            columns.append(column)
            biases.append(part.biases[source.column])
        return cls(
            points=tuple(widths),
            columns=tuple(sources),
            weights=torch.stack(columns, dim=1),
            biases=torch.stack(biases),
        )

    def score(self, parts: Sequence[Tensor]) -> Tensor:
        """Scores (N, columns) of activations (N, W) at each of `points`."""
        x = parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)
        return torch.sigmoid(torch.addmm(self.biases, x.to(self.weights.dtype), self.weights))


def _bank(sources: Sequence[ProbeColumnSource]) -> Scorer:
    probes = list({id(source.probe): source.probe for source in sources}.values())
    bank = ProbeBank.of(probes)
    starts, width = {}, 0
    for probe in probes:
        starts[id(probe)] = width
        width += len(probe.facts.columns)
    wanted = [starts[id(source.probe)] + source.column for source in sources]
    everything = wanted == list(range(width))

    def score(parts: Sequence[Tensor]) -> Tensor:
        found = bank.score(parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1))
        scores = found[0] if len(found) == 1 else torch.cat(found, dim=1)
        return scores if everything else scores[:, wanted]

    return score


def _lone(source: ProbeColumnSource) -> Scorer:
    def score(parts: Sequence[Tensor]) -> Tensor:
        x = parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)
        return probe_column(source, x)

    return score


def probe_column(source: ProbeColumnSource, x_ND: Tensor) -> Tensor:
    """The column (N, 1) of rows x."""
    probe = source.probe
    whole = probe.margins(x_ND) if source.output is ProbeOutput.MARGIN else probe.score(x_ND)
    return whole[:, source.column : source.column + 1]


def _encode(dictionary: Dictionary, ids: Tensor) -> Scorer:
    def score(parts: Sequence[Tensor]) -> Tensor:
        x = stacked(parts)
        return dictionary.encode_features(x, ids.to(x.device))

    return score


@dataclass(eq=False, kw_only=True)
class ScorePass:
    """The scores of one pass. `rows`: the rows of the batch that are scored, None for all. `one_token`: of decoding."""

    columns: ScoreColumns
    n_rows: int
    rows: Sequence[int] | None = None
    one_token: bool = False
    _index: Tensor | None = None
    _width: int = 0
    _parts: dict[str, Tensor] = field(default_factory=dict)
    _scores: list[tuple[tuple[int, ...], Tensor]] = field(default_factory=list)
    _given: tuple[Sequence[int], Floats] | None = None

    def begin(self) -> None:
        """Forgets the pass before."""
        self._parts.clear()
        self._scores.clear()
        self._given = None

    def give(self, columns: Sequence[int], scores_RTC: Floats) -> None:
        """Takes the scores of some columns from whoever has computed them. Where every column is given, or of no
        interest, no hook point need be read.
        """
        self._given = columns, scores_RTC
        self._width = scores_RTC.shape[1]

    def at(self, name: str, tensor_BTW: Tensor, *, may_change: bool) -> None:
        """Reads the live activation at a hook point, after its edits. `may_change`: something later in the pass may write
        the same memory.
        """
        if self.rows is not None:
            if self._index is None:
                self._index = torch.tensor(self.rows, device=tensor_BTW.device)
            tensor_BTW, may_change = tensor_BTW[self._index], False
        columns = self.columns
        self._width = tensor_BTW.shape[1]
        x_NW = tensor_BTW[:, 0] if self.one_token else tensor_BTW.reshape(-1, tensor_BTW.shape[-1])
        kept = bool(columns.pooled)
        for group in (columns.at_step if self.one_token else columns.at)[name]:
            if len(group.names) == 1:
                self._scores.append((group.columns, group.score((x_NW,))))
                continue
            kept = True
            if all(other == name or other in self._parts for other in group.names):
                parts = [x_NW if other == name else self._parts[other] for other in group.names]
                self._scores.append((group.columns, group.score(parts)))
        if kept or (self.one_token and columns.joint is not None):
            self._parts[name] = x_NW.clone() if may_change else x_NW

    def scores(self) -> Floats:
        """(rows, T, M); NaN in the columns of probes that pool."""
        joint = self.columns.joint
        given = self._given
        if self.one_token and joint is not None and (self._parts or given is None):
            found = joint.score([self._parts[name] for name in joint.points])
            if len(joint.columns) == self.columns.n_columns and given is None:
                return self._host(found)
            self._scores.append((joint.columns, found))
        whole = np.full((self.n_rows, self._width, self.columns.n_columns), np.nan)
        if self._scores:
            joined = torch.cat([found.float() for _, found in self._scores], dim=1)
            where = [column for columns, _ in self._scores for column in columns]
            whole[:, :, where] = self._host(joined)
        if given is not None:
            whole[:, :, list(given[0])] = given[1]
        return whole

    def _host(self, scores_NC: Tensor) -> Floats:
        host: Floats = scores_NC.cpu().numpy()
        return host.reshape(self.n_rows, self._width, -1)

    @property
    def pooling(self) -> Iterable[int]:
        """The columns that `pooled` is to be asked for."""
        if self._given is None:
            return self.columns.pooled
        return [column for column in self.columns.pooled if column not in self._given[0]]

    def pooled(self, place: int, column: int, chosen_T: Masks, pools: dict[int, RunningPool]) -> Floats:
        """The scores (n chosen,) of a pooling probe at the chosen columns of the `place`-th row, whose pools are given."""
        source = self.columns.pooled[column]
        pool = pools.get(column)
        if pool is None:
            pool = pools[column] = RunningPool(source.probe.facts.pooling)
        first = place * self._width
        rows = torch.from_numpy(first + np.flatnonzero(chosen_T))
        parts: Mapping[str, Tensor] = {
            point.name: self._parts[point.name][rows.to(self._parts[point.name].device)]
            for point in source.points
        }
        scores: Floats = probe_column(source, pool.add(source.probe.join(parts)))[:, 0].double().cpu().numpy()
        return scores

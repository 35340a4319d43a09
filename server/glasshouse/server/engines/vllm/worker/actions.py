"""What runs at a junction: edits of rows and captures of rows, in float32 whatever the model's dtype.

Legend: T tokens of the batch, N rows of them (None stands for all T in order), W width. Tensors may be longer than T:
vLLM pads batches. Everything that does not depend on activations is gathered when the step is planned, not here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from glasshouse.server.interventions import kernels
from glasshouse.server.interventions.features import FeatureGroup

from .junctions import PointTarget


class Action(Protocol):
    """`members`: which of the step's requests it works for, by place."""

    members: Sequence[int]

    def __call__(self, x: Tensor, residual: Tensor | None) -> None:
        """Works on the live tensors, in place."""


@dataclass(eq=False, kw_only=True)
class Rows:
    """Rows of the batch at one hook point."""

    target: PointTarget
    n_tokens: int
    rows_N: Tensor | None

    def take(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """(N, W) in the model's dtype: a copy for "sum", maybe a view of x for "x"."""
        rows = self.rows_N
        if self.target == "x" or residual is None:
            if rows is not None:
                return x.index_select(0, rows)
            return x if x.shape[0] == self.n_tokens else x[: self.n_tokens]
        if rows is not None:
            return x.index_select(0, rows).add_(residual.index_select(0, rows))
        if x.shape[0] == self.n_tokens:
            return torch.add(x, residual)
        return torch.add(x[: self.n_tokens], residual[: self.n_tokens])

    def put(self, edited_NW: Tensor, x: Tensor, residual: Tensor | None) -> None:
        """Writes the rows back; a stream goes to the residual alone."""
        rows = self.rows_N
        values = edited_NW.to(x.dtype)
        into = x if self.target == "x" or residual is None else residual
        if rows is None:
            into[: self.n_tokens].copy_(values)
        else:
            into.index_copy_(0, rows, values)
        if into is not x:
            if rows is None:
                x[: self.n_tokens].zero_()
            else:
                x.index_fill_(0, rows, 0)


@dataclass(eq=False, kw_only=True)
class PlainAdd:
    """s + v, each row its own v (already times its coefficient). In float32 the pair need not be summed first."""

    rows: Rows
    delta_NW: Tensor
    members: Sequence[int]

    def __call__(self, x: Tensor, residual: Tensor | None) -> None:
        """Adds."""
        into = x if self.rows.target == "x" or residual is None else residual
        if into.dtype != torch.float32:
            # Round once, as a model that holds its stream in this dtype does.
            self.rows.put(self.rows.take(x, residual).float().add_(self.delta_NW), x, residual)
        elif self.rows.rows_N is not None:
            into.index_add_(0, self.rows.rows_N, self.delta_NW)
        elif into.shape[0] == self.rows.n_tokens:
            into.add_(self.delta_NW)
        else:
            into[: self.rows.n_tokens].add_(self.delta_NW)


@dataclass(eq=False, kw_only=True)
class RunAdd:
    """The same where few vectors serve long runs of rows, as in a prompt: run i is rows `starts[i]`..`stops[i]`."""

    target: PointTarget
    starts: Sequence[int]
    stops: Sequence[int]
    delta_RW: Tensor
    members: Sequence[int]

    def __call__(self, x: Tensor, residual: Tensor | None) -> None:
        """Adds."""
        for index, (start, stop) in enumerate(zip(self.starts, self.stops, strict=True)):
            if self.target == "x" or residual is None:
                x[start:stop] = (x[start:stop].float() + self.delta_RW[index]).to(x.dtype)
            else:
                stream = (x[start:stop] + residual[start:stop]).float()
                residual[start:stop] = (stream + self.delta_RW[index]).to(x.dtype)
                x[start:stop].zero_()


@dataclass(eq=False, kw_only=True)
class VectorEdit:
    """An edit of the other kinds (see `interventions.kernels`), or one that keeps norms. `table_VW` and
    `vector_rows_N3` say which vectors each row uses; numbers are (N, 1).
    """

    kind: str
    rows: Rows
    table_VW: Tensor
    vector_rows_N3: Tensor
    plain_N1: Tensor
    scaled_N1: Tensor | None
    low_N1: Tensor
    high_N1: Tensor
    keep_norm_N1: Tensor | None
    members: Sequence[int]

    def __call__(self, x: Tensor, residual: Tensor | None) -> None:
        """Edits."""
        s_NW = self.rows.take(x, residual).float()
        first = self.table_VW.index_select(0, self.vector_rows_N3[:, 0])
        match self.kind:
            case "add":
                edited = kernels.add(s_NW, first, self.plain_N1, self.scaled_N1)
            case "project":
                edited = kernels.clamp_projection(s_NW, first, self.low_N1, self.high_N1)
            case "rotate":
                second = self.table_VW.index_select(0, self.vector_rows_N3[:, 1])
                target = self.table_VW.index_select(0, self.vector_rows_N3[:, 2])
                edited = kernels.rotate(s_NW, first, second, target)
            case _:
                edited = first
        if self.keep_norm_N1 is not None:
            edited = kernels.restore_norm(edited, s_NW, self.keep_norm_N1)
        self.rows.put(edited, x, residual)


@dataclass(eq=False, kw_only=True)
class MeasureFeatures:
    """A feature group's reading at one of its input points (`path` of the group)."""

    rows: Rows
    group: FeatureGroup
    path: int
    members: Sequence[int]

    def __call__(self, x: Tensor, residual: Tensor | None) -> None:
        """Reads."""
        self.group.measure(self.rows.take(x, residual)[:, None], self.path)


@dataclass(eq=False, kw_only=True)
class WriteFeatures:
    """A feature group's writing at one of its output points."""

    rows: Rows
    group: FeatureGroup
    sink: int
    members: Sequence[int]

    def __call__(self, x: Tensor, residual: Tensor | None) -> None:
        """Edits."""
        s_NW = self.rows.take(x, residual)
        if self.rows.rows_N is None and (self.rows.target == "x" or residual is None):
            s_NW = s_NW.clone()
        self.group.write(s_NW[:, None], self.sink)
        self.rows.put(s_NW, x, residual)


@dataclass(eq=False, kw_only=True)
class Capture:
    """Keeps the rows that readouts want: what the model goes on with, after the edits there."""

    rows: Rows
    members: Sequence[int]
    taken_NW: Tensor | None = field(default=None)

    def __call__(self, x: Tensor, residual: Tensor | None) -> None:
        """Reads."""
        taken = self.rows.take(x, residual)
        if self.rows.rows_N is None and (self.rows.target == "x" or residual is None):
            # Later edits, or the model itself, may write the same memory.
            taken = taken.clone()
        self.taken_NW = taken

"""What one forward pass captures, and for whom.

1. Planned per pass: at each hook point the cells (row of the batch, index within the row) that any readout wants.
2. At the site the cells are taken out. Where most cells are wanted the whole tensor is kept: by reference if nothing in
   this pass writes activations, else as a copy, because edits further down may write the same memory.
3. After the pass each owner gets its positions as host arrays in its wire dtype.

A value is what the model went on with: it is captured after the edits at its hook point.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from glasshouse.server.types.hook_points import HookPoint
from glasshouse.server.types.readouts import Array, WireDType
from glasshouse.server.types.spans import Span

from .prepared import PreparedReadout

if TYPE_CHECKING:
    from .probes import StepScoring

# Above this share of a tensor's cells, keeping it whole is cheaper than gathering.
_WHOLE_SHARE = 0.5


@dataclass(eq=False, kw_only=True)
class Share:
    """The part of a capture that belongs to one readout of one row: `positions` read, at `columns` of the row. `source`:
    which of the readout's hook points this is.
    """

    row: int
    readout: PreparedReadout
    source: int
    positions: list[int]
    columns: list[int]
    # Where its cells begin among those gathered; unused when the tensor is kept whole.
    offset: int


@dataclass(eq=False, kw_only=True)
class SiteCapture:
    """All that is captured at one hook point in one pass. `tensor` is set when the site runs."""

    point: HookPoint
    shares: list[Share]
    rows_N: Tensor | None
    columns_N: Tensor | None
    tensor: Tensor | None = None

    @cached_property
    def plain(self) -> list[Share]:
        """The shares of a pass of one token a row whose value is the activation itself."""
        return [share for share in self.shares if share.readout.is_plain]

    @cached_property
    def lenses(self) -> dict[int, list[Share]]:
        """The shares read as logits, by their top_k."""
        grouped: dict[int, list[Share]] = {}
        for share in self.shares:
            if share.readout.lens_top_k:
                grouped.setdefault(share.readout.lens_top_k, []).append(share)
        return grouped

    def take(self, tensor: Tensor, *, may_change: bool) -> None:
        """Captures from the live (B, T, W) activation, or the (B, H, T, S) attention map."""
        if self.point.kind == "attention" or self.rows_N is None:
            self.tensor = tensor.clone() if may_change else tensor
        else:
            self.tensor = tensor[self.rows_N, self.columns_N]

    def values(self, share: Share) -> Tensor:
        """The share's cells: (n, W), or (H, n, S) for attention maps, on the model's device."""
        assert self.tensor is not None, f"{self.point.name} was planned and did not run"
        if self.point.kind == "attention":
            return self.tensor[share.row][:, share.columns]
        if self.rows_N is not None:
            return self.tensor[share.offset : share.offset + len(share.columns)]
        first, last = share.columns[0], share.columns[-1]
        row = self.tensor[share.row]
        if last - first + 1 == len(share.columns):
            return row[first : last + 1]
        return row[share.columns]

    def rows_of(self, shares: Sequence[Share]) -> Tensor:
        """The cells of shares of one position each, (n, W), in one gather."""
        return self.pick(self.places_of(shares))

    def places_of(self, shares: Sequence[Share]) -> list[int]:
        """Where the cells of shares of one position each lie: the same at every step of a plan."""
        return [share.row if self.rows_N is None else share.offset for share in shares]

    @property
    def everything(self) -> Tensor:
        """All its cells (n, W), of a pass of one token a row."""
        assert self.tensor is not None, f"{self.point.name} was planned and did not run"
        return self.tensor if self.rows_N is not None else self.tensor[:, 0]

    def pick(self, places: Sequence[int] | Tensor) -> Tensor:
        """The cells (n, W) at `places`, of a pass of one token a row."""
        cells = self.everything
        if isinstance(places, Tensor):
            return cells[places]
        if len(places) == cells.shape[0] and places == list(range(len(places))):
            return cells
        return cells[torch.tensor(places, device=cells.device)]


@dataclass(eq=False, kw_only=True)
class CapturePlan:
    """Captures by hook point name; `valid_steps` None: until the batch changes."""

    sites: dict[str, SiteCapture] = field(default_factory=dict)
    valid_steps: int | None = None
    # Made when a step's probes are first scored.
    scoring: StepScoring | None = None

    @cached_property
    def reads_features(self) -> bool:
        """Whether any readout is of a dictionary."""
        return any(share.readout.dictionary is not None for _, share in self)

    def __iter__(self) -> Iterator[tuple[SiteCapture, Share]]:
        for site in self.sites.values():
            for share in site.shares:
                yield site, share

    def release(self) -> None:
        """Lets go of the captured tensors."""
        for site in self.sites.values():
            site.tensor = None

    def advance(self) -> None:
        """Moves a plan for decoding rows to their next position."""
        for site in self.sites.values():
            for share in site.shares:
                share.positions = [share.positions[0] + 1]


def plan_captures(
    spans: Sequence[Span],
    readouts: Sequence[Sequence[PreparedReadout]],
    *,
    n_columns: int,
    device: torch.device,
) -> CapturePlan:
    """Plans a pass whose row b feeds `spans[b]` for `readouts[b]`; `n_columns` is the width of the padded batch."""
    plan = CapturePlan()
    shares: dict[str, list[Share]] = {}
    points: dict[str, HookPoint] = {}
    horizon: int | None = None
    for row, (span, row_readouts) in enumerate(zip(spans, readouts, strict=True)):
        for readout in row_readouts:
            if n_columns == 1:
                change = readout.positions.next_change(span.start)
                steps = None if change is None else change - span.start - 1
                if readout.positions.excluded_token_ids:
                    steps = 0
                horizon = steps if horizon is None else horizon if steps is None else min(horizon, steps)
            positions = readout.positions.within(span.start, span.token_ids)
            if not positions:
                continue
            columns = [p - span.start for p in positions]
            for source, point in enumerate(readout.points):
                points[point.name] = point
                shares.setdefault(point.name, []).append(
                    Share(
                        row=row,
                        readout=readout,
                        source=source,
                        positions=positions,
                        columns=columns,
                        offset=0,
                    )
                )
    for name, site_shares in shares.items():
        plan.sites[name] = _site(points[name], site_shares, len(spans) * n_columns, device)
    plan.valid_steps = horizon
    return plan


def _site(point: HookPoint, shares: list[Share], n_cells: int, device: torch.device) -> SiteCapture:
    rows: list[int] = []
    columns: list[int] = []
    for share in shares:
        share.offset = len(rows)
        rows.extend([share.row] * len(share.columns))
        columns.extend(share.columns)
    if point.kind == "attention" or len(rows) >= _WHOLE_SHARE * n_cells:
        return SiteCapture(point=point, shares=shares, rows_N=None, columns_N=None)
    return SiteCapture(
        point=point,
        shares=shares,
        rows_N=torch.tensor(rows, device=device),
        columns_N=torch.tensor(columns, device=device),
    )


def to_host(values: Tensor, dtype: WireDType) -> Array:
    """A host array of `values` in the wire dtype, contiguous. May share memory with `values`."""
    if dtype == "bfloat16":
        raw = values.to(torch.bfloat16).contiguous().view(torch.int16).cpu().numpy()
        return raw.view(ml_dtypes.bfloat16)
    target = torch.float16 if dtype == "float16" else torch.float32
    host: Array = np.ascontiguousarray(values.to(target).cpu().numpy())
    return host

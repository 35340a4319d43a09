"""One forward pass: tokens in, hidden states out, with the edits and captures planned for it.

1. A plan names the hook points that something is done at; only those are tapped. A plan that holds for the next step
   (decoding rows) keeps its taps.
2. At a site the edits run first, then the captures: what is read is what the model goes on with.
3. `unembed` is not a module's output here: logits are made only for the cells that need them, and edited and captured on
   the way. Cells are (row, column) of the pass.
4. After the pass every planned site must have run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glasshouse.server.engines.watching import WatchedPass
from glasshouse.server.hooks.attachment import Attachment, attach
from glasshouse.server.hooks.attention import AttentionMemory
from glasshouse.server.hooks.table import HookTable
from glasshouse.server.interventions.edits import PreparedIntervention
from glasshouse.server.interventions.plan import EditGroup, EditPlan, plan_edits
from glasshouse.server.models.loaded import LoadedModel
from glasshouse.server.readouts.capture import CapturePlan, plan_captures
from glasshouse.server.readouts.prepared import PreparedReadout
from glasshouse.server.types.hook_points import HookPoint
from glasshouse.server.types.spans import Span

UNEMBED = "unembed"


class PlannedPass:
    """The edits and captures of a pass with given rows, attached to the model until `close`."""

    def __init__(
        self,
        table: HookTable,
        spans: Sequence[Span],
        edits: Sequence[Sequence[PreparedIntervention]],
        readouts: Sequence[Sequence[PreparedReadout]],
        *,
        n_columns: int,
        watched: WatchedPass | None = None,
    ) -> None:
        device = table.loaded.device
        self.edits: EditPlan = plan_edits(spans, edits, n_columns=n_columns, device=device)
        self.captures: CapturePlan = plan_captures(spans, readouts, n_columns=n_columns, device=device)
        self._may_change = bool(self.edits.actions)
        self.watched = watched
        self._watched_points = frozenset[str]() if watched is None else watched.points
        self._sites = (self.edits.actions.keys() | self.captures.sites.keys() | self._watched_points) - {
            UNEMBED
        }
        self._ran: set[str] = set()
        # Other passes run between the steps that a plan for decoding rows spans: its taps stay on, and look away.
        self._running = False
        self._attachment: Attachment | None = (
            attach(table, self._sites, self._at_site) if self._sites else None
        )

    @property
    def valid_steps(self) -> int | None:
        """Further decoding steps this plan holds for; None: until the batch changes."""
        steps = [s for s in (self.edits.valid_steps, self.captures.valid_steps) if s is not None]
        return min(steps, default=None)

    @property
    def _logit_edits(self) -> list[EditGroup]:
        actions = self.edits.actions.get(UNEMBED, [])
        # No dictionary reads or writes logits.
        return [action for action in actions if isinstance(action, EditGroup)]

    def _at_site(self, point: HookPoint, tensor: Tensor) -> bool:
        if not self._running:
            return False
        actions = self.edits.actions.get(point.name, ())
        for action in actions:
            action.apply(tensor)
        site = self.captures.sites.get(point.name)
        if site is not None:
            site.take(tensor, may_change=self._may_change)
        if self.watched is not None and point.name in self._watched_points:
            self.watched.at(point.name, tensor, may_change=self._may_change)
        self._ran.add(point.name)
        return bool(actions)

    def begin(self) -> None:
        """Books what this pass owes the edits."""
        self.edits.promise()
        if self.watched is not None:
            self.watched.begin()
        self._ran.clear()
        self._running = True

    def end(self) -> None:
        """The forward pass is over."""
        self._running = False

    def check(self) -> None:
        """Every planned site ran. What did not shows in the receipts; a capture that is missing stops here."""
        missing = self._sites - self._ran
        assert not missing, f"hook points did not run: {sorted(missing)}"

    def at_logits(self, logits_NV: Tensor, cells: dict[tuple[int, int], int]) -> None:
        """Edits and captures the logits of `cells`, (row, column) -> row of `logits_NV`, in place."""
        grid = logits_NV[:, None]
        for group in self._logit_edits:
            group.remapped(cells).apply(grid)
        site = self.captures.sites.get(UNEMBED)
        if site is not None:
            rows = [cells[share.row, column] for share in site.shares for column in share.columns]
            site.rows_N = site.columns_N = torch.tensor(rows, device=logits_NV.device)
            site.tensor = logits_NV[site.rows_N]

    def logit_cells(self) -> set[tuple[int, int]]:
        """Cells whose logits are edited or captured."""
        cells = {cell for group in self._logit_edits for cell in group.cells()}
        site = self.captures.sites.get(UNEMBED)
        if site is not None:
            cells |= {(share.row, column) for share in site.shares for column in share.columns}
        return cells

    def close(self) -> None:
        """Takes the taps off."""
        if self._attachment is not None:
            self._attachment.remove()
            self._attachment = None


def run(
    loaded: LoadedModel,
    planned: PlannedPass,
    input_ids_BT: Tensor,
    position_ids_BT: Tensor,
    memory: AttentionMemory | None,
) -> Tensor:
    """The hidden states after the final norm, (B, T, d_model)."""
    planned.begin()
    loaded.attention.memory = memory
    try:
        hidden_BTD = loaded.family.forward_hidden(loaded.model, input_ids_BT, position_ids_BT)
    finally:
        loaded.attention.memory = None
        planned.end()
    planned.check()
    return hidden_BTD


def logits_at(
    loaded: LoadedModel, planned: PlannedPass, hidden_BTD: Tensor, wanted: Sequence[tuple[int, int]]
) -> Tensor:
    """The logits (n, vocab), float32 and soft-capped, of the `wanted` (row, column) cells; edits and captures at
    `unembed` run on the way.
    """
    extra = planned.logit_cells().difference(wanted)
    cells = [*wanted, *sorted(extra)]
    if hidden_BTD.shape[1] == 1 and cells == [(row, 0) for row in range(hidden_BTD.shape[0])]:
        hidden_ND = hidden_BTD[:, 0]
    else:
        index = torch.tensor(cells, device=hidden_BTD.device)
        hidden_ND = hidden_BTD[index[:, 0], index[:, 1]]
    raw_NV, capped_NV = loaded.family.unembed(loaded.model, hidden_ND)
    if extra or UNEMBED in planned.edits.actions or UNEMBED in planned.captures.sites:
        planned.at_logits(raw_NV, {cell: row for row, cell in enumerate(cells)})
        capped_NV = _soft_cap(raw_NV, loaded.family.final_logit_softcap)
    return capped_NV[: len(wanted)].float()


def _soft_cap(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else torch.tanh(logits / cap) * cap

"""A request checked against the model that will serve it, before anything runs.

Both engines use it: hook points are resolved, positions made absolute, vectors checked and moved to the device. What
comes out can be planned without further checks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from glasshouse.server.hooks.table import HookTable
from glasshouse.server.interventions import edits
from glasshouse.server.interventions.edits import PreparedEdit
from glasshouse.server.readouts import prepared
from glasshouse.server.readouts.prepared import PreparedReadout
from glasshouse.server.types.errors import FailedPrecondition, InvalidArgument
from glasshouse.server.types.interventions import Intervention, InterventionReceipt
from glasshouse.server.types.models import ModelInfo
from glasshouse.server.types.readouts import ReadActivations, ReadLogitLens, Readout, WireDType
from glasshouse.server.types.selectors import ResolvedPositions, Selector, resolve
from glasshouse.wire import reasons


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """Checks requests against one model."""

    info: ModelInfo
    table: HookTable
    device: torch.device

    def check_tokens(self, token_ids: Sequence[int], *, max_tokens: int, field: str) -> None:
        """Raises `InvalidArgument` for an empty prompt, ids off the vocabulary, or more than the context holds."""
        if not token_ids:
            raise InvalidArgument(
                "the input holds no token",
                reason=reasons.EMPTY_INPUT,
                field=field,
                value="0 tokens",
                remedy="give at least one token",
            )
        low, high = min(token_ids), max(token_ids)
        if low < 0 or high >= self.info.vocab_size:
            raise InvalidArgument(
                f"token id {low if low < 0 else high} is not in [0, {self.info.vocab_size})",
                reason=reasons.TOKEN_OUT_OF_RANGE,
                field=f"{field}.token_ids",
                value=low if low < 0 else high,
                remedy="use ids from Tokenize",
            )
        if len(token_ids) + max_tokens > self.info.context_length:
            total = len(token_ids) + max_tokens
            raise InvalidArgument(
                f"{len(token_ids)} prompt tokens and max_tokens {max_tokens} make {total}, "
                f"the context holds {self.info.context_length}",
                reason=reasons.CONTEXT_EXCEEDED,
                field="max_tokens" if max_tokens and len(token_ids) < self.info.context_length else field,
                value=total,
                remedy="shorten the prompt or lower max_tokens",
            )

    def edits(
        self, interventions: Sequence[Intervention], *, prompt: Sequence[int], n_fed: int
    ) -> tuple[PreparedEdit, ...]:
        """The interventions of a request that feeds at most `n_fed` positions, the first of them `prompt`."""
        ready = []
        for index, intervention in enumerate(interventions):
            field = f"interventions[{index}]"
            point = self.table.resolve(intervention.hook_point, field=f"{field}.hook_point")
            if not point.writable:
                raise FailedPrecondition(
                    f"{point.name} cannot be edited",
                    reason=reasons.HOOK_POINT_NOT_WRITABLE,
                    field=f"{field}.hook_point",
                    value=point.name,
                    remedy="ListHookPoints says which points are writable",
                )
            positions = self._resolve(intervention.positions, prompt, n_fed, f"{field}.positions")
            ready.append(
                edits.prepare(
                    intervention, index=index, point=point, positions=positions, device=self.device, field=field
                )
            )
        return tuple(ready)

    def readouts(
        self, readouts: Sequence[Readout], *, prompt: Sequence[int], n_fed: int
    ) -> tuple[PreparedReadout, ...]:
        """The readouts of a request that feeds at most `n_fed` positions, the first of them `prompt`."""
        ready = []
        for index, readout in enumerate(readouts):
            field = f"readouts[{index}]"
            match readout:
                case ReadActivations():
                    inner = f"{field}.activations"
                case ReadLogitLens():
                    inner = f"{field}.logit_lens"
            point = self.table.resolve(readout.hook_point, field=f"{inner}.hook_point")
            positions = self._resolve(readout.positions, prompt, n_fed, f"{field}.positions")
            ready.append(
                prepared.prepare(
                    readout,
                    index=index,
                    point=point,
                    positions=positions,
                    vocab_size=self.info.vocab_size,
                    field=field,
                )
            )
        return tuple(ready)

    def extraction(
        self, hook_points: Sequence[str], positions: Selector, dtype: WireDType, *, prompt: Sequence[int]
    ) -> tuple[PreparedReadout, ...]:
        """One readout a hook point of an extraction over `prompt`."""
        ready = []
        for index, name in enumerate(hook_points):
            point = self.table.resolve(name, field=f"hook_points[{index}]")
            resolved = self._resolve(positions, prompt, len(prompt), "positions")
            wanted = ReadActivations(hook_point=name, dtype=dtype)
            ready.append(
                prepared.prepare(
                    wanted,
                    index=index,
                    point=point,
                    positions=resolved,
                    vocab_size=self.info.vocab_size,
                    field=f"hook_points[{index}]",
                )
            )
        return tuple(ready)

    def _resolve(
        self, selector: Selector, prompt: Sequence[int], n_fed: int, field: str
    ) -> ResolvedPositions:
        return resolve(
            selector,
            prompt=prompt,
            n_fed=n_fed,
            bos_token_id=self.info.bos_token_id,
            special_token_ids=self.info.special_token_ids,
            field=field,
        )


def receipt(ready: Sequence[PreparedEdit]) -> tuple[InterventionReceipt, ...]:
    """What was done.

    Raises:
        FailedPrecondition: an edit ran at fewer positions than its selector covered. Nothing is silently skipped.
    """
    for edit in ready:
        if edit.applied != edit.promised:
            raise FailedPrecondition(
                f"interventions[{edit.index}] was applied at {edit.applied} positions of {edit.promised}",
                reason=reasons.INTERVENTION_NOT_APPLIED,
                field=f"interventions[{edit.index}]",
                value=edit.kind,
                remedy="this is a defect of the engine: the tokens streamed before are not to be used",
            )
    return tuple(
        InterventionReceipt(
            index=edit.index,
            edit=edit.kind,
            hook_points=(edit.point.name,),
            positions_applied=edit.applied,
            content_hash=edit.content_hash,
        )
        for edit in ready
    )
